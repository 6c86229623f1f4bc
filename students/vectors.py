"""Word vectors in text files: GloVe's, one word and its numbers a line, and word2vec's, with a line of sizes before."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.contracts import UserError

GZIP = b"\x1f\x8b"


def read_vectors(path: Path, words: Container[str], dim: int) -> dict[str, NDArray[np.float32]]:
    """Read the vectors of some words from a text file, which may be compressed by gzip.

    A line is a word and its numbers, separated by single spaces; the first may be ``COUNT DIM``. Numbers are read of
    the words that are asked for alone. Of a word that comes twice the first line counts.

    Args:
        path: the file, in UTF-8.
        words: those that are asked for.
        dim: numbers a word.

    Returns:
        word -> float32 [dim], for those that the file has.

    Raises:
        UserError: the file is not there or not readable, it ends before the words that it announces, its vectors are of
            another size, or a line has another number of values or one that is no finite number.
    """
    found: dict[str, NDArray[np.float32]] = {}
    announced, lines = None, 0
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            fields = raw.decode("utf-8", errors="replace").rstrip(" \r\n").split(" ")
            if number == 1:
                header = len(fields) == 2 and all(field.isdecimal() for field in fields)
                announced = int(fields[0]) if header else None
                _check_dim(path, int(fields[1]) if header else len(fields) - 1, dim)
                if header:
                    continue
            lines += 1
            if len(fields) != dim + 1:
                _check_spaces(path, number, fields, dim)
            elif fields[0] in words and fields[0] not in found:
                found[fields[0]] = _numbers(path, number, fields[1:])
    if announced is not None and lines < announced:
        raise UserError(f"{path}: it announces {announced} words and has {lines}; get the whole file")
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Iterable[bytes]]:
    """The lines of a file, unpacked if need be."""
    try:
        with open(path, "rb") as plain:
            packed = plain.read(len(GZIP)) == GZIP
            plain.seek(0)
            if not packed:
                yield plain
                return
            with gzip.open(plain) as unpacked:
                yield unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable as word vectors: {error}; give a GloVe or word2vec text file") from error


def _check_dim(path: Path, found: int, dim: int) -> None:
    if found < 2:
        raise UserError(f"{path}: its first line is no word with numbers; give word vectors in text format")
    if found != dim:
        raise UserError(
            f"{path}: its vectors have {found} numbers, and the encoder's table is {dim} wide; set the encoder's dim "
            f"to {found}, or give other vectors"
        )


def _check_spaces(path: Path, number: int, fields: list[str], dim: int) -> None:
    """A line of more fields is right where its word has spaces in it, as some of GloVe's have."""
    if len(fields) < dim + 1 or _is_number(fields[-dim - 1]):
        raise UserError(f"{path}: line {number} has {len(fields) - 1} values, expected {dim}; mend or remove it")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(path: Path, number: int, fields: list[str]) -> NDArray[np.float32]:
    for field in fields:
        if not _is_number(field) or not np.isfinite(float(field)):
            raise UserError(f"{path}: line {number} has {field!r} where a number is expected; mend or remove it")
    return np.array(fields, dtype=np.float32)
