"""Tasks: the head that each needs."""

from distill.tasks.captioning import CaptionHead
from distill.tasks.heads import LinearHead
from distill.tasks.reused import REUSED, ReusedHead, check_reused, keep_classifiers, reuse_classifiers, reuses

HEADS = {"linear": LinearHead, "decoder": CaptionHead, REUSED: ReusedHead}

__all__ = [
    "HEADS",
    "CaptionHead",
    "LinearHead",
    "ReusedHead",
    "check_reused",
    "keep_classifiers",
    "reuse_classifiers",
    "reuses",
]
