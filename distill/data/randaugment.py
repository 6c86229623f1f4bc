"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719): some operations of a list for each image, all of one magnitude.

The list and what a magnitude of 30 means are those of torchvision's ``RandAugment``; images are turned, sheared and
moved about their centre.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distill.data.image_ops import (
    WHITE,
    Floats,
    autocontrast,
    colour_matrices,
    equalize,
    mean_luma,
    posterize,
    recolour,
    scale,
    sharpen,
    solarize,
    turning,
    warp,
)

LARGEST = 30  # magnitude
SHEAR, MOVE, TURN, CHANGE, BITS = 0.3, 150 / 331, 30.0, 0.9, 4
"""At the largest magnitude: of the slope, share of the side, degrees, of a factor around 1, bits that are lost."""

Operation = Callable[[Tensor, Floats, int], Tensor]
"""(uint8 images [B, 3, S, S], shares of the largest magnitude [B], some negative; fill) -> images."""


def _matrices(entries: dict[tuple[int, int], Floats], count: int) -> Floats:
    matrices = np.tile(np.eye(2, 3), (count, 1, 1))
    for (row, column), values in entries.items():
        matrices[:, row, column] = values
    return matrices


def _affine(row: int, column: int) -> Operation:
    """A shear, or a shift by whole pixels: one entry of the matrix differs from the identity's."""

    def operation(images: Tensor, share: Floats, fill: int) -> Tensor:
        amount = np.rint(MOVE * images.shape[-1] * share) if column == 2 else SHEAR * share
        return warp(images, _matrices({(row, column): amount}, len(images)), fill)

    return operation


def _contrast(images: Tensor, share: Floats, fill: int) -> Tensor:
    factor = 1 + CHANGE * share
    return scale(images, factor.astype(np.float32), ((1 - factor) * mean_luma(images)).astype(np.float32))


def _brightness(images: Tensor, share: Floats, fill: int) -> Tensor:
    return scale(images, (1 + CHANGE * share).astype(np.float32), np.zeros(len(share), np.float32))


OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, share, fill: images,
    "shear_x": _affine(0, 1),
    "shear_y": _affine(1, 0),
    "translate_x": _affine(0, 2),
    "translate_y": _affine(1, 2),
    "rotate": lambda images, share, fill: warp(images, turning(TURN * share), fill),
    "brightness": _brightness,
    "colour": lambda images, share, fill: recolour(images, colour_matrices(1 + CHANGE * share, 0 * share)),
    "contrast": _contrast,
    "sharpness": lambda images, share, fill: sharpen(images, 1 + CHANGE * share),
    "posterize": lambda images, share, fill: posterize(images, 8 - round(BITS * abs(float(share[0])))),
    "solarize": lambda images, share, fill: solarize(images, WHITE * (1 - abs(float(share[0])))),
    "autocontrast": lambda images, share, fill: autocontrast(images),
    "equalize": lambda images, share, fill: equalize(images),
}
"""In the order by which they are drawn, the one that changes nothing first."""


def randaugment(
    images: Tensor, chosen: NDArray[np.int64], sign: NDArray[np.int64], magnitude: float, fill: int
) -> Tensor:
    """Apply the chosen operations to each image, one after the other.

    Args:
        images: uint8 [B, 3, S, S] on the CPU; not modified.
        chosen: int64 [R, B], numbers of :data:`OPERATIONS`.
        sign: int64 [R, B], 1 or -1: the direction of those that have one.
        magnitude: 0 to ``LARGEST``.
        fill: value of what is uncovered.
    """
    result = images.clone()
    operations = list(OPERATIONS.values())
    for numbers, signs in zip(chosen, sign, strict=True):
        for number in np.unique(numbers[numbers > 0]).tolist():
            rows = np.flatnonzero(numbers == number)
            result[rows] = operations[number](result[rows], magnitude / LARGEST * signs[rows], fill)
    return result
