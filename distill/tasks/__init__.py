"""Tasks: the head that each needs."""

from distill.tasks.heads import LinearHead
from distill.tasks.reused import REUSED, ReusedHead, check_reused, keep_classifiers, reuse_classifiers, reuses

HEADS = {"linear": LinearHead, REUSED: ReusedHead}

__all__ = [
    "HEADS",
    "LinearHead",
    "ReusedHead",
    "check_reused",
    "keep_classifiers",
    "reuse_classifiers",
    "reuses",
]
