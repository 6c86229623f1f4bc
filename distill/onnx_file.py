"""What an ONNX file must not hold, told from its bytes without the ``onnx`` package: weights that lie elsewhere.

A bundle is one file. A tensor with external data names another one, anywhere on the machine that opens it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from distill.contracts import UserError

MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Kind of message -> number of a field -> the kind of message in it, of those that lead to tensors (onnx.proto)."""
NAME, EXTERNAL_DATA, DATA_LOCATION = 8, 13, 14
"""Fields of a tensor."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf."""
LARGEST_KEY = 2**32
"""Keys have 32 bits: of longer ones, which no writer makes, readers cut the rest, and would see another field."""
MAX_DEPTH = 64
"""Messages inside each other, at most."""


def check_one_file(path: Path) -> None:
    """Refuse an ONNX file that is not whole in itself; nothing but its structure is read.

    Raises:
        UserError: it is no whole ONNX file, or one of its tensors lies in another file.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = next(_external(data, 0, len(data), "model", 0), None)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is no whole ONNX file; copy or export it again") from error
    if found is not None:
        raise UserError(f"{path} has weights outside itself ({found!r}), which are never opened; export it in one file")


def _external(data: mmap.mmap, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    """Names of the tensors of a message that lie elsewhere."""
    if depth > MAX_DEPTH:
        raise ValueError("messages are nested too deeply")
    name, elsewhere = "", False
    for field, wire, first, last in _fields(data, start, end):
        if kind == "tensor":
            if field == NAME and wire == BYTES:
                name = data[first:last].decode("utf-8", "replace")
            # the place is a number: 0 is the file itself
            elsewhere |= field == EXTERNAL_DATA or (field == DATA_LOCATION and any(data[first:last]))
        elif wire == BYTES and field in MESSAGES[kind]:
            yield from _external(data, first, last, MESSAGES[kind][field], depth + 1)
    if elsewhere:
        yield name


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field's number and wire type, and where its value begins and ends."""
    while start < end:
        key, start = _varint(data, start, end)
        if key >= LARGEST_KEY:
            raise ValueError(f"key {key}")
        field, wire = key >> 3, key & 7
        if wire == VARINT:
            _, last = _varint(data, start, end)
        elif wire == BYTES:
            size, start = _varint(data, start, end)
            last = start + size
        elif wire in (FIXED64, FIXED32):
            last = start + (8 if wire == FIXED64 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if last > end or not field:
            raise ValueError("a field ends behind its message")
        yield field, wire, start, last
        start = last


def _varint(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for place in range(start, min(end, start + 10)):
        value |= (data[place] & 127) << 7 * (place - start)
        if data[place] < 128:
            return value, place + 1
    raise ValueError("a number has no end")
