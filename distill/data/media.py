"""The media of rows, decoded once: checked, and written as arrays that are memory-mapped later."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill import runs
from distill.data.columns import Cell, Source
from distill.data.rows import EMPTY, IN_ROW, Keys, Rows, row_keys
from distill.data.scratch import chunks, scratch
from distill.formats import BadInput, Format
from distill.formats.base import Arrays

AHEAD = 16  # rows a thread decodes before they are needed: what is decoded waits in memory
SHOWN = 256  # rows after which progress is told
WHOLE = 2**26  # bytes of a file that is read whole; of a larger one only what is needed
STREAMED = ("image", "audio", "video")
"""Modalities that may be decoded when they are read instead."""

Write = Callable[[NDArray[Any]], None]


class Medium(NamedTuple):
    """A modality that has a column of media.

    Attributes:
        column: of the source.
        format: what its cells become.
    """

    column: str
    format: Format


def array_file(folder: Path, name: str) -> Path:
    """Where an input of models is kept."""
    return folder / f"{name}.npy"


def kept_arrays(modality: str, format: Format, *, decode_once: bool) -> list[str]:
    """The arrays of a modality that are written; its length where the rest is decoded when it is read."""
    return [name for name in format.arrays if decode_once or modality not in STREAMED or name != modality]


def write_media(
    media: dict[str, Medium],
    source: Source,
    rows: Rows,
    folder: Path,
    *,
    decode_once: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Keys], dict[str, list[int]]]:
    """Decode the media of usable rows, mark rows that are bad and modalities that are present, and write the arrays.

    Args:
        media: modality -> its column and format.
        source: where they are.
        rows: whose ``bad`` and ``present`` are marked.
        folder: where to.
        decode_once: write all arrays; else those alone that have to be known before.
        progress: called with (rows done, rows in all).

    Returns:
        modality -> a hash of each row's file, [N, 2]; of absent ones, of their row. What looks wrong, such as
        "audio: silent" -> the rows.
    """
    total = len(source)
    known = [values for modality, values in rows.present.items() if modality not in media]
    doubts: dict[str, list[int]] = {}
    digests = {modality: scratch(rows.folder, (total, 2), np.uint64) for modality in media}
    usable = (row for part in chunks(total) for row in (part.start + np.flatnonzero(~rows.bad.flags[part])).tolist())
    to_do = total - rows.bad.count()
    arrays = {name: shape for item in media.values() for name, shape in item.format.arrays.items()}
    kept = [name for m, item in media.items() for name in kept_arrays(m, item.format, decode_once=decode_once)]
    runs.check_disk(folder, total * sum(np.dtype(arrays[name][0]).itemsize * _size(arrays[name][1]) for name in kept))
    with ExitStack() as files:
        write = {
            name: files.enter_context(_array_file(array_file(folder, name), total, *arrays[name])) for name in kept
        }
        for done, (row, found) in enumerate(_decoded(source, media, usable), start=1):
            bad = next(((str(item), m) for m, item in found.items() if isinstance(item, BadInput)), None)
            if bad:
                rows.bad.add(row, bad[0], media[bad[1]].column)
            elif not any(found.values()) and not any(values[row] for values in known):
                rows.bad.add(row, EMPTY, IN_ROW)
            else:
                for modality, item in found.items():
                    assert not isinstance(item, BadInput)
                    rows.present[modality][row] = item is not None
                    digests[modality][row] = row_keys([row])[0] if item is None else item[1]
                    if item is not None and (doubt := media[modality].format.doubt(item[0])):
                        doubts.setdefault(f"{modality}: {doubt}", []).append(row)
                    for name, (dtype, shape) in media[modality].format.arrays.items():
                        if name in write:
                            write[name](np.zeros(shape, dtype) if item is None else item[0][name])
            if progress and (done % SHOWN == 0 or done == to_do):
                progress(done, to_do)
    return digests, doubts


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


@contextmanager
def _array_file(path: Path, most: int, dtype: str, shape: tuple[int, ...]) -> Iterator[Write]:
    """A function that appends a row to a ``.npy`` file, which will hold ``most`` of them or fewer."""
    written = 0

    def write(row: NDArray[Any]) -> None:
        nonlocal written
        file.write(row.astype(dtype, copy=False).tobytes())
        written += 1

    path.unlink(missing_ok=True)
    with runs.atomic(path) as temporary, open(temporary, "wb") as file:
        header_bytes = _write_header(file, (most, *shape), dtype)
        yield write
        file.seek(0)
        assert _write_header(file, (written, *shape), dtype) == header_bytes


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: str) -> int:
    """Write a ``.npy`` header; numpy leaves room in it for the first dimension, so its length is constant."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.tell()


Decoded = tuple[Arrays, Keys] | BadInput | None


def _decoded(source: Source, media: dict[str, Medium], rows: Iterator[int]) -> Iterator[tuple[int, dict[str, Decoded]]]:
    """Yield (row, modality -> its arrays and the hash of its file | why it is bad | None if absent), in order."""

    def read(row: int, column: str) -> Cell | BadInput:
        try:
            return source.media(row, column)
        except BadInput as error:
            return error

    def decode(cells: list[Cell | BadInput]) -> dict[str, Decoded]:
        return {name: _decode(cell, item.format) for (name, item), cell in zip(media.items(), cells, strict=True)}

    workers = os.cpu_count() or 1
    waiting: deque[tuple[int, Future[dict[str, Decoded]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for row in rows:
            waiting.append((row, pool.submit(decode, [read(row, item.column) for item in media.values()])))
            if len(waiting) > AHEAD * workers:
                first, found = waiting.popleft()
                yield first, found.result()
        while waiting:
            first, found = waiting.popleft()
            yield first, found.result()


def _decode(value: Cell | BadInput, format: Format) -> Decoded:
    if value is None or isinstance(value, BadInput):
        return value
    try:
        if isinstance(value, list):
            arrays = format.read(value)
            return arrays, _key(hashlib.blake2b(repr(value).encode(), digest_size=16))
        if isinstance(value, Path) and value.exists() and not value.is_file():
            return BadInput("it is a folder, a device or a pipe; media are plain files")  # which may have no end
        if isinstance(value, Path) and value.is_file() and value.stat().st_size > WHOLE:
            with open(value, "rb") as file:
                key = _key(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)))
            return format.read(value), key
        content = value.read_bytes() if isinstance(value, Path) else value
        return format.read(content), _key(hashlib.blake2b(content, digest_size=16))
    except BadInput as error:
        return error
    except OSError as error:
        return BadInput(f"the file cannot be read: {error.strerror}")


def _key(digest: Any) -> Keys:
    return np.frombuffer(digest.digest(), "<u8")
