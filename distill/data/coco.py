"""Images with several captions each, laid out as MS COCO's are (Chen et al. 2015, arXiv 1504.00325)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill.contracts import UserError
from distill.data.folders import ListedFiles
from distill.data.remote import Place

ANNOTATIONS = "annotations"
NAMED = re.compile(r"captions_(([a-z]+)\d*)\.json")
"""A file of captions; its groups are the folder of its images and the split."""


class CocoCaptionsSource(ListedFiles):
    """``annotations/captions_train2017.json`` and the like, with images in ``train2017/``: a row for each caption.

    Columns: ``image`` (path), ``caption``, ``image_id``, ``id`` (the caption's) and ``split``. COCO keeps the captions
    of its test images to itself, so the rows of ``val`` are those that the report is about; ``data.hold_out`` takes
    some of the others to validate by, and ``data.group: image_id`` keeps an image's captions together.
    """

    modality = "image"

    def __init__(self, path: str, val: str = "test", *, base: Path) -> None:
        """Read the captions; images are not looked at yet.

        Args:
            path: the folder, relative to ``base``.
            val: the split that the rows of COCO's ``val`` are.
            base: folder that relative paths start from.

        Raises:
            UserError: there is no file of captions, or one is damaged.
        """
        folder = base / path
        self._files = sorted(file for file in (folder / ANNOTATIONS).glob("captions_*.json") if NAMED.match(file.name))
        if not self._files:
            raise UserError(f"{folder} holds no {ANNOTATIONS}/captions_SPLIT.json; give a folder laid out as COCO's")
        table = pa.concat_tables([_read(file, val) for file in self._files])
        if pc.count_distinct(table["id"]).as_py() < len(table):  # an image could be in train and in test
            names = ", ".join(file.name for file in self._files)
            raise UserError(f"{folder}: caption ids repeat in {names}; keep the files of one year in {ANNOTATIONS}")
        super().__init__(folder, table)

    def identity(self, media: Any) -> dict[str, str | None]:
        """Return the hashes of images and of the files of captions, by relative name."""
        own = {f"{ANNOTATIONS}/{file.name}": Place(file).identity() for file in self._files}
        return super().identity(media) | own


def _read(file: Path, val: str) -> pa.Table:
    """The rows of one file, in its order."""
    named = NAMED.match(file.name)
    assert named is not None
    images, split = named.groups()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {int(entry["id"]): str(entry["file_name"]) for entry in content["images"]}
        numbers = pa.array([int(entry["id"]) for entry in content["annotations"]], pa.int64())
        shown = pa.array([int(entry["image_id"]) for entry in content["annotations"]], pa.int64())
        texts = pa.array([entry["caption"].strip() for entry in content["annotations"]], pa.string())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{file} is no file of COCO captions: {type(error).__name__} {error}; fetch it again"
        ) from error
    for number, image in zip(numbers.to_pylist(), shown.to_pylist(), strict=True):
        if image not in names or Path(names[image]).name != names[image] or names[image] in ("", ".."):
            raise UserError(f"{file}: caption {number} is of image {image}, of which it names no file; fetch it again")
    return pa.table(
        {
            "image": [f"{images}/{names[image]}" for image in shown.to_pylist()],
            "caption": texts,
            "image_id": shown,
            "id": numbers,
            "split": pa.array([val if split == "val" else split] * len(numbers), pa.string()),
        }
    )
