"""Where rows come from: tables (CSV, JSON lines, Parquet), the packaged sample, folders of images.

A source has named columns, all in memory, except that image bytes are read when asked for. It says nothing
about what a column means: :mod:`distill.data.prepare` does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pa_parquet

from distill.config import Part, build_part, nearest
from distill.contracts import UserError
from distill.preprocess import BadInput

SAMPLE_PREFIX = "sample:"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = ("train", "valid", "val", "validation", "test")


class Source(Protocol):
    """Rows with named columns; row ``i`` is the same row in every column."""

    name: str  # for messages: the file or folder

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def column(self, name: str) -> list[Any]:
        """Return a column's values; None where missing. Raises UserError if there is no such column."""

    def image(self, row: int, column: str) -> bytes | Path | None:
        """Return an image's file bytes or its path, None where missing. Raises BadInput on any other value."""

    def files(self, image_column: str | None) -> dict[str, Path]:
        """Return every file that the rows come from, by a name that does not depend on where the folder lies."""


class TableSource:
    """A CSV, TSV, JSONL or Parquet file, a folder of Parquet files (in order of name), or ``sample:NAME``.

    An image cell holds the bytes of an image file, a path, or the struct ``{bytes, path}`` of Hugging Face
    datasets. Image bytes are read from a memory-mapped Parquet file one row group at a time.
    """

    def __init__(self, path: str, root: str | None = None, *, base: Path) -> None:
        """Open the table.

        Args:
            path: the table, relative to ``base``.
            root: folder that relative image paths start from; the table's folder by default.
            base: folder that relative paths start from.

        Raises:
            UserError: the table is missing, unreadable, or of an unknown format.
        """
        table = _sample_folder(path) if path.startswith(SAMPLE_PREFIX) else base / path
        self.name = str(table)
        self.root = base / root if root is not None else (table if table.is_dir() else table.parent)
        self._files = _table_files(table)
        try:
            self._pieces = [piece for file in self._files for piece in _read_pieces(file)]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{table} cannot be read as a table: {' '.join(str(error).split())}") from error
        self._ends = list(accumulate(piece.num_rows for piece in self._pieces))
        self.columns = self._common_columns()
        self._cached: tuple[int, str, pa.ChunkedArray] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._ends[-1] if self._ends else 0

    def column(self, name: str) -> list[Any]:
        """Return a column's values, None where missing; UserError if there is no such column."""
        _check_column(self, name)
        return [value for piece in self._pieces for value in piece.read(name).to_pylist()]

    def image(self, row: int, column: str) -> bytes | Path | None:
        """Return an image's file bytes or its path (not checked to exist), None where missing.

        Raises:
            BadInput: the cell holds neither, or its relative path leaves the table's folder.
        """
        _check_column(self, column)
        number = bisect_right(self._ends, row)
        if self._cached is None or self._cached[:2] != (number, column):
            self._cached = (number, column, self._pieces[number].read(column))
        start = self._ends[number] - self._pieces[number].num_rows
        return self._image_value(self._cached[2][row - start].as_py())

    def files(self, image_column: str | None) -> dict[str, Path]:
        """Return the table's files and, where image cells are paths, the images, by relative name."""
        found = {file.name: file for file in self._files}
        if image_column is None or image_column not in self.columns or self._holds_bytes(image_column):
            return found
        for row in range(len(self)):
            try:
                value = self.image(row, image_column)
            except BadInput:
                continue  # not a file, and `prepare` reports it
            if isinstance(value, Path):
                found[_relative_name(value, self.root)] = value
        return found

    def _holds_bytes(self, column: str) -> bool:
        kinds = {piece.schema.field(column).type for piece in self._pieces}
        return all(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in kinds)

    def _image_value(self, value: Any) -> bytes | Path | None:
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None or isinstance(value, bytes):
            return value or None
        if not isinstance(value, str):
            raise BadInput(f"the image cell is a {type(value).__name__}; expected image bytes or a path")
        if not value:
            return None
        path = Path(value)
        if not path.is_absolute() and not (self.root / path).resolve().is_relative_to(self.root.resolve()):
            raise BadInput(f"the path {value!r} leaves the folder {self.root}; set the source's root")
        return self.root / path

    def _common_columns(self) -> list[str]:
        first, *others = [piece.schema.names for piece in self._pieces] or [[]]
        for names in others:
            if set(names) != set(first):
                odd = sorted(set(names) ^ set(first))
                raise UserError(f"{self.name}: its files differ in column {odd[0]!r}; give all the same columns")
        return list(first)


