"""The texts of many rows in little memory: the distinct ones in a memory-mapped Arrow file, and a number a row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill import runs
from distill.contracts import UserError

PART = 1 << 13  # texts a record batch of the file
SCHEMA = pa.schema({"text": pa.string()})


class Texts(Sequence[str]):
    """A sequence of strings; a slice is a list.

    Attributes:
        numbers: integers [N], the number of each row's text among the distinct ones.
        num_distinct: how many there are.
    """

    def __init__(self, distinct: Sequence[pa.Array], numbers: NDArray[Any]) -> None:
        """Take the distinct texts, in parts, and the rows' numbers."""
        self._parts, self.numbers = list(distinct), numbers
        self._ends = list(accumulate(len(part) for part in self._parts))
        self.num_distinct = self._ends[-1] if self._ends else 0

    @classmethod
    def of(cls, strings: Sequence[str]) -> Texts:
        """Take strings, distinct or not."""
        encoded = pa.array(strings, pa.large_string()).dictionary_encode()
        return cls([encoded.dictionary], encoded.indices.to_numpy())

    @classmethod
    def open(cls, path: Path, numbers: NDArray[Any]) -> Texts:
        """Open a file that a :class:`TextWriter` wrote; what is not asked for stays on disk.

        Raises:
            UserError: it is damaged.
        """
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a file of texts ({error}); delete its folder to make it again") from error
        return cls(table.column("text").chunks, numbers)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.numbers)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        """Return a text, or a list of them."""
        if isinstance(index, slice):
            return [self._text(int(number)) for number in self.numbers[index]]
        return self._text(int(self.numbers[int(index)]))

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""
        return (self._text(int(number)) for number in self.numbers)

    def distinct(self, wanted: NDArray[np.bool_], count: int) -> Iterator[list[str]]:
        """Yield the wanted ones of the distinct texts, in order, so many at a time at most.

        Args:
            wanted: bool [num_distinct].
            count: texts a list.
        """
        start = 0
        for part in self._parts:
            for first in range(0, len(part), count):
                piece = part[first : first + count]
                flags = wanted[start : start + len(piece)]
                start += len(piece)
                if flags.any():
                    yield piece.filter(pa.array(flags)).to_pylist()

    def _text(self, number: int) -> str:
        part = bisect_right(self._ends, number)
        return self._parts[part][number - self._ends[part]].as_py()


class TextWriter:
    """Writes distinct texts, so that few of them are in memory; a context manager.

    Args:
        path: of the Arrow file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self.count = path, list[str](), 0

    def __enter__(self) -> TextWriter:
        """Begin the file."""
        self._file = pa.ipc.new_file(str(self._path), SCHEMA)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the file; after an error it stays unfinished."""
        if kind is None and self._waiting:
            self._write()
        self._file.close()

    def add(self, text: str) -> None:
        """Write a text; its number is ``count`` before the call."""
        self._waiting.append(text)
        self.count += 1
        if len(self._waiting) == PART:
            self._write()

    def _write(self) -> None:
        with runs.room_for(self._path, sum(len(text) for text in self._waiting)):
            self._file.write_batch(pa.record_batch([pa.array(self._waiting, pa.string())], SCHEMA))
        self._waiting.clear()
