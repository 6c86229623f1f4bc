"""Augmentation of every modality but text, for whole batches: a pure function of (seed, row id, view).

Images are changed in :mod:`distill.data.transforms`, words are dropped where tokens are. Sounds are changed as
waves and not as spectrograms, so that models with spectrograms of their own hear the same.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.contracts import CLEAN_VIEW
from distill.data.hashing import mix
from distill.data.transforms import augment_images, hash_uniform
from distill.data_config import AudioAugment as AudioChanges
from distill.data_config import AugmentConfig, SeriesAugment, TabularAugment
from distill.formats.audio import FULL_SCALE

Inputs = dict[str, Tensor]
Rows = tuple[Tensor, Tensor, int]
"""Ids and views, int64 [B], and the seed."""


def augment(
    modality: str, inputs: Inputs, ids: Tensor, views: Tensor, seed: int, config: AugmentConfig, numbers: int = 0
) -> Inputs:
    """Return a modality's inputs changed; rows of ``CLEAN_VIEW`` stay as they are.

    Args:
        modality: image, video, audio, series or tabular.
        inputs: of the modality, as :data:`~distill.contracts.INPUTS` has them, on the CPU; not modified.
        ids: int64 [B] row ids.
        views: int64 [B].
        seed: the run's seed.
        config: strengths.
        numbers: columns of numbers of records.
    """
    if modality == "image":
        return {"image": augment_images(inputs["image"], ids, views, seed, config.image)}
    live = (views != CLEAN_VIEW).numpy()
    own = getattr(config, modality)
    if own == type(own)() or not live.any():
        return inputs
    if modality == "video":
        frames = inputs["video"].shape[1]
        flat, repeated = inputs["video"].flatten(0, 1), (ids.repeat_interleave(frames), views.repeat_interleave(frames))
        return {"video": augment_images(flat, *repeated, seed, own).unflatten(0, (-1, frames))}
    rows = (ids, views, seed)
    if modality == "tabular":
        return _kept(_tabular(inputs, rows, own, numbers), inputs, live)
    return _kept((_audio if modality == "audio" else _series)(inputs, rows, own), inputs, live)


def _kept(changed: Inputs, inputs: Inputs, live: NDArray[np.bool_]) -> Inputs:
    """What changed, in live rows alone."""
    rows = torch.from_numpy(live)
    return {
        name: torch.where(rows.view(-1, *[1] * (value.ndim - 1)), changed[name], value)
        for name, value in inputs.items()
    }


def _uniform(rows: Rows, purpose: str) -> NDArray[np.float64]:
    ids, views, seed = rows
    return hash_uniform(seed, ids, views, purpose).numpy().astype(np.float64)


def _noise(rows: Rows, purpose: str, size: int) -> NDArray[np.float64]:
    """White noise of standard deviation 1, [B, size]: Philox's raw stream, which is the same in all versions."""
    state = mix(np.array([rows[2]], np.uint64) ^ np.uint64(sum(purpose.encode())))
    for part in rows[:2]:
        state = mix(state ^ part.numpy().view(np.uint64))
    words = [np.random.Philox(key=int(key)).random_raw(-(-size // 4)).view(np.uint16)[:size] for key in state]
    return (np.stack(words) + 0.5) * (np.sqrt(12) / 2**16) - np.sqrt(3)


def _audio(inputs: Inputs, rows: Rows, config: AudioChanges) -> Inputs:
    """Shift in time, noise, loudness, and SpecAugment's masks (Park et al. 2019, arXiv 1904.08779) on the wave."""
    waves, lengths = inputs["audio"].numpy().astype(np.float64), inputs["audio_length"].numpy()
    size = waves.shape[1]
    if config.shift:
        offsets = ((2 * _uniform(rows, "shift") - 1) * config.shift * size).astype(np.int64)
        waves, lengths = _shifted(waves, lengths, np.maximum(offsets, -(lengths // 2)))
    there = np.arange(size) < lengths[:, None]
    if config.noise:
        loudness = np.sqrt((waves**2).sum(1) / np.maximum(1, lengths))
        amplitude = loudness * config.noise * _uniform(rows, "noise")
        waves = waves + amplitude[:, None] * _noise(rows, "noise", size)
    if config.band_mask:
        waves = _without_band(waves, _uniform(rows, "band"), config.band_mask * _uniform(rows, "band width"))
    if config.time_mask:
        width = config.time_mask * _uniform(rows, "mask width") * lengths
        start = _uniform(rows, "mask") * (lengths - width)
        places = np.arange(size)
        there = there & ~((places >= start[:, None]) & (places < (start + width)[:, None]))
    if config.gain:
        waves = waves * 10 ** (config.gain * (2 * _uniform(rows, "gain") - 1) / 20)[:, None]
    samples = np.rint(np.clip(np.where(there, waves, 0), -FULL_SCALE, FULL_SCALE)).astype(np.int16)
    return {"audio": torch.from_numpy(samples), "audio_length": torch.from_numpy(lengths)}


def _shifted(
    waves: NDArray[np.float64], lengths: NDArray[np.int64], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Waves that begin later, or lack their first samples."""
    size, result = waves.shape[1], np.zeros_like(waves)
    for row, offset in enumerate(offsets.tolist()):
        result[row, max(0, offset) : size + min(0, offset)] = waves[row, max(0, -offset) : size - max(0, offset)]
    return result, np.where(lengths > 0, np.minimum(lengths + offsets, size), 0)


def _without_band(
    waves: NDArray[np.float64], place: NDArray[np.float64], width: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Take a band out of each wave; place and width are shares of the mel scale up to half the sampling rate."""
    spectrum = np.fft.rfft(waves)
    pitch = np.log1p(np.linspace(0, 1, spectrum.shape[1]) * 11.4) / np.log1p(11.4)  # 8 kHz are 11.4 times 700 Hz
    low = place * (1 - width)
    inside = (pitch >= low[:, None]) & (pitch < (low + width)[:, None])
    return np.fft.irfft(np.where(inside, 0, spectrum), waves.shape[1])


def _series(inputs: Inputs, rows: Rows, config: SeriesAugment) -> Inputs:
    """A window that is stretched, other scales, and noise (Um et al. 2017, arXiv 1706.00527)."""
    values, lengths = inputs["series"].numpy().astype(np.float64), inputs["series_length"].numpy()
    steps, channels = values.shape[1:]
    if config.window < 1:
        share = config.window + (1 - config.window) * _uniform(rows, "window")
        values = _stretched(values, lengths, share, _uniform(rows, "start"))
    if config.scale:
        factors = [1 + config.scale * (2 * _uniform(rows, f"scale {channel}") - 1) for channel in range(channels)]
        values = values * np.stack(factors, axis=1)[:, None]
    if config.jitter:
        values = values + config.jitter * _noise(rows, "jitter", steps * channels).reshape(values.shape)
    there = np.arange(steps) < lengths[:, None]
    return {
        "series": torch.from_numpy(np.where(there[:, :, None], values, 0).astype(np.float32)),
        "series_length": inputs["series_length"],
    }


def _stretched(
    values: NDArray[np.float64], lengths: NDArray[np.int64], share: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A part of each series, read at as many places as it had steps; between steps, in proportion."""
    last = np.maximum(0, lengths - 1)[:, None]
    first = start[:, None] * (1 - share[:, None]) * last
    places = np.minimum(first + np.arange(values.shape[1]) * share[:, None], last)
    below = places.astype(np.int64)
    weight = (places - below)[:, :, None]
    lower, upper = (np.take_along_axis(values, at[:, :, None], axis=1) for at in (below, np.minimum(below + 1, last)))
    return lower * (1 - weight) + upper * weight


def _tabular(inputs: Inputs, rows: Rows, config: TabularAugment, numbers: int) -> Inputs:
    """Values that count as missing."""
    values = inputs["tabular"].clone()
    columns = values.shape[1] - numbers
    lost = torch.from_numpy(np.stack([_uniform(rows, f"drop {column}") for column in range(columns)], axis=1))
    dropped = lost < config.drop
    values[:, :numbers][dropped[:, :numbers]] = 0
    values[:, numbers : 2 * numbers][dropped[:, :numbers]] = 1
    values[:, 2 * numbers :][dropped[:, numbers:]] = 0
    return {"tabular": values}
