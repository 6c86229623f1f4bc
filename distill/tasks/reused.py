"""The teacher's classifier in the student (SimKD: Chen et al. 2022, arXiv 2203.14001).

The head type ``reused`` is a projector and a classifier. The classifier's weights are the teacher's and stay as they
are; the projector learns with the student to give what they read, by the loss ``simkd`` on taps:
``{student: heads.TASK.projector, teacher: fusion}``, and ``unimodal_heads.TASK.image.projector`` with ``necks.image``.
Both belong to the student, are exported with it and count as its size.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from distill.config import Recipe, nearest
from distill.contracts import UserError

REUSED = "reused"
"""The head's type in a recipe."""


class ReusedHead(nn.Module):
    """A learned projector to the teacher's width, and behind it the teacher's classifier.

    The authors' projector is a bottleneck of 1x1, 3x3 and 1x1 convolutions with BatchNorm and ReLU on the last feature
    map; heads here read vectors, so it is three linear layers. LayerNorm takes the place of BatchNorm, which refuses
    the single row that a micro-batch or a rank may have, and the last layer is bare: LayerNorm would give all rows one
    length, and a ReLU what a teacher's GELU never says.

    Args:
        in_dim: width of the pooled vector.
        num_outputs: C.
        width: what the teacher's classifier reads, which is the width of the teacher's fusion.
        reduction: by which the middle of the projector is narrower; the authors' 2.

    Raises:
        ValueError: nothing is left of the middle.
    """

    reads_tokens = False

    def __init__(self, in_dim: int, num_outputs: int, *, width: int, reduction: int = 2) -> None:
        super().__init__()
        if not 1 <= reduction <= width:
            raise ValueError(f"reduction {reduction} leaves no middle of width {width}; give 1 to {width}")
        middle = width // reduction
        layers = [
            nn.Sequential(nn.Linear(one, other), nn.LayerNorm(other), nn.ReLU())
            for one, other in pairwise((in_dim, middle, middle))
        ]
        self.projector = nn.Sequential(*layers, nn.Linear(middle, width))
        self.linear = nn.Linear(width, num_outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map [B, D] to logits [B, C]."""
        return self.linear(self.projector(pooled))


def reuses(recipe: Recipe) -> bool:
    """Whether the student has heads that take over a classifier."""
    return any(part.type == REUSED for part in recipe.student.heads.values())


def reuse_classifiers(student: nn.Module, teacher: nn.Module) -> None:
    """Write the teacher's classifiers into the student's reused heads, each from the head of the same name.

    A student without such heads asks nothing of the teacher.
    """
    for path, head in student.named_modules():
        if isinstance(head, ReusedHead):
            head.linear.load_state_dict(teacher.get_submodule(f"{path}.linear").state_dict())


def keep_classifiers(student: nn.Module) -> None:
    """Fix the classifiers of reused heads."""
    for head in student.modules():
        if isinstance(head, ReusedHead):
            head.linear.requires_grad_(False)


def check_reused(recipe: Recipe) -> None:
    """Check that the teacher has the classifiers which the student's heads take over.

    Raises:
        UserError: it has none, several, or one that reads another width.
    """
    teacher, student = recipe.teacher, recipe.student
    for task, part in teacher.heads.items():
        if part.type == REUSED:
            raise UserError(f"teacher.heads.{task}: reused takes over the teacher's classifier; use linear here")
    for task, part in student.heads.items():
        if part.type != REUSED:
            continue
        place, theirs = f"student.heads.{task}", list(teacher.heads or recipe.data.targets)
        if teacher.fusion is None or task not in theirs:
            choices = nearest(task, theirs) if teacher.fusion else "it has no fusion, and so no heads"
            raise UserError(f"{place}: reused takes over the teacher's classifier, and it has none; {choices}")
        if teacher.members > 1:
            raise UserError(
                f"{place}: reused takes over one classifier, and the teacher has {teacher.members} members with one "
                "each; set teacher.members to 1"
            )
        missing = set(student.encoders).difference(teacher.encoders if teacher.unimodal_heads else ())
        if student.unimodal_heads and missing:
            raise UserError(
                f"{place}: reused takes over the heads of single modalities too, and the teacher has none of "
                f"{min(missing)!r}; set student.unimodal_heads to false"
            )
        width = teacher.fusion.params["dim"]
        if part.params["width"] != width:
            raise UserError(
                f"{place}.width is {part.params['width']}, and the teacher's classifier reads {width} numbers "
                f"(teacher.fusion.dim); set it to {width}"
            )
