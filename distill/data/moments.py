"""Mean and deviation of columns that are read a piece at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_STD = 1e-9  # share of the mean; below it rounding alone tells a column's values apart


class Moments:
    """Of each of some columns, over the numbers that are no NaN (Chan et al. 1979's update).

    Attributes:
        count: numbers seen, float64 [K].
        mean: of them, [K]; 0 where there are none.
    """

    def __init__(self, width: int) -> None:
        self.count, self.mean, self._squares = np.zeros(width), np.zeros(width), np.zeros(width)

    def add(self, numbers: NDArray[np.floating[Any]]) -> None:
        """Take in some rows, [N, K]."""
        new = (~np.isnan(numbers)).sum(0)
        own = np.nansum(numbers, axis=0) / np.maximum(1, new)
        far, total = own - self.mean, np.maximum(1, self.count + new)
        self._squares += np.nansum((numbers - own) ** 2, axis=0) + far**2 * (self.count * new / total)
        self.mean, self.count = self.mean + far * (new / total), self.count + new

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation, [K]; 1 of a column that is constant."""
        found = np.sqrt(self._squares / np.maximum(1, self.count))
        return np.where(self.constant(found), 1.0, found)

    def constant(self, std: NDArray[np.float64] | None = None) -> NDArray[np.bool_]:
        """Return which columns hold one number alone, bool [K]."""
        found = np.sqrt(self._squares / np.maximum(1, self.count)) if std is None else std
        return ~(found > LEAST_STD * np.abs(self.mean))
