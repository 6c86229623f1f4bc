"""Arrays that are too many rows for memory: kept in files without a name, which vanish with the array.

What is here reads and writes a chunk of rows at a time, so that memory does not grow with the rows: the system may
drop a file's pages from memory at any time, but not those of an ordinary array.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distill import runs

CHUNK = 1 << 13  # rows at a time
IN_MEMORY = 1 << 16  # bytes up to which a file is not worth it


def unnamed_file(folder: Path) -> Any:
    """Return an open file that vanishes with what maps it: in ``folder``, or elsewhere if that cannot be written."""
    return tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None)


def scratch(folder: Path, shape: int | tuple[int, ...], dtype: DTypeLike, fill: int = 0) -> NDArray[Any]:
    """Return a new array, on the disk of ``folder`` where it is large.

    Args:
        folder: an existing folder.
        shape: of the array.
        dtype: of its entries.
        fill: value of every entry.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.full(shape, fill, dtype)
    with unnamed_file(folder) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here; later it would kill the process
            with runs.room_for(folder, size):
                os.posix_fallocate(file.fileno(), 0, size)
        array = np.asarray(np.memmap(file, dtype, "w+", shape=shape))
    if fill:
        for rows in chunks(len(array)):
            array[rows] = fill
    return array


def chunks(num_rows: int) -> Iterator[slice]:
    """Yield slices that cover so many rows, in order."""
    return (slice(start, min(start + CHUNK, num_rows)) for start in range(0, num_rows, CHUNK))


def take(array: NDArray[Any], rows: NDArray[np.int64], folder: Path) -> NDArray[Any]:
    """Return the entries of these rows, in this order, on disk where they are many."""
    taken = scratch(folder, (len(rows), *array.shape[1:]), array.dtype)
    for part in chunks(len(rows)):
        taken[part] = array[rows[part]]
    return taken


def positions_where(flags: NDArray[np.bool_], folder: Path, *, flag: bool = True) -> NDArray[np.int64]:
    """Return the positions of the flags that are so, int64 [N], on disk where they are many."""
    total = sum(int(np.count_nonzero(flags[rows] == flag)) for rows in chunks(len(flags)))
    positions, done = scratch(folder, total, np.int64), 0
    for rows in chunks(len(flags)):
        found = rows.start + np.flatnonzero(flags[rows] == flag)
        positions[done : done + len(found)] = found
        done += len(found)
    return positions


def first_rows(keys: NDArray[np.uint64], folder: Path) -> NDArray[np.int64]:
    """Return for each row the first row that has the same key, int64 [N].

    Rows are dealt into buckets by their keys' low bits, so that equal keys meet in one. Of a bucket, the rows that lead
    their keys so far are sorted in memory with some more of its rows: one key may be that of most rows.

    Args:
        keys: [N, 2], hashes: their bits have to be as good as random.
        folder: where large arrays are kept meanwhile.
    """
    buckets = max(1, len(keys) // CHUNK)
    counts = np.zeros(buckets, np.int64)
    for rows in chunks(len(keys)):
        counts += np.bincount((keys[rows, 0] % np.uint64(buckets)).astype(np.int64), minlength=buckets)
    ends = np.cumsum(counts)
    free = ends - counts
    dealt = scratch(folder, len(keys), np.int64)
    for rows in chunks(len(keys)):
        bucket = (keys[rows, 0] % np.uint64(buckets)).astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        here = np.bincount(bucket, minlength=buckets)
        within = np.arange(len(bucket)) - np.repeat(np.cumsum(here) - here, here)
        dealt[free[bucket[order]] + within] = rows.start + order
        free += here
    first = scratch(folder, len(keys), np.int64)
    for start, end in zip(ends - counts, ends, strict=True):
        leaders = np.zeros(0, np.int64)
        for begin in range(start, end, 2 * CHUNK):  # buckets of different keys are hardly ever larger
            members = np.concatenate([leaders, dealt[begin : min(begin + 2 * CHUNK, end)]])  # in order of row
            own = keys[members]
            order = np.lexsort((own[:, 1], own[:, 0]))  # stable: the first row leads those of its key
            new = np.ones(len(order), bool)
            new[1:] = (own[order[1:]] != own[order[:-1]]).any(axis=1)
            leaders = members[order[new]]
            first[members[order]] = leaders[np.cumsum(new) - 1]
    return first


def dense_codes(keys: NDArray[np.uint64], folder: Path) -> tuple[NDArray[np.int64], int]:
    """Number the distinct keys in order of first appearance.

    Returns:
        The number of each row's key, int64 [N]; how many there are.
    """
    first = first_rows(keys, folder)
    codes, known = scratch(folder, len(keys), np.int64), 0
    for rows in chunks(len(keys)):
        new = first[rows] == np.arange(rows.start, rows.stop)
        codes[rows] = known + np.cumsum(new) - 1
        known += int(new.sum())
        codes[rows] = codes[first[rows]]  # a first row comes before the others of its key, or in this chunk
    return codes, known


def positions_by_id(ids: NDArray[np.int64], split: NDArray[np.str_], wanted: str, folder: Path) -> NDArray[np.int64]:
    """Return the positions of a split's rows in order of id, int64 [N].

    Args:
        ids: int64 [M], unique.
        split: str [M].
        wanted: the split.
        folder: where large arrays are kept.
    """
    total = sum(int((split[rows] == wanted).sum()) for rows in chunks(len(ids)))
    positions, keys, done = scratch(folder, total, np.int64), scratch(folder, total, np.int64), 0
    for rows in chunks(len(ids)):
        found = rows.start + np.flatnonzero(split[rows] == wanted)
        positions[done : done + len(found)], keys[done : done + len(found)] = found, ids[found]
        done += len(found)
    if all((np.diff(keys[rows.start : rows.stop + 1]) > 0).all() for rows in chunks(total)):
        return positions
    ranked, ordered = scratch(folder, total, np.int64), scratch(folder, total, np.int64)
    for rows in chunks(total):
        ranked[rows] = keys[rows]
    ranked.sort()
    for rows in chunks(total):
        ordered[np.searchsorted(ranked, keys[rows])] = positions[rows]
    return ordered


def repeated(values: NDArray[np.int64]) -> tuple[int, int] | None:
    """Return a value that comes most often and how often, None where each comes once. Sorts ``values`` in place."""
    values.sort()
    worst: tuple[int, int] | None = None
    for rows in chunks(len(values)):
        part = values[rows.start : rows.stop + 1]
        for value in np.unique(part[:-1][part[1:] == part[:-1]]).tolist() if len(part) > 1 else []:
            count = int(np.searchsorted(values, value, "right") - np.searchsorted(values, value))
            if worst is None or count > worst[1]:
                worst = (value, count)
    return worst
