"""Tasks: the head that each needs."""

from distill.tasks.heads import HEADS, ClassificationHead

__all__ = ["HEADS", "ClassificationHead"]
