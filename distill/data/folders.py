"""Folders of images, sounds or clips, whose names are the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from distill.contracts import UserError
from distill.data.columns import Cell, Piece, check_columns, pieces
from distill.data.remote import Place

SPLIT_FOLDERS = ("train", "valid", "val", "validation", "test")


class ListedFiles:
    """Files of a folder that a table in memory lists, one a row; several rows may have the same file.

    Args:
        folder: where they are.
        table: has the column ``modality`` with paths below the folder.
    """

    modality: str

    def __init__(self, folder: Path, table: pa.Table) -> None:
        self.folder, self.name, self._table = folder, str(folder), table

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._table.column_names)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._table.num_rows

    def read(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield the rows in order; UserError if there is no such column."""
        check_columns(self, columns)
        return pieces(self._table.select(list(columns)))

    def media(self, row: int, column: str) -> Cell:
        """Return a file's path."""
        check_columns(self, [column])
        return self.folder / self._table.column(column)[row].as_py()

    def where(self, row: int, column: str) -> str:
        """Return a file's path."""
        return str(self.media(row, column))

    def identity(self, media: Sequence[str]) -> dict[str, str | None]:
        """Return the files' hashes by relative name."""
        names = self._table.column(self.modality).unique().to_pylist()
        return {name: Place(name, self.folder).identity() for name in names}


class FolderSource(ListedFiles):
    """Files in ``class/file`` or ``split/class/file``; columns: the modality (path), ``label`` and maybe ``split``."""

    suffixes: tuple[str, ...]

    def __init__(self, path: str, *, base: Path) -> None:
        """List the files, in order of path; those that are not named like the modality are left out.

        Raises:
            UserError: the folder is missing or holds no such file at the expected depth.
        """
        folder = base / path
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; give one that holds class/file or split/class/file")
        top = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        has_splits = bool(top) and set(top) <= set(SPLIT_FOLDERS)
        pattern = "*/*/*" if has_splits else "*/*"
        found = sorted(path for path in folder.glob(pattern) if path.suffix.lower() in self.suffixes)
        if not found:
            depth = "split/class" if has_splits else "class"
            raise UserError(f"{folder} holds no {self.modality} at {depth}/file")
        columns = {
            self.modality: [path.relative_to(folder).as_posix() for path in found],
            "label": [path.parent.name for path in found],
        }
        if has_splits:
            columns["split"] = [path.parent.parent.name for path in found]
        super().__init__(folder, pa.table(columns))


class ImageFolderSource(FolderSource):
    """A folder of images."""

    modality = "image"
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class AudioFolderSource(FolderSource):
    """A folder of sounds."""

    modality = "audio"
    suffixes = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")


class VideoFolderSource(FolderSource):
    """A folder of clips; animated images are some."""

    modality = "video"
    suffixes = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif", ".webp")
