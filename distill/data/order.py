"""The order of an epoch's rows: a function of (seed, epoch), of which any part can be asked for.

Up to a number of rows it is one permutation. Above it the order has two levels, so that reading stays near in the
files and no permutation of all rows is made: blocks of neighbouring rows come in random order, and within a window of
several blocks the rows are shuffled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distill.data.hashing import mix
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


class Drawn:
    """Rows in groups, of which each epoch draws as many as there are, with replacement.

    Draw ``i`` of an epoch is a hash of (seed, epoch, i): first a group, then one of its rows, all of them alike. Rows
    are read anywhere in the files.

    Args:
        positions: int64 [N].
        groups: int64 [N], the group of each, from 0.
        weights: float64 [G], in proportion, of a row of each group.
        folder: where large arrays are kept.
    """

    def __init__(
        self, positions: NDArray[np.int64], groups: NDArray[np.int64], weights: NDArray[np.float64], folder: Path
    ) -> None:
        self._sizes = np.bincount(groups, minlength=len(weights))
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._rows, free = scratch(folder, len(positions), np.int64), self._starts.copy()
        for part in chunks(len(positions)):
            order = np.argsort(groups[part], kind="stable")
            own, here = groups[part][order], np.bincount(groups[part], minlength=len(weights))
            within = np.arange(len(own)) - np.repeat(np.cumsum(here) - here, here)
            self._rows[free[own] + within] = positions[part][order]
            free += here
        mass = self._sizes * weights
        self._ends = np.cumsum(mass) / mass.sum()
        self._last = int(np.flatnonzero(mass)[-1])  # rounding may leave the last end below 1

    def order(self, seed: int, epoch: int) -> Order:
        """Return an epoch's rows."""
        return _Draws(self, seed, epoch)

    def __len__(self) -> int:
        """Return N."""
        return len(self._rows)

    def draw(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the position that each of some hashes, int64 [B], stands for."""
        groups = np.minimum(np.searchsorted(self._ends, _unit(hashes), "right"), self._last)
        within = (_unit(mix(hashes)) * self._sizes[groups]).astype(np.int64)
        found: NDArray[np.int64] = self._rows[self._starts[groups] + within]
        return found


@dataclass(frozen=True)
class _Draws:
    """One epoch of :class:`Drawn`."""

    drawn: Drawn
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, rows: slice) -> NDArray[np.int64]:
        start, stop, step = rows.indices(len(self))
        assert step == 1
        return self.drawn.draw(draw_hashes(self.seed, self.epoch, start, stop))


def draw_hashes(seed: int, epoch: int, start: int, stop: int) -> NDArray[np.uint64]:
    """Return a hash of each of an epoch's places from ``start`` to before ``stop``, uint64."""
    state = mix(mix(np.array([seed], np.uint64)) ^ np.uint64(epoch))
    return mix(state ^ np.arange(start, max(start, stop), dtype=np.uint64))


def _unit(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2**-53."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
