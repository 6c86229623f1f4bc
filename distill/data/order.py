"""The order of an epoch's rows: a function of (seed, epoch), of which any part can be asked for.

Up to a number of rows it is one permutation. Above it the order has two levels, so that reading stays near in the
files and no permutation of all rows is made: blocks of neighbouring rows come in random order, and within a window of
several blocks the rows are shuffled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distill.data.scratch import chunks, scratch

BLOCK = 1 << 12  # rows that stay neighbours until their window is shuffled
WINDOW = 1 << 6  # blocks


class Order(Protocol):
    """The positions of an epoch's rows in the order they are read; an int64 array [N] is one too."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, rows: slice) -> NDArray[np.int64]:
        """Return a part of it."""


def shuffled(positions: NDArray[np.int64], seed: int, epoch: int, folder: Path) -> NDArray[np.int64]:
    """Return a permutation of positions, int64 [N], kept in a file of ``folder`` where it is large."""
    order = scratch(folder, len(positions), np.int64)
    for rows in chunks(len(positions)):
        order[rows] = positions[rows]
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


class TwoLevelOrder:
    """Blocks in random order, and rows shuffled within windows of blocks.

    A window takes 2 MB of memory, and the order of the blocks 8 bytes a block. Every position follows from (seed,
    epoch) and itself, so that reading can begin anywhere.

    Args:
        positions: int64 [N], in any order.
        seed: of the order.
        epoch: of the order.
        block: rows a block; the last one may have fewer.
        window: blocks a window.
    """

    def __init__(
        self, positions: NDArray[np.int64], seed: int, epoch: int, *, block: int = BLOCK, window: int = WINDOW
    ) -> None:
        self._positions, self._key, self._block, self._window = positions, (seed, epoch), block, window
        num_blocks = -(-len(positions) // block)
        self._blocks = np.random.default_rng((*self._key, 0)).permutation(num_blocks)
        sizes = np.minimum(block, len(positions) - self._blocks * block)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])[::window]  # of the windows; the short block is anywhere
        self._last: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self._positions)

    def __getitem__(self, rows: slice) -> NDArray[np.int64]:
        """Return the positions of a slice without step, int64."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            number = int(np.searchsorted(self._starts, start, "right")) - 1
            window, begin = self._window_rows(number), int(self._starts[number])
            parts.append(window[start - begin : stop - begin])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _window_rows(self, number: int) -> NDArray[np.int64]:
        if self._last is None or self._last[0] != number:
            blocks = self._blocks[number * self._window : (number + 1) * self._window]
            rows = np.concatenate([self._positions[b * self._block : (b + 1) * self._block] for b in blocks.tolist()])
            np.random.default_rng((*self._key, 1, number)).shuffle(rows)
            self._last = (number, rows)
        return self._last[1]
