"""Integrated gradients inside an input: summed up to what a reader can name, and drawn where there is a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from distill.explain import pictures
from distill.explain.starts import Start
from distill.formats import TABULAR, TEXT

MOST_CELLS, MOST_PIECES = 32, 200  # a side of a written map, and pieces of a written or drawn waveform
FULL_SCALE = 2**15


def condensed(
    modality: str,
    values: list[Tensor],
    inputs: Mapping[str, Tensor],
    starts: Sequence[Start],
    word_of: NDArray[np.int64],
    words: list[str],
    columns: tuple[tuple[str, ...], tuple[str, ...]],
) -> dict[str, Any]:
    """Sums of an input's values that say where they lie; together they are the sum of all.

    Args:
        modality: its name.
        values: of each start, as :class:`~distill.explain.gradients.Integrated` has them.
        inputs: of the row.
        starts: what the values are of.
        word_of: int64 [L], the word of each token, -1 for special ones.
        words: of the text.
        columns: names of the numbers and of the categories of a table.

    Returns:
        ``words``; ``columns``; ``series`` [T, C]; ``frames``; ``pieces`` of a waveform; or ``cells`` of an
        image, rows from the top, or of a spectrogram, bands from the lowest.
    """
    (first, *rest) = values
    if modality == TEXT:
        tokens = first.sum(-1)[: len(word_of)].numpy()
        return {
            "words": [
                {"word": word, "value": float(tokens[word_of == number].sum())} for number, word in enumerate(words)
            ]
        }
    if modality == TABULAR:
        numbers, categories = columns
        sums = (first[: len(numbers)] + first[len(numbers) : 2 * len(numbers)]).tolist()
        sums += rest[0].sum(-1).tolist() if rest else []
        return {"columns": dict(zip((*numbers, *categories), sums, strict=True))}
    if modality == "series":
        return {"series": first[: int(inputs["series_length"])].tolist()}
    if modality == "video":
        return {"frames": first.sum((1, 2, 3)).tolist()}
    if modality == "audio":
        plane = _plane(first, starts[0])
        return {"pieces": pieces(plane).tolist()} if plane.ndim == 1 else {"cells": cells(plane).tolist()}
    return {"cells": cells(first.sum(0)).tolist()}


def drawn(modality: str, values: Tensor, inputs: Mapping[str, Tensor], start: Start) -> Image.Image:
    """A picture of an image's, a clip's, a series' or a sound's values."""
    if modality == "series":
        length = int(inputs["series_length"])
        return pictures.curves(start.value[0, :length].numpy(), values[:length].numpy())
    if modality == "video":
        heats = values.sum(1)
        most = float(heats.abs().max()) or 1.0  # one scale for all frames
        return pictures.beside(
            [
                pictures.over_image(frame.numpy(), heat.numpy(), most)
                for frame, heat in zip(inputs["video"][0], heats, strict=True)
            ]
        )
    if modality == "audio":
        plane = _plane(values, start)
        if plane.ndim == 1:
            length = max(1, int(inputs["audio_length"]))
            wave = inputs["audio"][0, :length].float() / FULL_SCALE
            return pictures.curves(peaks(wave)[:, None].numpy(), pieces(plane[:length])[:, None].numpy())
        levels = _plane(start.value[0], start)
        sounding = plane.any(0).nonzero().flatten()
        end = int(sounding[-1]) + 1 if len(sounding) else plane.shape[1]
        return pictures.heat_map(plane[:, :end].numpy(), levels[:, :end].numpy())
    return pictures.over_image(inputs["image"][0].numpy(), values.sum(0).numpy())


def cells(plane: Tensor) -> Tensor:
    """Sums of the blocks of a plane [H, W], of which there are at most ``MOST_CELLS`` a side."""
    high, wide = (math.ceil(size / MOST_CELLS) for size in plane.shape)
    padded = F.pad(plane, (0, -plane.shape[1] % wide, 0, -plane.shape[0] % high))
    return padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).sum((1, 3))


def pieces(line: Tensor) -> Tensor:
    """Sums of the pieces of a line [S], of which there are at most ``MOST_PIECES``."""
    return _split(line).sum(1)


def peaks(line: Tensor) -> Tensor:
    """The value of each of these pieces that is farthest from 0."""
    parts = _split(line)
    return parts.gather(1, parts.abs().argmax(1, keepdim=True))[:, 0]


def _split(line: Tensor) -> Tensor:
    size = math.ceil(len(line) / MOST_PIECES)
    return F.pad(line, (0, -len(line) % size)).unflatten(0, (-1, size))


def _plane(values: Tensor, start: Start) -> Tensor:
    """A waveform's values [S], or a spectrogram's [bands, T]: front ends differ in which of them comes first."""
    plane = values.squeeze()
    assert isinstance(start.place, nn.Module)
    banks = [bank for module in start.place.modules() if isinstance(bank := getattr(module, "filters", None), Tensor)]
    return plane.T if plane.ndim == 2 and banks and plane.shape[0] != len(banks[0]) else plane
