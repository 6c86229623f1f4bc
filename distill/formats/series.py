"""Series of numbers over time, of one or more channels: sensors, measurements, prices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.formats.base import Arrays, BadInput, Content, Format, check_content, opened, reason

MAX_BYTES = 2**28
"""Largest file that is read: one series of 33 million numbers."""
LEAST_STD = 1e-6  # of a channel, below which it is constant


@dataclass(frozen=True)
class SeriesFormat(Format):
    """Series of one length; of a longer one the first ``steps`` count.

    Attributes:
        channels: numbers a step.
        steps: length.
        mean: of each channel over the training rows; none before these are known.
        std: standard deviation of each channel there.
    """

    channels: int
    steps: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As :attr:`Format.arrays`."""
        return {"series": ("float32", (self.steps, self.channels)), "series_length": ("int64", ())}

    @property
    def parameters(self) -> dict[str, int]:
        """As :attr:`Format.parameters`."""
        return {"channels": self.channels, "num_steps": self.steps}

    def read(self, value: Any) -> Arrays:
        """Read [T, C] numbers, or [T] of one channel: a list, an array, or a ``.npy`` or ``.csv`` file.

        A CSV file has a line a step, and may have a header. Once ``mean`` is known, numbers are standardised.
        """
        found = _numbers(value)
        found = found[:, None] if found.ndim == 1 else found
        if found.ndim != 2 or found.shape[1] != self.channels:
            raise BadInput(f"series of shape {list(found.shape)}; expected [steps, {self.channels}] (data.series)")
        if not len(found):
            raise BadInput("series of length 0; it holds no step")
        if not np.isfinite(found).all():
            step, channel = np.argwhere(~np.isfinite(found))[0].tolist()
            raise BadInput(f"series holds {found[step, channel]} at step {step}, channel {channel}; fill the gap")
        length = min(len(found), self.steps)
        whole = np.zeros((self.steps, self.channels), np.float32)
        whole[:length] = self._standardised(found[:length])
        return {"series": whole, "series_length": np.array(length, np.int64)}

    def fit(self, parts: Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]) -> SeriesFormat:
        """Return the format with the mean and standard deviation of each channel of raw series.

        Args:
            parts: some series at a time, float32 [B, T, C], with the steps that are there, int64 [B]; those of length 0
                do not count.
        """
        count, mean, squares = 0, np.zeros(self.channels), np.zeros(self.channels)
        for series, lengths in parts:
            values = series[np.arange(self.steps) < lengths[:, None]].astype(np.float64)  # [steps there, C]
            if len(values):
                far, total = values.mean(0) - mean, count + len(values)
                squares += ((values - values.mean(0)) ** 2).sum(0) + far**2 * (count * len(values) / total)
                mean, count = mean + far * (len(values) / total), total
        std = np.sqrt(squares / max(1, count))
        spread = np.where(std > LEAST_STD * np.maximum(1, np.abs(mean)), std, 1.0)
        return replace(self, mean=tuple(mean.tolist()), std=tuple(spread.tolist()))

    def standardise(self, series: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Standardise raw series [N, T, C]; what lies behind their ends stays zero."""
        there = np.arange(self.steps) < lengths[:, None]
        return np.where(there[:, :, None], self._standardised(series), np.float32(0))

    def _standardised(self, values: NDArray[Any]) -> NDArray[np.float32]:
        stored = values.astype(np.float32)  # as training has them before it knows the mean
        if not self.mean:
            return stored
        return ((stored - np.array(self.mean)) / np.array(self.std)).astype(np.float32)


def _numbers(value: Any) -> NDArray[np.float64]:
    if isinstance(value, bytes | str) or hasattr(value, "__fspath__"):
        return _from_file(check_content(value, "series"))
    try:
        found = np.asarray(value)
        if found.dtype == object:  # missing numbers come as None
            found = np.array(value, np.float64)
        if found.dtype.kind not in "iufb":
            raise TypeError(f"it holds {found.dtype}")
        return found.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise BadInput(f"not a series of numbers ({reason(error)})") from error


def _from_file(content: Content) -> NDArray[np.float64]:
    try:
        if not isinstance(content, bytes):
            with open(content, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise BadInput(f"series file above the limit of {MAX_BYTES} bytes")
        if content.startswith(b"\x93NUMPY"):
            return np.asarray(np.load(opened(content), allow_pickle=False), np.float64)
        return _from_csv(content.decode("utf-8-sig"))
    except BadInput:
        raise
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise BadInput(f"not a series of numbers ({reason(error)})") from error


def _from_csv(text: str) -> NDArray[np.float64]:
    lines = [line for line in text.splitlines() if line.strip()]
    rows = [line.replace(";", ",").replace("\t", ",").split(",") for line in lines]
    try:
        first = [[float(cell) for cell in rows[0]]] if rows else []
    except ValueError:
        first = []  # a header
    found = first + [[float(cell) for cell in row] for row in rows[1:]]
    if len({len(row) for row in found}) > 1:
        raise BadInput("not a series of numbers (its lines differ in how many they hold)")
    return np.array(found, np.float64)
