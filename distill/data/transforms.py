"""Augmentation that can be replayed: a pure function of (seed, row id, view), for whole batches.

The random numbers are a hash, not a stream: what happens to a row does not depend on the batch, the worker or
the rank that it falls into. So the teacher, live or cached, sees what the student sees.
The view ``CLEAN_VIEW`` is never augmented.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from distill.contracts import CLEAN_VIEW
from distill.data.hashing import mix
from distill.data.image_ops import WHITE, colour_matrices, erase, recolour, scale, turning, warp
from distill.data.randaugment import OPERATIONS, randaugment
from distill.data_config import ImageAugment, RandAugment

FILLS = {"white": WHITE, "black": 0}
MID_GREY = 127.5
TRIES = 10  # to find a crop that lies in the image, as in Inception's code and those after it
WIDEST = 4 / 3  # ratio of a crop's sides, either way
ERASED, WIDEST_ERASED = (0.02, 0.33), 10 / 3  # share of the area, and ratio of its sides, as in torchvision and timm


def hash_uniform(seed: int, ids: Tensor, views: Tensor, salt: int | str | Tensor) -> Tensor:
    """Return numbers in [0, 1) that look random and depend on nothing but the arguments, on every platform.

    :func:`~distill.data.hashing.mix` is chained over the arguments.

    Args:
        seed: the run's seed.
        ids: int64 row ids, any shape, on the CPU.
        views: int64 views, broadcastable with ``ids``.
        salt: what the number is for: a name, or int64 values broadcastable with ``ids``.

    Returns:
        float32 tensor of the broadcast shape; multiples of 2**-24.
    """
    state = _hashed(seed, ids, views, salt)
    return torch.from_numpy((state >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def _hashed(seed: int, ids: Tensor, views: Tensor, salt: int | str | Tensor) -> NDArray[np.uint64]:
    purpose = torch.as_tensor(_number(salt) if isinstance(salt, str) else salt)
    state = mix(np.array([seed], dtype=np.uint64))
    for part in (purpose, ids, views):
        state = mix(state ^ part.numpy().astype(np.int64).view(np.uint64))
    return state


def _draws(seed: int, ids: Tensor, views: Tensor, names: Sequence[str]) -> NDArray[np.float32]:
    """Numbers in [0, 1) for each of some purposes, [len(names), B]."""
    return hash_uniform(seed, ids, views, torch.tensor([[_number(name)] for name in names])).numpy()


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())  # 7 bytes are a positive int64


def augment_images(images: Tensor, ids: Tensor, views: Tensor, seed: int, config: ImageAugment) -> Tensor:
    """Crop, flip, shift and turn images, change their colours, and erase a part of them.

    What is asked for comes in this order: crop, flip, shift, rotate, RandAugment, brightness and contrast, saturation
    and hue, erase. A random resized crop (Szegedy et al. 2015, arXiv 1409.4842) has a share of the area that is uniform
    between ``config.crop`` and 1, sides whose ratio is log-uniform between 3/4 and 4/3, and any place in the image. It
    is brought back to the image's size. Where none of ten draws fits, the image stays whole.

    Args:
        images: uint8 [B, 3, S, S] on the CPU; not modified.
        ids: int64 [B] row ids.
        views: int64 [B]; rows of ``CLEAN_VIEW`` come back unchanged.
        seed: the run's seed.
        config: probabilities and strengths; shifts are in pixels and uncover ``fill``.

    Returns:
        uint8 [B, 3, S, S].
    """
    live = views.numpy() != CLEAN_VIEW  # numpy: on so few numbers torch takes longer to start than to compute
    if not live.any():
        return images

    if config.crop < 1:
        images = _crop(images, live, crop_boxes(ids, views, seed, config.crop, images.shape[-1]))
    uniform = _draws(seed, ids, views, ("flip", "down", "right", "brightness", "contrast"))
    if config.flip or config.shift:
        shift = min(config.shift, images.shape[-1])
        flip = live & (uniform[0] < config.flip)
        down, right = np.where(live, (uniform[1:3] * (2 * shift + 1)).astype(np.int64) - shift, 0)
        images = _flip_and_shift(images, flip, down, right, FILLS[config.fill])
    if config.rotate:
        degrees = config.rotate * _around_zero(seed, ids, views, "rotate")
        images = _of_live(images, live, lambda some, rows: warp(some, turning(degrees[rows]), FILLS[config.fill]))
    if config.randaugment is not None:
        images = _randaugmented(images, live, (seed, ids, views), config.randaugment, FILLS[config.fill])
    if config.brightness or config.contrast:
        change = np.where(live, 2 * uniform[3:] - 1, np.float32(0))
        brightness, contrast = 1 + config.brightness * change[0], 1 + config.contrast * change[1]
        images = scale(images, brightness * contrast, MID_GREY * (1 - contrast))
    if config.saturation or config.hue:
        saturation = 1 + config.saturation * _around_zero(seed, ids, views, "saturation")
        matrices = colour_matrices(saturation, config.hue * _around_zero(seed, ids, views, "hue"))
        images = _of_live(images, live, lambda some, rows: recolour(some, matrices[rows]))
    if config.erase:
        erased = live & (_draws(seed, ids, views, ["erase"])[0] < config.erase)
        boxes = np.where(erased, erased_boxes(ids, views, seed, images.shape[-1]), 0)
        images = erase(images, boxes, _hashed(seed, ids, views, "erase noise"))
    return images


def _around_zero(seed: int, ids: Tensor, views: Tensor, name: str) -> NDArray[np.float64]:
    """Numbers in [-1, 1), [B]."""
    return 2 * _draws(seed, ids, views, [name])[0].astype(np.float64) - 1


def _of_live(images: Tensor, live: NDArray[np.bool_], change: Callable[[Tensor, NDArray[np.int64]], Tensor]) -> Tensor:
    """Images of which the live ones are changed: ``(those images, their rows) -> images``."""
    rows = np.flatnonzero(live)
    if len(rows) == len(images):
        return change(images, rows)
    result = images.clone()
    result[rows] = change(images[rows], rows)
    return result


def _randaugmented(
    images: Tensor, live: NDArray[np.bool_], key: tuple[int, Tensor, Tensor], config: RandAugment, fill: int
) -> Tensor:
    names = [f"randaugment {what} {number}" for what in ("operation", "sign") for number in range(config.ops)]
    uniform = _draws(*key, names)
    chosen = np.where(live, (uniform[: config.ops] * len(OPERATIONS)).astype(np.int64), 0)
    sign = np.where(uniform[config.ops :] < 0.5, -1, 1)
    return randaugment(images, chosen, sign, config.magnitude, fill)


def crop_boxes(ids: Tensor, views: Tensor, seed: int, least: float, size: int) -> NDArray[np.int64]:
    """Return the random resized crops of rows, each a function of (seed, id, view).

    Args:
        ids: int64 [B] row ids.
        views: int64 [B].
        seed: the run's seed.
        least: share of the area, in (0, 1].
        size: side of the images, pixels.

    Returns:
        int64 [4, B]: top, left, height and width, inside the images.
    """
    return _boxes((seed, ids, views), "crop", (least, 1), WIDEST, size, otherwise=size)


def erased_boxes(ids: Tensor, views: Tensor, seed: int, size: int) -> NDArray[np.int64]:
    """Return the boxes that random erasing takes out of rows, each a function of (seed, id, view).

    Args:
        ids: int64 [B] row ids.
        views: int64 [B].
        seed: the run's seed.
        size: side of the images, pixels.

    Returns:
        int64 [4, B]: top, left, height and width, inside the images; a height of 0 where none of ten draws fits.
    """
    return _boxes((seed, ids, views), "erase", ERASED, WIDEST_ERASED, size, otherwise=0)


def _boxes(
    key: tuple[int, Tensor, Tensor],
    purpose: str,
    areas: tuple[float, float],
    widest: float,
    size: int,
    *,
    otherwise: int,
) -> NDArray[np.int64]:
    """Boxes [4, B] whose area is uniform and whose ratio of sides is log-uniform: the first draws that fit the image.

    Where none fits, sides are ``otherwise``.
    """
    names = [f"{purpose} {what} {number}" for what in ("area", "ratio") for number in range(TRIES)]
    uniform = _draws(*key, [*names, f"{purpose} top", f"{purpose} left"]).astype(np.float64)
    area = areas[0] + (areas[1] - areas[0]) * uniform[:TRIES]
    ratio = widest ** (2 * uniform[TRIES:-2] - 1)  # of width to height
    sides = np.maximum(1, np.rint(size * np.sqrt(area * np.stack([1 / ratio, ratio])))).astype(np.int64)
    fits = (sides <= size).all(0)  # [TRIES, B]
    chosen = np.take_along_axis(sides, fits.argmax(0)[None, None], axis=1)[:, 0]
    chosen = np.where(fits.any(0), chosen, otherwise)
    corners = (uniform[-2:] * (size - chosen + 1)).astype(np.int64)
    return np.concatenate([corners, chosen])


def _crop(images: Tensor, live: NDArray[np.bool_], boxes: NDArray[np.int64]) -> Tensor:
    """Bring a part of each image to the image's size."""
    result = images.clone()
    for row in np.flatnonzero(live).tolist():
        top, left, height, width = boxes[:, row].tolist()
        result[row] = resize_images(images[row : row + 1, :, top : top + height, left : left + width], images.shape[-1])
    return result


