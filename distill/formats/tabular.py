"""Records: numbers and categories in named columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.formats.base import Arrays, BadInput, Format

OTHER = 0
"""Code of a category that is missing, or was too rare in training to have one."""


@dataclass(frozen=True)
class TabularFormat(Format):
    """A row's numbers, standardised, and codes of its categories, side by side in one array.

    Attributes:
        numbers: columns of numbers.
        categories: columns of categories.
        code_size: codes of each category, that of missing and rare values included.
        mean: of each column of numbers over the training rows; none before these are known.
        std: standard deviation there.
        values: of each column of categories, those that have the codes 1, 2, ...
    """

    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    code_size: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()

    @property
    def width(self) -> int:
        """2 N + K of :data:`~distill.contracts.INPUTS`."""
        return 2 * len(self.numbers) + len(self.categories)

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As :attr:`Format.arrays`."""
        return {"tabular": ("float32", (self.width,))}

    @property
    def parameters(self) -> dict[str, int]:
        """As :attr:`Format.parameters`."""
        return {"num_numbers": len(self.numbers), "num_codes": len(self.categories), "code_size": self.code_size}

    def read(self, value: Any) -> Arrays:
        """Take a mapping of columns to values; those that lack, are None, NaN or an empty text are missing."""
        if not isinstance(value, Mapping):
            raise BadInput(f"the record is a {type(value).__name__}; give a mapping of its columns to values")
        numbers = np.array([[number_of(value.get(name), name) for name in self.numbers]], np.float64)
        codes = [
            known.index(text) + 1 if (text := text_of(value.get(name))) in known else OTHER
            for name, known in zip(self.categories, self.values, strict=True)
        ]
        return {"tabular": self.encode(numbers, np.array([codes], np.int64))[0]}

    def encode(self, numbers: NDArray[np.float64], codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Put raw numbers [B, N], NaN where missing, and codes [B, K] side by side: float32 [B, 2 N + K]."""
        missing = np.isnan(numbers)
        standard = np.where(missing, 0.0, (numbers - np.array(self.mean)) / np.array(self.std))
        return np.concatenate([standard, missing, codes], axis=1).astype(np.float32)


def number_of(value: Any, column: str) -> float:
    """A cell as a number, NaN where missing; BadInput if it is none, or infinite."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadInput(f"column {column!r} holds {value!r}, which is no number") from None
    if math.isinf(number):
        raise BadInput(f"column {column!r} holds {number}, which is not finite")
    return number


def text_of(value: Any) -> str:
    """A category as a text, the same for the number 3 and the text "3"; empty where missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()
