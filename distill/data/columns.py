"""What all sources of rows have in common: the contract, and what cells of media may hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from distill.config import nearest
from distill.contracts import UserError
from distill.data.remote import Place
from distill.formats.base import BadInput

Cell = bytes | Path | list[Any] | None
"""Media in a row: what a file holds or where it lies, numbers, or nothing."""

PIECE = 1 << 13  # rows that a source reads together, at most


@dataclass(frozen=True)
class Piece:
    """Rows that follow each other.

    Attributes:
        table: their columns, as a table or a record batch.
        bad: row within the piece -> why it cannot be read; its cells are null.
    """

    table: Any
    bad: Mapping[int, str] = field(default_factory=dict)


class Source(Protocol):
    """Rows with named columns; row ``i`` is the same row in every column."""

    name: str  # for messages: the file or folder

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def read(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield all rows in order, a limited number at a time; UserError if there is no such column."""

    def media(self, row: int, column: str) -> Cell:
        """Return the cell of an image, a sound or the like, None where missing; BadInput if it can be none."""

    def where(self, row: int, column: str) -> str:
        """Return where a cell of media comes from, for messages."""

    def identity(self, media: Sequence[str]) -> dict[str, str | None]:
        """Return what tells other content apart, by names that do not depend on where the folder lies.

        Args:
            media: columns whose cells may name files.
        """


def check_columns(source: Source, names: Sequence[str]) -> None:
    """Refuse names of columns that a source lacks, or has more than once."""
    for name in names:
        if name not in source.columns:
            raise UserError(f"{source.name} has no column {name!r}; {nearest(name, source.columns)}")
        if source.columns.count(name) > 1:
            raise UserError(f"{source.name} has several columns {name!r}; rename all but one")


def pieces(table: pa.Table) -> Iterator[Piece]:
    """Yield the rows of a table in memory."""
    return (Piece(batch) for batch in table.to_batches(max_chunksize=PIECE))


def media_cell(value: Any, root: Place) -> Cell:
    """Return what a cell stands for: file bytes, a path below ``root`` or an absolute one, numbers, None where missing.

    Args:
        value: bytes, a path, the struct ``{bytes, path}`` of Hugging Face data sets, or a list of numbers.
        root: folder that relative paths start from; files of a remote one are read.

    Raises:
        BadInput: another value, a path that leaves the folder, or a remote file that cannot be read.
    """
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or isinstance(value, bytes):
        return value or None
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise BadInput(f"the cell is a {type(value).__name__}; expected the bytes of a file, a path or a list")
    return root.below(value) if value else None


def media_files(found: Iterable[Piece], column: str, root: Place) -> dict[str, str | None]:
    """Return the hashes of the files that cells of media name, by their names below ``root`` where they lie there.

    Cells with bytes name none, and what :func:`media_cell` refuses is left out. Files of a remote root are not asked
    for one by one: its address stands for them.
    """
    if root.local is None:
        return {str(root): None}
    hashes: dict[str, str | None] = {}
    for piece in found:
        for cell in _paths(piece.table.column(column)):
            try:
                path = media_cell(cell, root)
            except BadInput:
                continue  # not a file, and `prepare` reports it
            if isinstance(path, Path):
                name = (path.relative_to(root.local) if path.is_relative_to(root.local) else path).as_posix()
                if name not in hashes:
                    hashes[name] = Place(path).identity()
    return hashes


def _paths(cells: Any) -> list[Any]:
    """The cells that may be paths; those of structs with bytes are not read."""
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        return []
    if pa.types.is_struct(cells.type):
        names = [field.name for field in cells.type]
        if "bytes" in names:
            cells = cells.filter(pc.is_null(pc.struct_field(cells, "bytes")))
        return pc.struct_field(cells, "path").to_pylist() if "path" in names else []
    return cells.to_pylist()
