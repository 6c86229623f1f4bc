"""The order of an epoch's rows: a function of (seed, epoch), of which any part can be asked for.

Up to a number of rows it is one permutation. Above it the order has two levels, so that reading stays near in the
files and no permutation of all rows is made: blocks of neighbouring rows come in random order, and within a window of
several blocks the rows are shuffled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distill.data.scratch import chunks, scratch

BLOCK = 1 << 12  # rows that stay neighbours until their window is shuffled
WINDOW = 1 << 6  # blocks
GROUPED = 16  # batches in which rows are sorted by length

Lengths = Callable[[NDArray[np.int64]], NDArray[np.int64]]


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


class _Windows(ABC):
    """An order that is made a window at a time.

    Args:
        starts: where each window begins; the first at 0.
        num_rows: N.
    """

    def __init__(self, starts: NDArray[np.int64], num_rows: int) -> None:
        self._starts, self._num_rows = starts, num_rows
        self._last: tuple[int, NDArray[np.int64]] | None = None

    @abstractmethod
    def _window(self, number: int) -> NDArray[np.int64]:
        """The rows of a window in order."""

    def __len__(self) -> int:
        """Return N."""
        return self._num_rows

    def __getitem__(self, rows: slice) -> NDArray[np.int64]:
        """Return the positions of a slice without step, int64."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            number = int(np.searchsorted(self._starts, start, "right")) - 1
            last = self._last  # threads read the same window at the same time
            window = last[1] if last is not None and last[0] == number else self._window(number)
            self._last = (number, window)
            begin = int(self._starts[number])
            parts.append(window[start - begin : stop - begin])
            start += len(parts[-1])
        return np.concatenate(parts)


class TwoLevelOrder(_Windows):
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
        self._positions, self._key, self._block, self._size = positions, (seed, epoch), block, window
        num_blocks = -(-len(positions) // block)
        self._blocks = np.random.default_rng((*self._key, 0)).permutation(num_blocks)
        sizes = np.minimum(block, len(positions) - self._blocks * block)  # the short block is anywhere
        super().__init__(np.concatenate([[0], np.cumsum(sizes)])[::window], len(positions))

    def _window(self, number: int) -> NDArray[np.int64]:
        blocks = self._blocks[number * self._size : (number + 1) * self._size]
        rows = np.concatenate([self._positions[b * self._block : (b + 1) * self._block] for b in blocks.tolist()])
        np.random.default_rng((*self._key, 1, number)).shuffle(rows)
        return rows


class GroupedOrder(_Windows):
    """Batches of rows of like length: a few batches at a time are sorted by it, and shuffled.

    A smaller last batch stays the last, and has the longest rows of its window.

    Args:
        order: of the rows.
        lengths: the length of each row, int64 [B], from its position.
        batch_size: rows a batch.
        seed: of the order of batches.
        epoch: of the order of batches.
        window: batches a window.
    """

    def __init__(
        self, order: Order, lengths: Lengths, batch_size: int, seed: int, epoch: int, *, window: int = GROUPED
    ) -> None:
        self._order, self._lengths, self._batch, self._key = order, lengths, batch_size, (seed, epoch, 2)
        self._size = window * batch_size
        super().__init__(np.arange(0, len(order), self._size), len(order))

    def _window(self, number: int) -> NDArray[np.int64]:
        rows = self._order[number * self._size : (number + 1) * self._size]
        rows = rows[np.argsort(self._lengths(rows), kind="stable")]
        whole = len(rows) // self._batch * self._batch
        batches = np.random.default_rng((*self._key, number)).permutation(rows[:whole].reshape(-1, self._batch))
        return np.concatenate([batches.ravel(), rows[whole:]])
