"""Tasks: the head that each needs."""

from distill.tasks.heads import ClassificationHead
from distill.tasks.reused import REUSED, ReusedHead, check_reused, keep_classifiers, reuse_classifiers, reuses

HEADS = {"classification": ClassificationHead, REUSED: ReusedHead}

__all__ = [
    "HEADS",
    "ClassificationHead",
    "ReusedHead",
    "check_reused",
    "keep_classifiers",
    "reuse_classifiers",
    "reuses",
]
