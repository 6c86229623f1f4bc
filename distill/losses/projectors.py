"""Projectors: they bring a student's feature to the shape of the teacher's, so that a loss can compare their numbers.

A projector belongs to a term, is built from one example of both features, learns with the student and stays behind with
the objective. Which pair gives which:

===============  ===================  ====================================================================
student          teacher              projector
===============  ===================  ====================================================================
any              of the same shape    none
vector, tokens   of another width     linear (the regressor of Romero et al. 2015, arXiv 1412.6550)
map, attentions  of other channels    1x1 convolution
map, tokens      vector               mean over positions; linear where widths differ
map              map of another size  resampled; linear over channels where widths differ
image tokens     more or fewer        the grid of patches is resampled, tokens before it keep their places
image map        image tokens         resampled, linear; tokens before the grid are linear in the mean
image tokens     image map            the grid of patches as a map, resampled, linear
image tokens     tokens, no grid      a learned mixture of tokens; linear where widths differ; or reversed
other sequences  longer or shorter    resampled along the sequence; linear where widths differ
tokens of texts  more or fewer        refused: they were cut in other ways
vector           any other            refused: it says nothing of positions
attentions       of another length    refused, as are attentions beside anything else
===============  ===================  ====================================================================

Too many positions are averaged over cells, as in RepDistiller (Tian et al. 2020, arXiv 1910.10699). Too few are
interpolated linearly, apart from what stands before them, as position embeddings of patches are (Dosovitskiy et al.
2021, arXiv 2010.11929, section 3.2). Layouts are guessed by :mod:`distill.layouts`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.contracts import UserError
from distill.layouts import IMAGE, Grid, arranged, grid_of, layout_of, width_of

SPREAD = ("map", "map_last", "tokens")
"""Layouts with positions."""


def build_projector(term: str, student: Tensor, teacher: Tensor, modality: str | None) -> nn.Module | None:
    """The projector from the student's feature to the teacher's; None where shapes are equal.

    Args:
        term: name of the term, for the message.
        student: an example, rows first.
        teacher: an example.
        modality: whose encoders both belong to; None where there is no such one.

    Raises:
        UserError: none fits.
    """
    ours, theirs = student.shape[1:], teacher.shape[1:]
    if ours == theirs:
        return None
    one, other = layout_of(student, modality), layout_of(teacher, modality)
    if one == other and one in ("vector", "tokens", "map_last") and ours[:-1] == theirs[:-1]:
        return nn.Linear(ours[-1], theirs[-1])
    if len(ours) == len(theirs) == 3 and "map_last" not in (one, other) and ours[1:] == theirs[1:]:
        return nn.Conv2d(ours[0], theirs[0], kernel_size=1)
    if one in SPREAD and other == "vector":
        return _behind(Mean(modality), width_of(student, modality), theirs[-1])
    if one in SPREAD and other in SPREAD:
        found = _between_positions(student, teacher, modality)
        if found is not None:
            return found
    raise UserError(
        f"term {term!r}: no projector fits features of shapes {list(ours)} and {list(theirs)}: "
        f"{_why(one, other, modality)}; choose taps of equal layout (`distill inspect` lists them)"
    )


def _between_positions(student: Tensor, teacher: Tensor, modality: str | None) -> nn.Module | None:
    """A projector between maps or tokens; None where nothing says how their positions go together."""
    grids = grid_of(student, modality), grid_of(teacher, modality)
    if all(grids):
        return Regrid(student, teacher, modality)
    if modality in (None, "text") or not student.ndim == teacher.ndim == 3:
        return None
    length = teacher.shape[1]
    first = Mixture(student.shape[1], length) if modality == IMAGE else Stretch(length)
    return _behind(first, student.shape[2], teacher.shape[2])


def _why(one: str, other: str, modality: str | None) -> str:
    if one == "vector" and other in SPREAD:
        return "a vector says nothing of positions (add ':mean' to the teacher's tap)"
    if "attention" in (one, other):
        return "attentions go with those of as many tokens alone"
    if one in SPREAD and other in SPREAD:
        if modality == "text":
            return "texts are cut into other tokens (use one tokenizer and max_length, or ':mean' taps)"
        whose = "of no one modality" if modality is None else "of no known grid"
        return f"positions {whose} do not go together (add ':mean' to both taps)"
    return "this is none of vector, tokens, map and attentions"


def _behind(first: nn.Module, width: int, wanted: int) -> nn.Module:
    """A module with a linear layer behind it, where widths differ."""
    return first if width == wanted else nn.Sequential(first, nn.Linear(width, wanted))


class Mean(nn.Module):
    """The mean over positions: [B, C, H, W], [B, H, W, C] or [B, T, D] to [B, D]."""

    def __init__(self, modality: str | None) -> None:
        super().__init__()
        self.modality = modality

    def forward(self, feature: Tensor) -> Tensor:
        """Return [B, D]."""
        return arranged(feature, "mean", self.modality)


class Stretch(nn.Module):
    """Another number of tokens in the same order: [B, T, D] to [B, wanted, D]."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted

    def forward(self, tokens: Tensor) -> Tensor:
        """Average tokens, or interpolate between them."""
        if tokens.shape[1] > self.wanted:
            return F.adaptive_avg_pool1d(tokens.mT, self.wanted).mT
        return F.interpolate(tokens.mT, self.wanted, mode="linear", align_corners=False).mT


