"""The columns of a source, read as a recipe says and checked; no image is touched here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.config import DataConfig, nearest
from distill.contracts import IGNORE, SPLITS, TRAIN, UserError
from distill.data.sources import Source
from distill.preprocess import has_text

MODALITIES = ("image", "text")
SPLIT_ALIASES = {"val": "valid", "validation": "valid"}


@dataclass(frozen=True)
class Rows:
    """The columns of a source as a recipe reads them, images aside; all of one length N.

    Attributes:
        source: the source's name, for messages.
        ids: unique integers.
        split: train, valid or test.
        groups: values of the group column; None where there is none.
        texts: empty where absent.
        present: modality -> bool [N].
        targets: task -> class names or numbers; None where missing.
    """

    source: str
    ids: list[int]
    split: list[str]
    groups: list[Any]
    texts: list[str]
    present: dict[str, NDArray[np.bool_]]
    targets: dict[str, list[Any]]

    def take(self, kept: NDArray[np.int64]) -> Rows:
        """Return the rows at these positions."""
        return replace(
            self,
            ids=[self.ids[row] for row in kept],
            split=[self.split[row] for row in kept],
            groups=[self.groups[row] for row in kept],
            texts=[self.texts[row] for row in kept],
            present={modality: values[kept] for modality, values in self.present.items()},
            targets={task: [values[row] for row in kept] for task, values in self.targets.items()},
        )


def read_rows(config: DataConfig, source: Source) -> Rows:
    """Read the columns that a recipe names.

    Raises:
        UserError: a modality is unknown, a column is missing or of a wrong type, an id is used twice, or a split
            is unknown.
    """
    for modality in config.modalities:
        if modality not in MODALITIES:
            raise UserError(f"unknown modality {modality!r} in data.modalities; {nearest(modality, MODALITIES)}")
    for column in [*config.modalities.values(), *config.targets.values(), config.split]:
        if column not in source.columns:
            raise UserError(f"{source.name} has no column {column!r}; {nearest(column, source.columns)}")
    texts = [""] * len(source)
    if "text" in config.modalities:
        column = config.modalities["text"]
        texts = [text if has_text(text) else "" for text in _typed(source, column, str, "a text", optional=True)]
    return Rows(
        source=source.name,
        ids=_read_ids(config, source),
        split=_read_split(config, source),
        groups=source.column(config.group) if config.group else [None] * len(source),
        texts=texts,
        present={"text": np.array([text != "" for text in texts], dtype=bool)} if "text" in config.modalities else {},
        targets={task: _read_labels(source, column) for task, column in config.targets.items()},
    )


def _typed(source: Source, column: str, kind: type, what: str, *, optional: bool) -> list[Any]:
    values = source.column(column)
    for row, value in enumerate(values):
        if not (isinstance(value, kind) and not isinstance(value, bool)) and not (optional and value is None):
            raise UserError(
                f"{source.name}: column {column!r}, row {row}: {value!r} is not {what}; mend it or name another column"
            )
    return values


def _read_ids(config: DataConfig, source: Source) -> list[int]:
    if config.id is None:
        return list(range(len(source)))
    ids: list[int] = _typed(source, config.id, int, "an integer id", optional=False)
    repeated, count = Counter(ids).most_common(1)[0] if ids else (0, 0)
    if count > 1:
        raise UserError(f"{source.name}: column {config.id!r} has id {repeated} {count} times; give each row its own")
    return ids


def _read_split(config: DataConfig, source: Source) -> list[str]:
    names = _typed(source, config.split, str, f"one of {', '.join(SPLITS)}", optional=False)
    names = [SPLIT_ALIASES.get(name, name) for name in names]
    for row, name in enumerate(names):
        if name not in SPLITS:
            raise UserError(
                f"{source.name}: column {config.split!r}, row {row}: unknown split {name!r}; {nearest(name, SPLITS)}"
            )
    return names


def _read_labels(source: Source, column: str) -> list[str | int | bool | None]:
    values = source.column(column)
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 or not kinds <= {str, int, bool}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(f"{source.name}: column {column!r} holds {found}; labels are all strings or all integers")
    return [None if value == "" else value for value in values]


def encode_targets(rows: Rows) -> tuple[dict[str, NDArray[np.int64]], dict[str, list[str]]]:
    """Number each task's classes, in the sorted order of those that the training split has.

    Returns:
        Task -> labels int64 [N], IGNORE where missing; task -> class names in order of label.

    Raises:
        UserError: a split is empty, a class occurs in evaluation only, or a task has fewer than two classes.
    """
    for split in SPLITS:
        if split not in rows.split:
            raise UserError(f"{rows.source} has no usable row of split {split!r}; train, valid and test each need some")
    targets, labels = {}, {}
    for task, values in rows.targets.items():
        pairs = list(zip(rows.split, values, strict=True))
        known = sorted({value for split, value in pairs if split == TRAIN and value is not None})
        code = {value: label for label, value in enumerate(known)}
        for split, value in pairs:
            if value is not None and value not in code:
                raise UserError(
                    f"{rows.source}: task {task!r}: class {str(value)!r} of split {split!r} never occurs in train; "
                    f"move some of its rows to train, or leave the class out"
                )
        if len(known) < 2:
            raise UserError(f"{rows.source}: task {task!r} has {len(known)} class(es) in train; at least 2 are needed")
        targets[task] = np.array([IGNORE if value is None else code[value] for value in values], dtype=np.int64)
        labels[task] = [str(value) for value in known]
    return targets, labels