class ImageFolderSource:
    """Images in ``class/file`` or ``split/class/file``; columns ``image`` (path), ``label`` and maybe ``split``."""

    def __init__(self, path: str, *, base: Path) -> None:
        """List the images, in order of path; files that are not named like images are left out.

        Raises:
            UserError: the folder is missing or holds no image at the expected depth.
        """
        self.folder = base / path
        self.name = str(self.folder)
        if not self.folder.is_dir():
            raise UserError(f"no folder {self.folder}; give one that holds class/file or split/class/file")
        top = [entry.name for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        has_splits = bool(top) and set(top) <= set(SPLIT_FOLDERS)
        pattern = "*/*/*" if has_splits else "*/*"
        found = sorted(path for path in self.folder.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"{self.folder} holds no image at {'split/class' if has_splits else 'class'}/file")
        self._columns = {
            "image": [path.relative_to(self.folder).as_posix() for path in found],
            "label": [path.parent.name for path in found],
        }
        if has_splits:
            self._columns["split"] = [path.parent.parent.name for path in found]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._columns)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._columns["image"])

    def column(self, name: str) -> list[Any]:
        """Return a column's values; UserError if there is no such column."""
        _check_column(self, name)
        return self._columns[name]

    def image(self, row: int, column: str) -> bytes | Path | None:
        """Return an image's path."""
        return self.folder / self.column(column)[row]

    def files(self, image_column: str | None) -> dict[str, Path]:
        """Return the images by relative name."""
        return {name: self.folder / name for name in self._columns["image"]}


SOURCES: dict[str, Callable[..., Source]] = {"table": TableSource, "image_folder": ImageFolderSource}


def open_source(part: Part, base: Path) -> Source:
    """Open the source that a recipe names.

    Args:
        part: ``type`` (a name in ``SOURCES``) and that source's parameters.
        base: folder that relative paths start from.

    Raises:
        UserError: unknown type or parameter, a parameter missing or not a string, or the source's own reasons.
    """
    for name, value in part.params.items():
        if not isinstance(value, str):
            raise UserError(f"data.source: {name} is {value!r}; expected a string")
    source: Source = build_part(SOURCES, part, "data.source", base=base)
    return source


class _Piece:
    """Rows that are read together: a Parquet row group, or a whole CSV or JSONL file."""

    def __init__(self, schema: pa.Schema, num_rows: int, read: Callable[[str], pa.ChunkedArray]) -> None:
        self.schema, self.num_rows, self.read = schema, num_rows, read


def _read_pieces(file: Path) -> list[_Piece]:
    if file.suffix == ".parquet":
        parquet = pa_parquet.ParquetFile(file, memory_map=True)
        groups = range(parquet.metadata.num_row_groups)
        counts = [parquet.metadata.row_group(group).num_rows for group in groups]
        return [_Piece(parquet.schema_arrow, counts[g], partial(_read_group, parquet, g)) for g in groups]
    if file.suffix in (".csv", ".tsv"):
        delimiter = pa_csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ",", newlines_in_values=True)
        table = pa_csv.read_csv(file, parse_options=delimiter)
    else:
        table = pa_json.read_json(file)
    return [_Piece(table.schema, table.num_rows, table.column)]


def _read_group(parquet: pa_parquet.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
    return parquet.read_row_group(group, columns=[column]).column(column)


def _table_files(table: Path) -> list[Path]:
    known = (".parquet", ".csv", ".tsv", ".jsonl")
    if table.is_dir():
        files = sorted(table.glob("*.parquet"))
        if not files:
            raise UserError(f"folder {table} holds no .parquet file; name a table file or a folder of Parquet files")
        return files
    if not table.is_file():
        raise UserError(f"no table {table}; give a {', '.join(known)} file or a folder of Parquet files")
    if table.suffix not in known:
        raise UserError(f"{table} has the unknown suffix {table.suffix!r}; {nearest(table.suffix, known)}")
    return [table]


def _sample_folder(path: str) -> Path:
    samples = Path(str(resources.files("distill.data"))) / "samples"
    known = [entry.parent.name for entry in samples.glob("*/*.parquet")]
    name = path.removeprefix(SAMPLE_PREFIX)
    if name not in known:
        raise UserError(f"no packaged sample {name!r}; {nearest(name, set(known))}")
    return samples / name


def _check_column(source: Source, name: str) -> None:
    if name not in source.columns:
        raise UserError(f"{source.name} has no column {name!r}; {nearest(name, source.columns)}")


def _relative_name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
