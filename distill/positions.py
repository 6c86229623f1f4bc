"""Where an id stands among sorted ids: in little memory, since it is asked in every step and for millions of ids."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDEST = 16  # ids that span more than this many times their number are searched, not counted
_CHUNK = 1 << 16


class Positions:
    """Finds positions in a sorted array of ids.

    Ids that lie close are kept as a bit each, with the number of ids before each 64 of them: a position is that number
    and a count of bits. This takes three bytes an id at most, and a few cache misses less than a search.

    Args:
        ids: integers [N], strictly increasing; kept, not copied.
    """

    def __init__(self, ids: NDArray[Any]) -> None:
        self._ids, self._first, self._last = ids, int(ids[0]), int(ids[-1])
        span = self._last - self._first + 1
        self._words: NDArray[np.uint64] | None = None
        if span <= WIDEST * len(ids):
            self._words = np.zeros(-(-span // 64), np.uint64)
            for start in range(0, len(ids), _CHUNK):
                word, mask = self._bits(ids[start : start + _CHUNK].astype(np.int64))
                np.bitwise_or.at(self._words, word, mask)
            counts = np.bitwise_count(self._words)
            kind: Any = np.int64 if len(ids) >= 2**31 else np.int32
            self._before: NDArray[Any] = np.cumsum(counts, dtype=kind) - counts.astype(kind)

    def find(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the position of each id, int64 [B], and whether it is there, bool [B]; the others' have no meaning."""
        inside = np.minimum(np.maximum(ids, self._first), self._last)  # ndarray.clip starts more slowly
        if self._words is None:  # keys of the ids' own type: else numpy would convert all ids in each call
            keys: Any = inside.astype(self._ids.dtype)
            position = np.searchsorted(self._ids, keys)
            return position, self._ids[position] == ids
        word, mask = self._bits(inside)
        bits = self._words[word]
        known = ((bits & mask) != 0) & (inside == ids)
        return self._before[word] + np.bitwise_count(bits & (mask - np.uint64(1))).astype(np.int64), known

    def _bits(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The word of each id, and its bit there."""
        offset = ids - self._first
        return offset >> 6, np.uint64(1) << (offset & 63).astype(np.uint64)
