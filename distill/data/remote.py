"""Files on this machine or in an object store: a path, or a URL that fsspec has a driver for (``s3://...``)."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from distill import runs
from distill.config import one_line, shortened
from distill.contracts import UserError
from distill.formats.base import BadInput


def is_url(path: str) -> bool:
    """Whether a path names a remote file system."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


class Place:
    """A file or a folder, local or remote.

    Attributes:
        path: its path, without the protocol where it is remote.
        local: the path of a local one, None for a remote one.
    """

    def __init__(self, path: str | Path, base: Path = Path()) -> None:
        """Take a path relative to ``base``, or a URL.

        Raises:
            UserError: no driver is installed for the URL's protocol, or it does not let us in.
        """
        self._name = str(path) if is_url(str(path)) else str(base / path)
        self.local: Path | None = None if is_url(str(path)) else base / path
        self._pattern = str(Path(glob.escape(str(base))) / path)  # brackets in the name of the base are no pattern
        self._system: Any
        self._system, self.path = (None, self._name) if self.local else _remote(self._name)

    def __str__(self) -> str:
        """Return the path or the URL."""
        return self._name

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name if self.local is None else self.local.name

    @property
    def suffix(self) -> str:
        """The last suffix of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Place:
        """The folder that it lies in."""
        return Place(self._name.rstrip("/").rpartition("/")[0] if self.local is None else self.local.parent)

    def is_file(self) -> bool:
        """Whether it is a file."""
        return os.path.isfile(self.local) if self.local is not None else bool(self._call("isfile", self.path))

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self.local.is_dir() if self.local is not None else bool(self._call("isdir", self.path))

    def matching(self, pattern: str) -> list[Place]:
        """Return what lies in the folder and matches a pattern, in order of name."""
        if self.local is not None:
            return [Place(path) for path in sorted(self.local.glob(pattern))]
        return self._found(f"{self.path.rstrip('/')}/{pattern}")

    def _found(self, pattern: str) -> list[Place]:
        return [Place(self._system.unstrip_protocol(path)) for path in sorted(self._call("glob", pattern))]

    def matches(self) -> list[Place]:
        """Return what matches the path, as a pattern that starts from its base, in order of name."""
        if self.local is not None:
            return [Place(path) for path in sorted(glob.glob(self._pattern))]
        return self._found(self.path)

    def open(self) -> Any:
        """Open the file for reading bytes anywhere in it."""
        return open(self.local, "rb") if self.local is not None else self._call("open", self.path, "rb")

    def read(self, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the file's bytes, or those of a range; fewer where it ends before."""
        if self.local is None:
            return bytes(self._call("cat_file", self.path, start=start, end=stop))
        with open(self.local, "rb", buffering=0) as file:
            file.seek(start or 0)
            return file.read() if stop is None else file.read(stop - (start or 0))

    def state(self) -> tuple[int, str]:
        """Return the file's size in bytes, and what changes when it is written: its time, or the store's tag."""
        if self.local is not None:
            found = self.local.stat()
            return found.st_size, str(found.st_mtime_ns)
        return int(self._call("info", self.path)["size"]), str(self._call("ukey", self.path))

    def identity(self) -> str | None:
        """Return a hash of a local file's bytes, or a remote file's state; None if there is none."""
        if not self.is_file():
            return None
        return runs.sha256_file(self.local) if self.local is not None else " ".join(map(str, self.state()))

    def below(self, path: str) -> bytes | Path:
        """Return the path of a file that starts from this folder, or of a remote one its bytes.

        Raises:
            BadInput: a relative path leaves the folder, or a remote file cannot be read.
        """
        if self.local is not None:
            try:
                inside = (self.local / path).resolve().is_relative_to(self.local.resolve())
            except (OSError, ValueError, RuntimeError) as error:
                raise BadInput(f"the path {shortened(path)} cannot be followed: {one_line(error)}") from error
            if not Path(path).is_absolute() and not inside:
                raise BadInput(f"the path {path!r} leaves the folder {self}; set the source's root")
            return self.local / path
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or is_url(path):
            raise BadInput(f"the path {path!r} leaves {self}; set the source's root")
        try:
            return Place(f"{self._name.rstrip('/')}/{path}").read()
        except (UserError, OSError) as error:
            raise BadInput(f"{self}/{path} cannot be read: {one_line(error)}") from error

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return getattr(self._system, method)(*arguments, **options)
        except FileNotFoundError:
            raise UserError(f"no file {self}; check the address") from None
        except Exception as error:  # drivers raise types of their own
            raise UserError(f"{self} cannot be read: {one_line(error)}; check the address and your access") from error


def _remote(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} needs a driver that is not installed: {one_line(error)}") from error
    except Exception as error:  # drivers raise types of their own
        raise UserError(f"{url} cannot be opened: {one_line(error)}; check the address and your access") from error
    return system, str(path)
