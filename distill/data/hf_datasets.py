"""Data sets of the Hugging Face ``datasets`` library, on disk or from the Hub: memory-mapped Arrow files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill.config import one_line
from distill.contracts import UserError
from distill.data.columns import PIECE, Cell, Piece, check_columns, media_cell, media_files
from distill.data.remote import Place
from distill.formats.base import BadInput

HUB_PREFIX = "hub:"
SPLIT = "split"
STATE_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")


class HFDatasetSource:
    """A folder that ``save_to_disk`` wrote, or ``hub:ID``; the names of splits are the column ``split``.

    Media stay undecoded, and a column of class labels holds their names. A data set without splits needs a column
    that says them; one that has such a column keeps it.
    """

    def __init__(self, path: str, config: str | None = None, root: str | None = None, *, base: Path) -> None:
        """Open the data set.

        Args:
            path: the folder, relative to ``base``, or ``hub:ID``.
            config: name of the Hub data set's configuration.
            root: folder that relative paths of media start from; the data set's folder by default.
            base: folder that relative paths start from.

        Raises:
            UserError: there is no such data set, it cannot be loaded, or its splits differ in their columns.
        """
        self.name, self._hub = (path if path.startswith(HUB_PREFIX) else str(base / path)), path.startswith(HUB_PREFIX)
        self._folder = None if self._hub else base / path
        if config is not None and not self._hub:
            raise UserError(f"data.source: config {config!r} is for hub:ID, and {self.name} is a folder; leave it out")
        found = _load(path.removeprefix(HUB_PREFIX), config) if self._hub else _load_folder(base / path)
        parts = dict(found) if isinstance(found, dict) else {"": found}
        if not parts:
            raise UserError(f"{self.name} is a data set without splits; give one that has rows")
        self._names, self._parts = list(parts), [part.with_format("arrow") for part in parts.values()]
        self._ends = list(accumulate(len(part) for part in self._parts))
        self._features = self._parts[0].features
        for name, part in parts.items():
            if part.features != self._features:
                raise UserError(
                    f"{self.name}: split {name!r} has other columns than {self._names[0]!r}; make them alike"
                )
        self._adds_split = self._names != [""] and SPLIT not in self._features
        self._media: dict[str, list[Any]] = {}  # column -> the parts with it alone: selecting takes a millisecond
        self._root = Place(root, base) if root else Place(self._folder or base)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [*self._features, *([SPLIT] if self._adds_split else [])]

    def __len__(self) -> int:
        """Return the number of rows of all splits."""
        return self._ends[-1]

    def read(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield the rows in order, split by split; UserError if there is no such column."""
        check_columns(self, columns)
        stored = [name for name in columns if name in self._features]
        for name, part in zip(self._names, self._parts, strict=True):
            chosen = part.select_columns(stored) if stored else part
            for start in range(0, len(part), PIECE):
                rows = min(PIECE, len(part) - start)
                table = chosen[start : start + rows]
                found = {column: self._named(column, table.column(column)) for column in stored} if stored else {}
                if self._adds_split and SPLIT in columns:
                    found[SPLIT] = pa.array([name] * rows)
                yield Piece(pa.table(found))

    def media(self, row: int, column: str) -> Cell:
        """Return a file's bytes or its path, a list of numbers, None where missing; BadInput on any other value."""
        if column not in self._media:
            check_columns(self, [column])
            self._media[column] = [part.select_columns([column]) for part in self._parts]
        number = bisect_right(self._ends, row)
        part = self._media[column][number]
        return media_cell(part[row - self._ends[number] + len(part)].column(column)[0].as_py(), self._root)

    def where(self, row: int, column: str) -> str:
        """Return a file's path, or its column and row."""
        try:
            value = self.media(row, column)
        except BadInput:
            value = None
        return str(value) if isinstance(value, Path) else f"column {column!r}, row {row}"

    def identity(self, media: Sequence[str]) -> dict[str, str | None]:
        """Return hashes of what describes the data set and of files that it names, and the sizes of its files."""
        if self._folder is None:
            files = [Path(file["filename"]) for part in self._parts for file in part.cache_files]
            own = {f"{file.parent.name}/{file.name}": f"{file.stat().st_size}" for file in files}
            return {self.name: None, **own, **self._files(media)}
        found: dict[str, str | None] = self._files(media)
        for file in sorted(self._folder.rglob("*")):
            if file.is_file():
                name = file.relative_to(self._folder).as_posix()
                found[name] = Place(file).identity() if file.name in STATE_FILES else f"{file.stat().st_size}"
        return found

    def _files(self, media: Sequence[str]) -> dict[str, str | None]:
        columns = [column for column in media if column in self._features]
        found = [media_files(self.read([column]), column, self._root) for column in columns]
        return {f"image {name}": value for files in found for name, value in files.items()}

    def _named(self, column: str, values: Any) -> Any:
        """A column with the names of its class labels in place of their numbers; -1, as usual there, is missing."""
        names = getattr(self._features[column], "names", None)
        if names is None:
            return values
        numbers = values.combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)
        if len(numbers) and int(numbers.max()) >= len(names):
            raise UserError(
                f"{self.name}: column {column!r} has label {numbers.max()} of {len(names)} classes; mend it"
            )
        return pa.array(names, pa.string()).take(pa.array(numbers, mask=np.asarray(numbers) < 0))


def _load_folder(folder: Path) -> Any:
    from datasets import load_from_disk

    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give one that save_to_disk wrote, or hub:ID")
    try:
        return load_from_disk(str(folder))
    except Exception as error:  # the library raises types of its own and pyarrow's
        raise UserError(
            f"{folder} cannot be read as a data set: {one_line(error)}; give a folder that save_to_disk wrote"
        ) from error


def _load(name: str, config: str | None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config)
    except Exception as error:  # the library raises types of its own and the network's
        raise UserError(
            f"data set {HUB_PREFIX}{name} cannot be loaded: {one_line(error)}; check its name, config and your access"
        ) from error
