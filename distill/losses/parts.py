"""What losses learn beside the student: modules that hold their weights and call the pure functions.

A part belongs to one term of an objective. It is built from the term's example tensors, trained and checkpointed with
the student, and left behind when the student is kept. What a part keeps of rows is in :mod:`distill.losses.memories`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.contracts import UserError
from distill.losses import contrastive, maps, outputs
from distill.losses.bounds import AtLeastZero, Count, PartShare, Positive
from distill.losses.numeric import upcast
from distill.ranks import Ranks


@dataclass(frozen=True)
class Known:
    """What a part is told beside its example tensors.

    Attributes:
        term: the term's name, for messages.
        seed: the run's.
        row_ids: int64 [N], the ids of all rows that the term will read, in any order; None where nobody knows them.
    """

    term: str
    seed: int = 0
    row_ids: Tensor | None = None


class Part(nn.Module):
    """Base of all parts.

    ``__init__`` takes a :class:`Known` and the tensors of the term's kind as examples, and as keywords the term's
    parameters that stay; ``forward`` takes such tensors, and as keywords the parameters that may have a schedule.

    Attributes:
        step: number of the optimizer step, from 0.
    """

    step: int = 0

    def settle(self, ranks: Ranks) -> None:
        """Take in what the rows of a finished step leave behind; every rank calls it."""

    def forget(self) -> None:
        """Drop what the rows of a step that is not finished would leave behind."""


class Vid(Part):
    """The regressor and the variances of :func:`distill.losses.vid`, which start at the authors' 5."""

    def __init__(self, known: Known, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        need_maps(known, student, teacher)
        width = teacher.shape[1]
        self.regressor = nn.Conv2d(student.shape[1], width, kernel_size=1, bias=False)
        self.log_scale = nn.Parameter(torch.full((width,), math.log(math.expm1(5 - 1e-5))))

    def forward(self, student: Tensor, teacher: Tensor, *, eps: Positive = 1e-5) -> Tensor:
        """Return the loss of maps [B, C, H, W]."""
        return maps.vid(student, teacher, self.regressor.weight, self.log_scale, eps=eps)


class Mgd(Part):
    """The generator of :func:`distill.losses.mgd`; masks are drawn from torch's generator in each step."""

    def __init__(self, known: Known, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        need_maps(known, student, teacher)
        width = teacher.shape[1]
        self.first = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.second = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        ratio: PartShare = 0.15,
        hide: Literal["channels", "positions"] = "channels",
    ) -> Tensor:
        """Return the loss of maps [B, C, H, W], of which a ratio is hidden.

        The authors hide channels for classification (0.15), positions for detection and segmentation (0.5 to 0.75).
        """
        rows, width, *size = student.shape
        shape = (rows, width, 1, 1) if hide == "channels" else (rows, 1, *size)
        mask = (torch.rand(shape, device=student.device) >= ratio).to(student.dtype)
        return maps.mgd(student, teacher, mask, *self.first.parameters(), *self.second.parameters())


class Ofd(Part):
    """The connector and the margins of :func:`distill.losses.ofd`.

    A margin is the mean of a channel's negative values in the example rows of all ranks, 0 where there are none: what
    the authors compute from the BatchNorm before the ReLU in closed form, without asking for such a layer. So the
    teacher's tap must lie before a ReLU; behind one, nothing is negative.
    """

    margins: Tensor

    def __init__(self, known: Known, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        need_maps(known, student, teacher)
        width = teacher.shape[1]
        self.connector = nn.Sequential(nn.Conv2d(student.shape[1], width, kernel_size=1, bias=False), _Norm(width))
        self.register_buffer("margins", _mean_of_negatives(upcast(teacher.detach())))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps [B, C, H, W] before ReLU."""
        return maps.ofd(self.connector(like(student, self.margins)), teacher, self.margins)


class ClipAfd(Part):
    """The fusing layers of :func:`distill.losses.clip_afd`."""

    def __init__(
        self, known: Known, student_img: Tensor, student_txt: Tensor, teacher_img: Tensor, teacher_txt: Tensor
    ) -> None:
        super().__init__()
        width = student_img.shape[-1]
        self.img = nn.Linear(width + teacher_img.shape[-1], width)
        self.txt = nn.Linear(width + teacher_txt.shape[-1], width)

    def forward(
        self,
        student_img: Tensor,
        student_txt: Tensor,
        teacher_img: Tensor,
        teacher_txt: Tensor,
        *,
        scale: Positive = 20.0,
    ) -> Tensor:
        """Return the loss of normalised embeddings [B, D]."""
        weights = (self.img.weight, self.img.bias, self.txt.weight, self.txt.bias)
        return contrastive.clip_afd(student_img, student_txt, teacher_img, teacher_txt, *weights, scale=scale)


class Ctkd(Part):
    """The temperature of :func:`distill.losses.ctkd`, one for all rows: ``lowest + span * sigmoid(parameter)``."""

    def __init__(
        self, known: Known, student: Tensor, teacher: Tensor, *, lowest: Positive = 1.0, span: Positive = 20.0
    ) -> None:
        super().__init__()
        self.lowest, self.span = lowest, span
        self.parameter = nn.Parameter(torch.ones(1))  # of one dimension, as a single number cannot be split

    @property
    def temperature(self) -> Tensor:
        """T, [1]."""
        return self.lowest + self.span * self.parameter.sigmoid()

    def forward(self, student: Tensor, teacher: Tensor, *, strength: AtLeastZero = 1.0) -> Tensor:
        """Return the loss of logits [B, C]; the curriculum is a schedule of ``strength``."""
        return outputs.ctkd(student, teacher, self.temperature, strength=strength)


class Fsp(Part):
    """1x1 convolutions for :func:`distill.losses.fsp`, where a stage of the student has another width."""

    def __init__(self, known: Known, *stages: Tensor) -> None:
        super().__init__()
        need_maps(known, *stages)
        self.projections = nn.ModuleList(
            nn.Conv2d(s.shape[1], t.shape[1], 1) if s.shape[1] != t.shape[1] else nn.Identity()
            for s, t in zip(stages[:2], stages[2:], strict=True)
        )

    def forward(self, *stages: Tensor) -> Tensor:
        """Return the loss of two stages of the student, then two of the teacher."""
        own = [project(upcast(stage)) for project, stage in zip(self.projections, stages[:2], strict=True)]
        return maps.fsp(*own, *stages[2:])


class Review(Part):
    """ReviewKD: each stage, fused with the deeper ones, learns the teacher's (Chen et al. 2021, arXiv 2104.09044).

    From the deepest stage on: a 1x1 convolution with BatchNorm, :func:`distill.losses.review_fusion` with what came
    from deeper ones, the size of the teacher's map, a 3x3 convolution with BatchNorm. The value is the sum of
    :func:`distill.losses.hcl` over stages. As in the authors' code the next stage gets the fused map, not what is
    compared.
    """

    def __init__(self, known: Known, *stages: Tensor, width: Count | None = None) -> None:
        super().__init__()
        need_maps(known, *stages)
        own, theirs = _halves(stages)
        middle = width or min(512, own[-1].shape[1])
        self.laterals = nn.ModuleList(_normed(stage.shape[1], middle, 1) for stage in own)
        self.outs = nn.ModuleList(_normed(middle, stage.shape[1], 3) for stage in theirs)
        self.attentions = nn.ModuleList(nn.Conv2d(2 * middle, 2, kernel_size=1) for _ in own[:-1])

    def forward(self, *stages: Tensor, levels: Sequence[Count] = (4, 2, 1)) -> Tensor:
        """Return the loss of the student's stages, shallow to deep, then the teacher's."""
        own, theirs = _halves(stages)
        fused: Tensor | None = None
        total: list[Tensor] = []
        for number in reversed(range(len(own))):
            here = self.laterals[number](like(own[number], next(self.parameters())))
            if fused is not None:
                attention = self.attentions[number]
                here = maps.review_fusion(here, fused, attention.weight, attention.bias)  # type: ignore[arg-type]
            if here.shape[2:] != theirs[number].shape[2:]:
                here = F.interpolate(here, theirs[number].shape[2:], mode="nearest")
            fused = here
            total.append(maps.hcl(self.outs[number](fused), theirs[number], levels=levels))
        return torch.stack(total).sum()


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """The tensor in the type of a part's weights: a cached teacher's features are halves."""
    return tensor.to(weight.dtype)


def need_maps(known: Known, *tensors: Tensor) -> None:
    """Refuse tensors that are no feature maps."""
    if any(tensor.ndim != 4 for tensor in tensors):
        raise UserError(
            f"term {known.term!r} reads feature maps [B, C, H, W], got {[list(tensor.shape) for tensor in tensors]}; "
            "choose taps of convolutions, without ':mean'"
        )


def need_vectors(known: Known, *tensors: Tensor) -> None:
    """Refuse tensors that are not one vector a row."""
    if any(tensor.ndim != 2 for tensor in tensors):
        raise UserError(
            f"term {known.term!r} reads one vector a row, got {[list(tensor.shape) for tensor in tensors]}; "
            "choose embeddings, or add ':mean' to both taps"
        )


def _mean_of_negatives(teacher: Tensor) -> Tensor:
    """Of each channel of [B, C, H, W], over the rows of all ranks: [C]."""
    ranks, negative = Ranks(), teacher.clamp(max=0)
    found = torch.stack([negative.sum(dim=(0, 2, 3)), (negative < 0).sum(dim=(0, 2, 3)).to(negative)])
    total, count = ranks.sum(found.to(ranks.device)).to(found.device) if ranks.count > 1 else found
    return total / count.clamp(min=1)


def _halves(stages: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return stages[: len(stages) // 2], stages[len(stages) // 2 :]


def _normed(width: int, out: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)  # the authors'
    return nn.Sequential(convolution, _Norm(out))


class _Norm(nn.BatchNorm2d):
    """BatchNorm that takes the averages it has gathered where a channel has one value: that has no variance."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.numel() > input.shape[1]:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
