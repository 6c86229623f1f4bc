"""Changes of uint8 images, a batch at a time and each image by its own strength.

What happens to an image depends on it and its strength alone, not on the batch around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

WHITE = 255
AT_ONCE = 16  # images whose float values the processor's cache holds
LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue, ITU-R BT.601
YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
RGB = np.linalg.inv(YIQ)
Floats = NDArray[np.floating]


def chunks(num_rows: int) -> Iterator[slice]:
    """Yield slices of as many images as are computed at once."""
    return (slice(first, first + AT_ONCE) for first in range(0, num_rows, AT_ONCE))


def scale(images: Tensor, factor: Floats, offset: Floats) -> Tensor:
    """Change pixels to ``factor * pixel + offset``, rounded; through numpy, whose cast to uint8 is vectorised.

    Args:
        images: uint8 [B, 3, S, S].
        factor: float32 [B], or [B, 3] of channels.
        offset: as ``factor``.
    """
    source, factors = images.numpy(), factor.reshape(len(factor), -1, 1, 1)
    offsets = offset.reshape(len(offset), -1, 1, 1) + np.float32(0.5)  # the cast rounds down
    result = np.empty_like(source)
    values = np.empty((AT_ONCE, *source.shape[1:]), np.float32)
    for some in chunks(len(source)):
        block = values[: len(source[some])]
        np.multiply(source[some], factors[some], out=block)
        block += offsets[some]
        np.clip(block, 0, WHITE, out=block)
        result[some] = block
    return torch.from_numpy(result)


def _computed(images: Tensor, change: Callable[[NDArray[np.float32], slice], NDArray[np.float32]]) -> Tensor:
    """What ``change`` makes of images as float32, rounded; some images at a time."""
    source = images.numpy()
    result = np.empty_like(source)
    for some in chunks(len(source)):
        result[some] = np.clip(change(source[some].astype(np.float32), some) + np.float32(0.5), 0, WHITE)
    return torch.from_numpy(result)


def warp(images: Tensor, matrices: Floats, fill: int) -> Tensor:
    """Read each image at other places, between pixels in proportion (bilinear).

    Args:
        images: uint8 [B, 3, S, S].
        matrices: [B, 2, 3]: pixel (x, y), counted from the centre, is read at ``matrix @ (x, y, 1)``.
        fill: value outside of the image.
    """
    size = images.shape[-1]
    places = (np.arange(size) - (size - 1) / 2).astype(np.float32)
    rows = matrices.astype(np.float32)[:, :, :, None, None]
    across, down = places[None, None, :], places[None, :, None]

    def read(block: NDArray[np.float32], some: slice) -> NDArray[np.float32]:
        at = [rows[some, axis, 0] * across + rows[some, axis, 1] * down + rows[some, axis, 2] for axis in (0, 1)]
        grid = torch.from_numpy(np.stack(at, axis=-1) * np.float32(2 / size))
        found = F.grid_sample(torch.from_numpy(block - fill), grid, "bilinear", "zeros", align_corners=False)
        return found.numpy() + np.float32(fill)

    return _computed(images, read)


def turning(degrees: Floats) -> Floats:
    """Return matrices for :func:`warp` that turn images counterclockwise, [B, 2, 3]."""
    angle = np.deg2rad(degrees)
    zero = np.zeros_like(angle)
    rows = [[np.cos(angle), -np.sin(angle), zero], [np.sin(angle), np.cos(angle), zero]]
    return np.moveaxis(np.array(rows), -1, 0)


def recolour(images: Tensor, matrices: Floats) -> Tensor:
    """Multiply the colour of each pixel with its image's matrix [B, 3, 3]."""
    weights = matrices.astype(np.float32)[:, :, :, None, None]

    def mixed(block: NDArray[np.float32], some: slice) -> NDArray[np.float32]:
        red, green, blue = (block[:, None, channel] for channel in range(3))
        own = weights[some]
        return own[:, :, 0] * red + own[:, :, 1] * green + own[:, :, 2] * blue

    return _computed(images, mixed)