class Mixture(nn.Module):
    """Tokens without an order that is known, each a learned mixture of the given ones: [B, T, D] to [B, wanted, D]."""

    def __init__(self, given: int, wanted: int) -> None:
        super().__init__()
        self.linear = nn.Linear(given, wanted)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix."""
        return self.linear(tokens.mT).mT


class Regrid(nn.Module):
    """From one grid of positions to another, each a map, channels first or last, or tokens with others before them.

    Widths are brought together by one linear layer for all positions, which is there too where a map meets tokens: what
    a convolution and a transformer say is of another scale and sign. Tokens before the teacher's grid that the student
    has not are linear in the mean of its positions.

    Args:
        student: an example.
        teacher: an example.
        modality: of both.
    """

    def __init__(self, student: Tensor, teacher: Tensor, modality: str | None) -> None:
        super().__init__()
        given, wanted = grid_of(student, modality), grid_of(teacher, modality)
        assert given is not None and wanted is not None
        width, theirs = width_of(student, modality), width_of(teacher, modality)
        self.modality, self.wanted = modality, wanted
        self.layout = layout_of(teacher, modality)
        self.kept, self.missing = min(given.before, wanted.before), max(0, wanted.before - given.before)
        learns = width != theirs or student.ndim != teacher.ndim
        self.linear = nn.Linear(width, theirs) if learns else nn.Identity()
        self.before = nn.Linear(width, self.missing * theirs) if self.missing else nn.Identity()

    def forward(self, feature: Tensor) -> Tensor:
        """Return the student's feature in the teacher's shape."""
        grid = arranged(feature, "map", self.modality)
        positions = self.linear(_resampled(grid, self.wanted).flatten(2).mT)
        if self.layout != "tokens":
            found = positions.unflatten(1, (self.wanted.height, self.wanted.width))
            return found if self.layout == "map_last" else found.movedim(-1, 1)
        parts = [self.linear(feature[:, : self.kept])] if self.kept else []
        if self.missing:
            parts.append(self.before(grid.mean(dim=(2, 3))).unflatten(1, (self.missing, -1)))
        return torch.cat([*parts, positions], dim=1)


def _resampled(maps: Tensor, wanted: Grid) -> Tensor:
    """[B, C, H, W] at another height and width: averaged where it has more, interpolated where it has fewer."""
    size = (wanted.height, wanted.width)
    smaller = (min(size[0], maps.shape[2]), min(size[1], maps.shape[3]))
    if smaller != tuple(maps.shape[2:]):
        maps = F.adaptive_avg_pool2d(maps, smaller)
    return maps if smaller == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)
