"""The modalities that are stored as arrays of one shape, and how their values are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from distill.data_config import DataConfig
from distill.formats.audio import AudioFormat
from distill.formats.base import BadInput, Format
from distill.formats.image import ImageFormat
from distill.formats.series import SeriesFormat
from distill.formats.tabular import TabularFormat
from distill.formats.video import VideoFormat

FORMATS: dict[str, type[Format]] = {
    "image": ImageFormat,
    "audio": AudioFormat,
    "video": VideoFormat,
    "series": SeriesFormat,
    "tabular": TabularFormat,
}
TEXT, TABULAR, SERIES = "text", "tabular", "series"
MODALITIES = (*FORMATS, TEXT)
MEDIA = tuple(name for name in FORMATS if name != TABULAR)
"""Modalities whose values are one cell each: a file, or the numbers of a series."""

__all__ = [
    "FORMATS",
    "MEDIA",
    "MODALITIES",
    "SERIES",
    "TABULAR",
    "TEXT",
    "BadInput",
    "Format",
    "formats_of",
    "from_json",
    "to_json",
]


def formats_of(config: DataConfig) -> dict[str, Format]:
    """The formats of a recipe's modalities, without what training rows will tell."""
    crop = config.image_fit == "crop"
    columns = config.columns(TABULAR)
    found: dict[str, Format] = {
        "image": ImageFormat(config.working_size, crop),
        "audio": AudioFormat(config.audio.sample_rate, config.audio.seconds),
        "video": VideoFormat(config.working_size, config.video.frames, crop),
        "series": SeriesFormat(config.series.channels, config.series.steps),
        TABULAR: TabularFormat(
            numbers=tuple(name for name in columns if name not in config.tabular.categories),
            categories=tuple(name for name in columns if name in config.tabular.categories),
            code_size=config.tabular.max_categories + 1,
        ),
    }
    return {name: found[name] for name in config.modalities if name in found}


def to_json(formats: Mapping[str, Format]) -> dict[str, Any]:
    """What :func:`from_json` reads."""
    return {name: asdict(item) for name, item in formats.items()}


def from_json(content: Mapping[str, Mapping[str, Any]]) -> dict[str, Format]:
    """Formats from JSON values.

    Raises:
        KeyError: no such modality.
        TypeError: a field lacks, is unknown, or has a value of another kind.
    """
    return {
        name: FORMATS[name](**{field: _tuples(value) for field, value in item.items()})
        for name, item in content.items()
    }


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