def _flip_and_shift(
    images: Tensor, flip: NDArray[np.bool_], down: NDArray[np.int64], right: NDArray[np.int64], fill: int
) -> Tensor:
    """Move each image as its own slice: twice as fast as one gather over the batch."""
    source = images.numpy()
    result = np.full_like(source, fill)
    size = source.shape[-1]
    steps = zip(flip.tolist(), down.tolist(), right.tolist(), strict=True)
    for row, (mirrored, y, x) in enumerate(steps):
        image = source[row, :, :, ::-1] if mirrored else source[row]
        result[row, :, max(0, y) : size + min(0, y), max(0, x) : size + min(0, x)] = image[
            :, max(0, -y) : size - max(0, y), max(0, -x) : size - max(0, x)
        ]
    return torch.from_numpy(result)


def resize_images(images: Tensor, size: int) -> Tensor:
    """Bring images to another size; each pixel of a smaller one is made from all those that it covers.

    Args:
        images: uint8 [B, 3, H, W], any device.
        size: pixels.

    Returns:
        uint8 [B, 3, size, size].
    """
    pixels = images if images.device.type == "cpu" else images.float()  # only CPUs have the kernel for uint8
    resized = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return resized if resized.dtype == torch.uint8 else resized.round_().clamp_(0, WHITE).to(torch.uint8)


def drop_words(words: Tensor, ids: Tensor, views: Tensor, seed: int, probability: float) -> Tensor:
    """Choose the tokens that stay when words are dropped at random; at least one word of each row stays.

    Whether a word is dropped depends on (seed, id, view, index of the word), so two tokenizers drop the same
    words of a text. (Where one of them truncates the text and all words before the cut are dropped, the word that
    must stay may differ.)

    Args:
        words: int64 or int32 [B, L], index of the word that each token belongs to, -1 for special tokens.
        ids: int64 [B] row ids.
        views: int64 [B]; rows of ``CLEAN_VIEW`` keep everything.
        seed: the run's seed.
        probability: of dropping a word.

    Returns:
        bool [B, L], True where the token stays; always True where ``words`` is -1.
    """
    special = words < 0
    score = hash_uniform(seed, ids[:, None], views[:, None], words.to(torch.int64) + 1)
    score = score.masked_fill(special, -1.0)
    last = score == score.amax(dim=1, keepdim=True)  # the word that stays if all others go
    return special | (score >= probability) | last | (views == CLEAN_VIEW)[:, None]
