"""Folders of images, whose names are the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from distill.contracts import UserError
from distill.data.columns import Piece, check_columns, pieces
from distill.data.remote import Place

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = ("train", "valid", "val", "validation", "test")


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
        columns = {
            "image": [path.relative_to(self.folder).as_posix() for path in found],
            "label": [path.parent.name for path in found],
        }
        if has_splits:
            columns["split"] = [path.parent.parent.name for path in found]
        self._table = pa.table(columns)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._table.column_names)

    def __len__(self) -> int:
        """Return the number of images."""
        return self._table.num_rows

    def read(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield the rows in order; UserError if there is no such column."""
        check_columns(self, columns)
        return pieces(self._table.select(list(columns)))

    def image(self, row: int, column: str) -> bytes | Path | None:
        """Return an image's path."""
        check_columns(self, [column])
        return self.folder / self._table.column(column)[row].as_py()

    def where(self, row: int, column: str) -> str:
        """Return an image's path."""
        return str(self.image(row, column))

    def identity(self, image_column: str | None) -> dict[str, str | None]:
        """Return the images' hashes by relative name."""
        names = self._table.column("image").to_pylist()
        return {name: Place(name, self.folder).identity() for name in names}
