"""Records: numbers and categories in named columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.formats.base import Arrays, BadInput, Format

LARGEST = float(np.finfo(np.float32).max)
WHOLE = 2**53  # beyond which floats skip whole numbers
BOOLEANS = {"true": 1.0, "false": 0.0}
MISSING_WORDS = frozenset(("", "na", "n/a", "#na", "#n/a", "nan", "-nan", "null", "none"))
"""What stands for a missing number, as where pyarrow reads a CSV file."""
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

    def lacks(self, value: Any) -> bool:
        """As :meth:`Format.lacks`: all its columns are missing."""
        if not isinstance(value, Mapping):
            return value is None
        numbers = (number_of(value.get(name), name) for name in self.numbers)
        return all(map(math.isnan, numbers)) and not any(text_of(value.get(name)) for name in self.categories)

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
    """A cell as a number, NaN where missing; BadInput if it is none, or beyond what 32 bits hold."""
    if value is None:
        return math.nan
    try:
        text = value.strip().lower() if isinstance(value, str) else None
        number = math.nan if text in MISSING_WORDS else float(BOOLEANS.get(text, value) if text else value)
    except (TypeError, ValueError):
        raise BadInput(f"column {column!r} holds {value!r}, which is no number") from None
    except OverflowError:
        number = math.inf
    if abs(number) > LARGEST:
        raise BadInput(f"column {column!r} holds {number:g}, which is beyond 32 bits")
    return number


def text_of(value: Any) -> str:
    """A category as a text: the same for the number 3, the text "3.0" and a file that reads either as the other.

    Numbers have seven digits at most, which those of 32 bits keep; dates are as ISO 8601 has them, with a space.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else str(value).strip()
    if text.lower() in BOOLEANS:
        return text.lower()
    try:
        number = float(text)
    except ValueError:
        return _date(text)
    if math.isnan(number):
        return ""
    return f"{int(number)}" if number.is_integer() and abs(number) < WHOLE else f"{number:.7g}"


def _date(text: str) -> str:
    try:
        return str(datetime.fromisoformat(text)).removesuffix(" 00:00:00") if text[:4].isdigit() else text
    except ValueError:
        return text
