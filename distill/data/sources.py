"""The sources of rows by name: tables, folders of media, COCO captions, Hugging Face data sets, tar shards.

A source says nothing about what a column means: :mod:`distill.data.prepare` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from distill.builders import build_part
from distill.contracts import UserError
from distill.data.coco import CocoCaptionsSource
from distill.data.columns import Source
from distill.data.folders import AudioFolderSource, ImageFolderSource, VideoFolderSource
from distill.data.hf_datasets import HFDatasetSource
from distill.data.tables import TableSource
from distill.data.tar_shards import TarShardSource
from distill.data_config import Part

SOURCES: dict[str, Callable[..., Source]] = {
    "table": TableSource,
    "image_folder": ImageFolderSource,
    "audio_folder": AudioFolderSource,
    "video_folder": VideoFolderSource,
    "coco_captions": CocoCaptionsSource,
    "hf_dataset": HFDatasetSource,
    "tar_shards": TarShardSource,
}
GIVEN = ("base", "folder")  # what a recipe cannot set


def open_source(part: Part, base: Path, folder: Path | None = None) -> Source:
    """Open the source that a recipe names.

    Args:
        part: ``type`` (a name in ``SOURCES``) and that source's parameters.
        base: folder that relative paths start from.
        folder: where a source that has to look through its files first keeps what it found; in memory where absent.

    Raises:
        UserError: unknown type or parameter, a parameter missing or not a string, or the source's own reasons.
    """
    for name, value in part.params.items():
        if not isinstance(value, str):
            raise UserError(f"data.source: {name} is {value!r}; expected a string")
    given = {"base": base, "folder": folder}
    accepted = inspect.signature(SOURCES[part.type]).parameters if part.type in SOURCES else given
    chosen = {name: value for name, value in given.items() if name in accepted}
    source: Source = build_part(SOURCES, part, "data.source", **chosen)
    return source
