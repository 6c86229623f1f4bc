"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) for benchmarks: its files, and a student and teacher for it."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import students
from distill.contracts import TEST, TRAIN, UserError
from distill.data.prepared import PreparedData, write_prepared
from distill.formats.image import ImageFormat
from distill.fusion import ConcatFusion
from distill.multimodal import MultimodalModel
from distill.tasks import LinearHead

SIZE, CLASSES = 28, 10
TASK = "label"
FILES = {TRAIN: "train", TEST: "t10k"}


def read_idx(folder: Path, split: str = TRAIN, rows: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read images (uint8 [N, 28, 28]) and labels (int64 [N]) of the IDX files somewhere below a folder.

    Args:
        folder: where to look.
        split: train (60,000 rows) or test (10,000).
        rows: how many of the first ones; all where None.

    Raises:
        UserError: a file is missing, or there are several of its name.
    """
    images = np.frombuffer(_content(folder, f"{FILES[split]}-images-idx3-ubyte.gz"), np.uint8, offset=16)
    labels = np.frombuffer(_content(folder, f"{FILES[split]}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    return images.reshape(-1, SIZE, SIZE)[:rows], labels[:rows].astype(np.int64)


def _content(folder: Path, name: str) -> bytes:
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        raise UserError(f"{folder}: {len(found)} files {name} below it, expected one; name the folder of Fashion-MNIST")
    return gzip.decompress(found[0].read_bytes())


def write_images(
    folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], split: Sequence[str]
) -> PreparedData:
    """Write grey images (uint8 [N, 28, 28]) with labels and splits as prepared data of three channels, and open it."""
    rows = len(images)
    write_prepared(
        folder,
        ids=np.arange(rows),
        split=split,
        texts=[""] * rows,
        present={"image": np.ones(rows, bool)},
        targets={TASK: labels},
        labels={TASK: [str(code) for code in range(CLASSES)]},
        arrays={"image": np.repeat(images[:, None], 3, axis=1)},
        formats={"image": ImageFormat(images.shape[-1])},
    )
    return PreparedData.open(folder)


def grey_student(seed: int = 0) -> MultimodalModel:
    """A ConvNet of 24,250 parameters with one head."""
    return _image_model([16, 32, 48], [0, 0, 0], 32, seed)


def grey_teacher(seed: int = 0) -> MultimodalModel:
    """One of about 500,000."""
    return _image_model([32, 64, 128], [1, 1, 1], 64, seed)


def _image_model(widths: list[int], blocks: list[int], dim: int, seed: int) -> MultimodalModel:
    torch.manual_seed(seed)
    encoders: Any = {"image": students.ConvNet(widths=widths, blocks=blocks)}
    heads: Any = {TASK: LinearHead(dim, CLASSES)}
    return MultimodalModel(encoders, ConcatFusion(["image"], dim), heads, {}, dim=dim, embedding_dim=dim)
