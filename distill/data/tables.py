"""Tables: CSV, TSV, JSON lines, Parquet, and the packaged sample."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pa_parquet

from distill.config import nearest, one_line
from distill.contracts import UserError
from distill.data.columns import PIECE, Cell, Piece, check_columns, media_cell, media_files, pieces
from distill.data.remote import Place
from distill.formats.base import BadInput

SAMPLE_PREFIX = "sample:"
KNOWN = (".parquet", ".csv", ".tsv", ".jsonl")


class TableSource:
    """A CSV, TSV, JSONL or Parquet file, a folder of Parquet files (in order of name), or ``sample:NAME``.

    A cell of an image, a sound or the like holds the bytes of a file, a path, or the struct ``{bytes, path}`` of
    Hugging Face datasets, one of a series a list of numbers too. Parquet files are memory-mapped and read some rows at
    a time, their media one row group at a time;
    the other formats are parsed as a whole, in memory. Tables may be URLs.
    """

    def __init__(self, path: str, root: str | None = None, *, base: Path) -> None:
        """Open the table.

        Args:
            path: the table, relative to ``base``.
            root: folder that relative paths of media start from; the table's folder by default.
            base: folder that relative paths start from.

        Raises:
            UserError: the table is missing, unreadable, or of an unknown format.
        """
        table = Place(_sample_folder(path) if path.startswith(SAMPLE_PREFIX) else path, base)
        self._files = _table_files(table)
        self.name = str(table)
        beside = table if self._files[0].path != table.path else table.parent
        self._root = Place(root, base) if root is not None else beside
        with self._reading():
            self._groups = [group for file in self._files for group in _read_groups(file)]
        self._ends = list(accumulate(group.num_rows for group in self._groups))
        self.columns = self._common_columns()
        self._cached: dict[str, tuple[int, pa.ChunkedArray]] = {}  # column -> row group, and it

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._ends[-1] if self._ends else 0

    def read(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield the rows in order; UserError if there is no such column."""
        check_columns(self, columns)
        with self._reading():
            for group in self._groups:
                yield from group.read(columns)

    def media(self, row: int, column: str) -> Cell:
        """Return a file's bytes or its path (not checked to exist), a list of numbers, None where missing.

        Raises:
            BadInput: the cell holds none of these, or its relative path leaves the table's folder.
        """
        check_columns(self, [column])
        number = bisect_right(self._ends, row)
        cached = self._cached.get(column)
        if cached is None or cached[0] != number:
            with self._reading():
                cached = self._cached[column] = (number, self._groups[number].column(column))
        start = self._ends[number] - self._groups[number].num_rows
        try:
            value = cached[1][row - start].as_py()
        except UnicodeDecodeError as error:
            raise BadInput("the cell is a path that is not UTF-8") from error
        return media_cell(value, self._root)

    def where(self, row: int, column: str) -> str:
        """Return a file's path, or its column and row."""
        try:
            value = self.media(row, column)
        except BadInput:
            value = None
        return str(value) if isinstance(value, Path) else f"column {column!r}, row {row}"

    def identity(self, media: Sequence[str]) -> dict[str, str | None]:
        """Return hashes of the table's files and of the files that its cells name, by relative name.

        Remote files count by size and time; those that cells name there by the address of their folder.
        """
        found: dict[str, str | None] = {file.name: file.identity() for file in self._files}
        for column in media:
            if column in self.columns and not self._holds_bytes(column):
                found |= media_files(self.read([column]), column, self._root)
        return found

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Say in one sentence that what lies in the table is damaged."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.name} cannot be read as a table: {one_line(error)}") from error

    def _holds_bytes(self, column: str) -> bool:
        kinds = {group.schema.field(column).type for group in self._groups}
        return all(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in kinds)

    def _common_columns(self) -> list[str]:
        first, *others = [group.schema.names for group in self._groups] or [[]]
        for names in others:
            if set(names) != set(first):
                odd = sorted(set(names) ^ set(first))
                raise UserError(f"{self.name}: its files differ in column {odd[0]!r}; give all the same columns")
        return list(first)


@dataclass(frozen=True)
class _Group:
    """Rows that lie together: a Parquet row group, or a whole CSV or JSONL file."""

    schema: pa.Schema
    num_rows: int
    content: Any  # pa.Table, or the Parquet file
    number: int | None = None  # of the row group

    def read(self, columns: Sequence[str]) -> Iterator[Piece]:
        if self.number is None:
            yield from pieces(self.content.select(list(columns)))
        else:
            batches = self.content.iter_batches(PIECE, [self.number], list(columns), use_threads=False)
            yield from (Piece(batch) for batch in batches)

    def column(self, name: str) -> pa.ChunkedArray:
        table = self.content if self.number is None else self.content.read_row_group(self.number, columns=[name])
        return table.column(name)


def _read_groups(file: Place) -> list[_Group]:
    if file.suffix == ".parquet":
        parquet = pa_parquet.ParquetFile(file.local or file.open(), memory_map=True)
        groups = range(parquet.metadata.num_row_groups)
        counts = [parquet.metadata.row_group(group).num_rows for group in groups]
        return [_Group(parquet.schema_arrow, counts[group], parquet, group) for group in groups]
    with file.open() as content:
        if file.suffix == ".jsonl":
            table = pa_json.read_json(content)
        else:
            delimiter = "\t" if file.suffix == ".tsv" else ","
            options = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
            table = pa_csv.read_csv(content, parse_options=options)
    return [_Group(table.schema, table.num_rows, table)]


def _table_files(table: Place) -> list[Place]:
    if table.is_dir():
        files = table.matching("*.parquet")
        if not files:
            raise UserError(f"folder {table} holds no .parquet file; name a table file or a folder of Parquet files")
        return files
    if not table.is_file():
        raise UserError(f"no table {table}; give a {', '.join(KNOWN)} file or a folder of Parquet files")
    if table.suffix not in KNOWN:
        raise UserError(f"{table} has the unknown suffix {table.suffix!r}; {nearest(table.suffix, KNOWN)}")
    return [table]


def _sample_folder(path: str) -> Path:
    samples = Path(str(resources.files("distill.data"))) / "samples"
    known = [entry.parent.name for entry in samples.glob("*/*.parquet")]
    name = path.removeprefix(SAMPLE_PREFIX)
    if name not in known:
        raise UserError(f"no packaged sample {name!r}; {nearest(name, set(known))}")
    return samples / name
