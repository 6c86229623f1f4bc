"""What the scripts beside this file share: the packaged emoji sample, its pixels, choices that follow from a row."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "distill" / "data" / "samples" / "emoji"
BACKGROUND = 240
"""A pixel is background where none of its channels is below."""
Row = dict[str, Any]
T = TypeVar("T")


def read_sample() -> list[Row]:
    """The rows of all styles, as scripts/build_emoji_sample.py describes them."""
    return [row for file in sorted(SAMPLE.glob("*.parquet")) for row in pa_parquet.read_table(file).to_pylist()]


def chance(*key: object) -> float:
    """A number in [0, 1) that follows from a key alone, on any machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest(), "big") / 2**48


def chosen(options: Sequence[T], *key: object) -> T:
    """One of some options, each as likely as the others, that follows from a key alone."""
    return options[int(chance(*key) * len(options))]


def pixels_of(content: bytes) -> NDArray[np.uint8]:
    """The pixels of an encoded drawing, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def ink_of(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where pixels [..., 3] are no background."""
    return pixels.min(-1) < BACKGROUND


def write_rows(rows: Iterable[Row], out: Path) -> None:
    """Write rows as a Parquet table, in groups small enough to read an image at random."""
    pa_parquet.write_table(pa.Table.from_pylist(list(rows)), out, row_group_size=512)
