"""How the numbers of a feature lie, told from its shape: a vector a row, tokens, a map, or attentions.

Any module of any model may be tapped, so there is nobody to ask. What is guessed here holds for the image models of
timm and transformers: images are square, patches stand in rows behind class tokens and registers, and a map whose first
two sizes are equal has its channels last (Swin, MambaOut).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from torch import Tensor

Layout = Literal["vector", "tokens", "map", "map_last", "attention", "other"]
"""[B, D]; [B, T, D]; [B, C, H, W]; [B, H, W, C]; [B, A, L, L] of A heads, rows adding up to 1; anything else."""
Arrangement = Literal["as_is", "map", "last", "mean"]
"""What a loss wants: any layout; maps [B, C, H, W]; the width last, [B, T, D] or [B, D]; one vector a row, [B, D]."""
BEFORE = (0, 1, 2, 5)
"""Tokens before the patches: none, a class token, DeiT's for distillation beside it, or four registers (DINOv2)."""
IMAGE = "image"
OWNED = {"encoders": 1, "necks": 1, "token_necks": 1, "embedders": 1, "unimodal_heads": 2}
"""Part of a model that has a module for each modality -> the step of a path that names it."""


class Grid(NamedTuple):
    """Where the positions of a feature lie.

    Attributes:
        height: in positions.
        width: in positions.
        before: tokens that stand before them.
    """

    height: int
    width: int
    before: int


def modality_of(path: str) -> str | None:
    """The modality of a tap that belongs to one, such as "image" of ``encoders.image.stages``."""
    steps = path.partition(":")[0].split(".")
    steps = steps[2:] or steps if steps[0] == "others" else steps  # of an ensemble's further members
    place = OWNED.get(steps[0])
    return steps[place] if place is not None and place < len(steps) else None


def layout_of(feature: Tensor, modality: str | None) -> Layout:
    """The layout of a feature, by its shape; attentions are told from maps by their values."""
    if feature.ndim == 4:
        if _is_attention(feature):
            return "attention"
        return "map_last" if _channels_last(feature, modality) else "map"
    return {2: "vector", 3: "tokens"}.get(feature.ndim, "other")  # type: ignore[return-value]


def grid_of(feature: Tensor, modality: str | None) -> Grid | None:
    """Where the positions of a map or of an image's tokens lie; None where there is no grid."""
    if feature.ndim == 4:
        height, width = feature.shape[1:3] if _channels_last(feature, modality) else feature.shape[2:]
        return Grid(height, width, 0)
    if feature.ndim != 3 or modality != IMAGE:
        return None
    for before in BEFORE:
        side = math.isqrt(max(0, feature.shape[1] - before))
        if side and side * side + before == feature.shape[1]:
            return Grid(side, side, before)
    return None


def width_of(feature: Tensor, modality: str | None) -> int:
    """D or C of a feature."""
    first = feature.ndim == 4 and not _channels_last(feature, modality)
    return feature.shape[1 if first else -1]


def arranged(feature: Tensor, arrangement: Arrangement, modality: str | None) -> Tensor:
    """A feature as a loss wants it; one of another layout stays, for the loss to refuse.

    Tokens that stand before a grid are no part of its map, and part of a mean.
    """
    if arrangement == "as_is" or feature.ndim not in (3, 4):
        return feature
    last = _channels_last(feature, modality)
    if arrangement == "map":
        grid = grid_of(feature, modality) if feature.ndim == 3 else None
        if grid is not None:
            return feature[:, grid.before :].mT.unflatten(2, (grid.height, grid.width))
        return feature.movedim(-1, 1) if last else feature
    if arrangement == "mean":
        return feature.mean(dim=1 if feature.ndim == 3 else (1, 2) if last else (2, 3))
    if feature.ndim == 3:
        return feature
    return feature.flatten(1, 2) if last else feature.flatten(2).mT


def _channels_last(feature: Tensor, modality: str | None) -> bool:
    if feature.ndim != 4 or modality != IMAGE:
        return False
    one, two, three = feature.shape[1:]
    return one == two != three


def _is_attention(feature: Tensor) -> bool:
    length = feature.shape[-1]
    if length != feature.shape[-2] or length == 1 or not len(feature) or bool((feature < 0).any()):
        return False
    sums = feature.sum(dim=-1)
    whole = (sums - 1).abs() < 1e-2
    return bool(whole.any()) and bool((whole | (sums == 0)).all())  # rows without the modality are zero
