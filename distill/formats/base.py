"""What the formats of all modalities have in common."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray

from distill.contracts import UserError

Content = bytes | str | Path
"""A file: what is in it, or its path."""
Arrays = dict[str, NDArray[Any]]


class BadInput(UserError):
    """A row's image, sound or the like that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Format:
    """How the values of one modality become arrays of one shape: the same in training and in ``predict``.

    Its fields are JSON values, so that a bundle can hold them.
    """

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Input of models -> dtype and shape of a row, as :data:`~distill.contracts.INPUTS` has them."""
        raise NotImplementedError

    def lacks(self, value: Any) -> bool:
        """Whether a row's value stands for an absent modality."""
        return value is None

    def doubt(self, arrays: Arrays) -> str:
        """What makes a row's arrays look wrong though they can be read, such as silence; empty where nothing does."""
        return ""

    @property
    def parameters(self) -> dict[str, int]:
        """What encoders of the modality may ask for as arguments."""
        return {}

    def read(self, value: Any) -> Arrays:
        """Return a row's arrays.

        Args:
            value: what the modality's row holds, not absent.

        Raises:
            BadInput: the value cannot be used.
            UserError: a package that it needs is not installed.
        """
        raise NotImplementedError


class _Unnamed(io.BufferedReader):
    """A file that does not tell its name."""

    @property
    def name(self) -> str:
        raise AttributeError


def opened(source: Content) -> IO[bytes]:
    """A file to read from; libraries are not told its name, from which some would guess what it holds."""
    return io.BytesIO(source) if isinstance(source, bytes) else _Unnamed(io.FileIO(source))


def check_content(value: Any, what: str) -> Content:
    """Return a file, or refuse anything else.

    Raises:
        BadInput: neither bytes nor a path, or no file lies there.
    """
    if not isinstance(value, bytes | str | Path):
        raise BadInput(f"{what} is a {type(value).__name__}; give file bytes, a path or an array")
    try:
        if not isinstance(value, bytes) and not Path(value).is_file():
            raise BadInput(f"no such {what} file: {value!s}")
    except OSError as error:
        raise BadInput(f"no such {what} file: {error.strerror}") from error
    return value


def reason(error: Exception) -> str:
    """An exception's text on one line and without addresses, so that reports stay comparable."""
    return re.sub(r" ?<_io.BytesIO[^>]*>:?", "", " ".join(str(error).split()))