def colour_matrices(saturation: Floats, turn: Floats) -> Floats:
    """Return matrices for :func:`recolour`, [B, 3, 3], which keep the luma.

    Args:
        saturation: [B], 0 for grey, 1 for no change.
        turn: [B], of the hue, share of the colour circle (the chroma plane of YIQ).
    """
    angle = 2 * np.pi * turn
    chroma = np.zeros((len(angle), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(angle)
    chroma[:, 2, 1] = saturation * np.sin(angle)
    chroma[:, 1, 2] = -chroma[:, 2, 1]
    return np.asarray(RGB @ chroma @ YIQ)


def mean_luma(images: Tensor) -> Floats:
    """Return the mean brightness of images, 0 to 255, [B]."""
    channels = images.numpy().sum(axis=(2, 3), dtype=np.int64)  # whole numbers: exact in any order
    return (channels * LUMA).sum(1) / max(1, images.shape[-1] * images.shape[-2])


def sharpen(images: Tensor, factor: Floats) -> Tensor:
    """Move images away from their smoothed selves, or towards them: 0 for smooth, 1 for no change, [B].

    Pixels at the edge stay. Smooth is the mean of 3 x 3 pixels, of which the middle one counts five times, as in PIL.
    """
    factors = factor.astype(np.float32).reshape(-1, 1, 1, 1)

    def moved(block: NDArray[np.float32], some: slice) -> NDArray[np.float32]:
        size, smooth = block.shape[-1], block.copy()
        inside = smooth[:, :, 1:-1, 1:-1]
        inside *= 4
        for down in range(3):
            for right in range(3):
                inside += block[:, :, down : size - 2 + down, right : size - 2 + right]
        inside /= 13
        return smooth + factors[some] * (block - smooth)

    return _computed(images, moved)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to 0 to 255; one of a single value stays."""
    flat = images.numpy().reshape(*images.shape[:2], -1)
    low, high = flat.min(-1).astype(np.float32), flat.max(-1).astype(np.float32)
    flat_ones = high == low
    factor = np.where(flat_ones, 1, WHITE / np.maximum(1, high - low)).astype(np.float32)
    return scale(images, factor, np.where(flat_ones, 0, -low * factor).astype(np.float32))


def equalize(images: Tensor) -> Tensor:
    """Give each channel a flat histogram, by PIL's arithmetic."""
    flat = images.numpy().reshape(images.shape[0] * images.shape[1], -1)
    rows = np.arange(len(flat))[:, None]
    counts = np.bincount((flat + 256 * rows).ravel(), minlength=256 * len(flat)).reshape(-1, 256)
    last = np.take_along_axis(counts, 255 - (counts[:, ::-1] > 0).argmax(1)[:, None], axis=1)
    step = (flat.shape[1] - last) // WHITE
    table = (np.cumsum(counts, axis=1) - counts + step // 2) // np.maximum(1, step)
    table = np.where(step == 0, np.arange(256), table).clip(0, WHITE).astype(np.uint8)
    return torch.from_numpy(table[rows, flat].reshape(images.shape))


def posterize(images: Tensor, bits: int) -> Tensor:
    """Keep the highest bits of each pixel."""
    return images & (WHITE - (WHITE >> bits))


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the pixels from a value on."""
    return torch.where(images >= math.ceil(threshold), WHITE - images, images)  # whole: no pixel becomes a float


def erase(images: Tensor, boxes: NDArray[np.int64], keys: NDArray[np.uint64]) -> Tensor:
    """Fill a box of each image with random values (Zhong et al. 2017, arXiv 1708.04896).

    Args:
        images: uint8 [B, 3, S, S]; not modified.
        boxes: int64 [4, B]: top, left, height and width; a height of 0 erases nothing.
        keys: uint64 [B], from which the values follow: Philox's raw stream, which is the same in all versions.
    """
    result = images.numpy().copy()
    for row in np.flatnonzero(boxes[2]).tolist():
        top, left, height, width = boxes[:, row].tolist()
        count = 3 * height * width
        noise = np.random.Philox(key=int(keys[row])).random_raw(-(-count // 8)).view(np.uint8)[:count]
        result[row, :, top : top + height, left : left + width] = noise.reshape(3, height, width)
    return torch.from_numpy(result)
