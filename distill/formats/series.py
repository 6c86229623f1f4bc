"""Series of numbers over time, of one or more channels: sensors, measurements, prices."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from distill.formats.base import Arrays, BadInput, Content, Format, check_content, opened, reason

MAX_BYTES = 2**26
"""Largest array that is read: one series of eight million numbers."""
MAX_LINE = 2**20  # bytes of a step
NPY = b"\x93NUMPY"
NUMBERS = "iufb"  # kinds of dtypes
LEAST_STD = 1e-7  # share of a channel's mean, below which it is constant


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

    def doubt(self, arrays: Arrays) -> str:
        """As :meth:`Format.doubt`: no channel ever changes."""
        steps = arrays["series"][: int(arrays["series_length"])]
        return "constant" if len(steps) > 1 and bool((steps == steps[:1]).all()) else ""

    def read(self, value: Any) -> Arrays:
        """Read [T, C] numbers, or [T] of one channel: a list, an array, or a ``.npy`` or ``.csv`` file.

        A CSV file has a line a step, and may have a header. Once ``mean`` is known, numbers are standardised.
        """
        with np.errstate(over="ignore"):
            found = _numbers(value, self.steps).astype(np.float32)  # as training has them before it knows the mean
        found = found[:, None] if found.ndim == 1 else found
        if found.ndim != 2 or found.shape[1] != self.channels:
            raise BadInput(f"series of shape {list(found.shape)}; expected [steps, {self.channels}] (data.series)")
        if not len(found):
            raise BadInput("series of length 0; it holds no step")
        found = found[: self.steps]
        if not np.isfinite(found).all():
            step, channel = np.argwhere(~np.isfinite(found))[0].tolist()
            raise BadInput(f"series holds {found[step, channel]} at step {step}, channel {channel}; fill the gap")
        length = len(found)
        whole = np.zeros((self.steps, self.channels), np.float32)
        whole[:length] = self._standardised(found)
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
        spread = np.where(std > LEAST_STD * np.abs(mean), std, 1.0)
        return replace(self, mean=tuple(mean.tolist()), std=tuple(spread.tolist()))

    def standardise(self, series: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Standardise raw series [N, T, C]; what lies behind their ends stays zero."""
        there = np.arange(self.steps) < lengths[:, None]
        return np.where(there[:, :, None], self._standardised(series), np.float32(0))

    def _standardised(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self.mean:
            return values
        return ((values - np.array(self.mean)) / np.array(self.std)).astype(np.float32)


def _numbers(value: Any, steps: int) -> NDArray[np.float64]:
    if isinstance(value, bytes | str) or hasattr(value, "__fspath__"):
        return _from_file(check_content(value, "series"), steps)
    try:
        found = np.asarray(value)
        if found.dtype == object:  # missing numbers come as None
            found = np.array(value, np.float64)
        if found.dtype.kind not in NUMBERS:
            raise TypeError(f"it holds {found.dtype}")
        return found.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadInput(f"not a series of numbers ({reason(error)})") from error


def _from_file(content: Content, steps: int) -> NDArray[np.float64]:
    try:
        with opened(content) as file:
            if file.read(len(NPY)) == NPY:
                return _from_npy(file)
            file.seek(0)
            return _from_csv(file, steps)
    except BadInput:
        raise
    except (ValueError, TypeError, OSError, EOFError, OverflowError, SyntaxError, TokenError) as error:
        raise BadInput(f"not a series of numbers ({reason(error)})") from error


def _from_npy(file: IO[bytes]) -> NDArray[np.float64]:
    """An array, once its header fits what follows it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in NUMBERS:
        raise BadInput(f"not a series of numbers (it holds {dtype})")
    if math.prod(shape) * dtype.itemsize > min(size, MAX_BYTES):
        raise BadInput(
            f"series of shape {list(shape)} in a file of {size} bytes, of which at most {MAX_BYTES} are read"
        )
    file.seek(0)
    return np.asarray(np.load(file, allow_pickle=False), np.float64)


def _from_csv(file: IO[bytes], steps: int) -> NDArray[np.float64]:
    """The first lines, each a step; what follows is not read."""
    found: list[list[float]] = []
    for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE), b"")):
        if len(raw) == MAX_LINE:
            raise BadInput(f"not a series of numbers (a line has more than {MAX_LINE} bytes)")
        line = raw.decode("utf-8" if number else "utf-8-sig")
        if line.strip():
            cells = line.replace(";", ",").replace("\t", ",").split(",")
            try:
                found.append([float(cell) for cell in cells])
            except ValueError:
                if found or number:  # else it is a header
                    raise
        if len(found) == steps:
            break
    if len({len(row) for row in found}) > 1:
        raise BadInput("not a series of numbers (its lines differ in how many they hold)")
    return np.array(found, np.float64)
