"""The cells of a piece of a source, with the types that a recipe expects of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill.config import one_line
from distill.contracts import UserError
from distill.data.columns import Source


@dataclass(frozen=True)
class Cells:
    """The cells of one piece."""

    source: str
    table: Any
    bad: Any
    start: int

    @property
    def rows(self) -> slice:
        """Where the piece's rows are among all."""
        return slice(self.start, self.start + self.table.num_rows)

    def plain(self, column: str) -> Any:
        """A column as one Arrow array, without dictionaries."""
        array = self.table.column(column)
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        try:
            array.validate(full=True)  # files may hold texts that are not UTF-8
        except pa.ArrowInvalid as error:
            where = f"{self.source}: column {column!r}, from row {self.start} on"
            raise UserError(f"{where}: {one_line(error)}; mend it") from error
        return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array

    def typed(self, column: str, fits: Callable[[Any], bool], what: str, *, optional: bool = False) -> Any:
        """A column whose values have a type; the bad rows' are null."""
        array = self.plain(column)
        missing = nulls(array)
        wrong = (~missing & (not fits(array.type))) | (missing & (not optional))
        wrong[list(self.bad)] = False
        if wrong.any():
            row = int(wrong.argmax())
            self.refuse(column, row, f"{array[row].as_py()!r} is not {what}; mend it or name another column")
        return array

    def refuse(self, column: str, row: int, why: str) -> None:
        """Complain about one cell."""
        raise UserError(f"{self.source}: column {column!r}, row {self.start + row}: {why}")


def read_cells(source: Source, columns: Sequence[str]) -> Iterator[Cells]:
    """Yield the cells of some columns, a piece of the source at a time."""
    start = 0
    for piece in source.read(columns):
        yield Cells(source.name, piece.table, piece.bad, start)
        start += piece.table.num_rows
        pa.default_memory_pool().release_unused()  # else what it holds grows with what was read
    assert start == len(source)


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def nulls(array: Any) -> NDArray[np.bool_]:
    """Which cells are empty, bool [N]."""
    return np.array(array.is_null().to_numpy(zero_copy_only=False), bool)


def encoded(array: Any) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct values of a column, without null, and the number of each row's; that of null is theirs."""
    if pa.types.is_null(array.type):
        return [], np.zeros(len(array), np.int64)
    encoded = array.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    return values, encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False).astype(np.int64)
