"""Prepared data: a record a row, texts and arrays, all memory-mapped, so that opening them takes hardly any memory.

The folder holds ``rows.npy`` (one record a row), ``text.arrow`` (the distinct texts), ``labels.json``, ``formats.json``
and an array ``INPUT.npy`` of each input of models, such as ``image.npy`` (uint8 [N, 3, S, S]), unless it is decoded
when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from distill import runs
from distill.contracts import IGNORE, UserError
from distill.data.columns import Source
from distill.data.media import array_file
from distill.data.scratch import chunks, positions_by_id, positions_where, scratch, take
from distill.data.sources import open_source
from distill.data.texts import Texts, TextWriter
from distill.data_config import DataConfig
from distill.formats import MEDIA, BadInput, Format, from_json, to_json
from distill.targets import (
    CAPTIONING,
    CLASSIFICATION,
    MULTILABEL,
    REGRESSION,
    Task,
    known,
    tasks_from_json,
    tasks_to_json,
)

ROWS_FILE, TEXT_FILE, LABELS_FILE, FORMATS_FILE = "rows.npy", "text.arrow", "labels.json", "formats.json"
PRESENT, TARGET, CODE = "present.", "target.", "code."
HASHED = 1 << 8  # rows at a time


def any_target(targets: Iterable[NDArray[Any]], num_rows: int) -> NDArray[np.bool_]:
    """Return which rows have a target of any task, bool [N]; where there is no task, none is missing.

    Args:
        targets: of each task, [N, ...].
        num_rows: N.
    """
    found = [known(values) for values in targets]
    return np.any(found, axis=0) if found else np.ones(num_rows, bool)


class SourceMedia:
    """An array whose rows are decoded when they are asked for, as :func:`~distill.data.prepare.prepare` would have.

    Args:
        source: where the media are.
        column: which column.
        rows: integers [N], the source's row of each.
        format: what they become.
        modality: the input that they are.
    """

    def __init__(self, source: Source, column: str, rows: NDArray[np.int64], format: Format, modality: str) -> None:
        self._source, self._column, self._rows, self._format, self._name = source, column, rows, format, modality
        self.dtype, shape = format.arrays[modality]
        self.shape = (len(rows), *shape)

    def __getitem__(self, rows: SupportsIndex | NDArray[np.int64]) -> NDArray[Any]:
        """Return one row or some, [B, ...]; zeros where absent.

        Raises:
            UserError: something that could be decoded cannot be any more.
        """
        if not isinstance(rows, np.ndarray):
            return self._decoded(int(self._rows[rows]))
        found = np.zeros((len(self._rows[rows]), *self.shape[1:]), self.dtype)
        for place, row in enumerate(self._rows[rows].tolist()):
            found[place] = self._decoded(row)
        return found

    def _decoded(self, row: int) -> NDArray[Any]:
        try:
            value = self._source.media(row, self._column)
            return np.zeros(self.shape[1:], self.dtype) if value is None else self._format.read(value)[self._name]
        except BadInput as error:
            where = self._source.where(row, self._column)
            raise UserError(
                f"{where} changed since the data was prepared: {error}; run again with --force=data"
            ) from error


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Prepared data, opened; row ``i`` is the same row in every attribute.

    Attributes:
        folder: where it lies, and large arrays of its readers too.
        ids: int64 [N], unique.
        split: str [N], train / valid / test.
        groups: int64 [N], dense codes; rows of one group stay together in bootstrap intervals.
        texts: N strings, empty where absent.
        codes: modality -> int64 [N], dense codes; rows of one code have the same file of it, byte by byte.
        arrays: input of models -> [N, ...], memory-mapped or decoded when read; zeros where absent.
        present: modality -> bool [N].
        targets: task -> [N, ...], as its :class:`~distill.targets.Task` says.
        tasks: what each task is.
        formats: modality -> how its values became arrays; of all but text.
    """

    folder: Path
    ids: NDArray[np.int64]
    split: NDArray[np.str_]
    groups: NDArray[np.int64]
    texts: Texts | Sequence[str]
    codes: dict[str, NDArray[np.int64]]
    arrays: dict[str, NDArray[Any] | SourceMedia]
    present: dict[str, NDArray[np.bool_]]
    targets: dict[str, NDArray[Any]]
    tasks: dict[str, Task]
    formats: dict[str, Format] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path, config: DataConfig | None = None, base: Path = Path()) -> PreparedData:
        """Open a folder that :func:`~distill.data.prepare.prepare` wrote.

        Args:
            folder: the folder.
            config: the recipe's ``data``, needed where media are decoded when they are read.
            base: folder that its relative paths start from.

        Raises:
            UserError: a file is damaged, or the source has gone or changed.
        """
        folder = Path(folder)
        records = runs.read_array(folder / ROWS_FILE, mmap_mode="r")
        formats = from_json(runs.read_json(folder / FORMATS_FILE))
        return cls(
            folder=folder,
            ids=np.asarray(records["id"]),
            split=np.asarray(records["split"]),
            groups=np.asarray(records["group"]),
            texts=Texts.open(folder / TEXT_FILE, np.asarray(records["text"])),
            codes=_with_prefix(records, CODE),
            arrays=_open_arrays(folder, formats, np.asarray(records["source_row"]), config, base),
            present=_with_prefix(records, PRESENT),
            targets=_with_prefix(records, TARGET),
            tasks=tasks_from_json(runs.read_json(folder / LABELS_FILE)),
            formats=formats,
        )

    def __len__(self) -> int:
        """Return the number of rows of all splits."""
        return len(self.ids)

    @property
    def labels(self) -> dict[str, list[str]]:
        """Task -> names of its outputs, in their order."""
        return {name: list(task.names) for name, task in self.tasks.items()}

    def rows(self, split: str, *, labelled: bool = False) -> NDArray[np.int64]:
        """Return the positions of a split's rows, in order of id: of all, or of those with a label of any task."""
        positions = positions_by_id(self.ids, self.split, split, self.folder)
        if not labelled:
            return positions
        known: NDArray[np.bool_] = scratch(self.folder, len(positions), np.bool_)
        for part in chunks(len(positions)):
            here = positions[part]
            known[part] = any_target((values[here] for values in self.targets.values()), len(here))
        return take(positions, positions_where(known, self.folder), self.folder)

    def fingerprint(self, split: str) -> str:
        """Return a hash of what a split's rows are, whatever the other rows: ids, names of classes, texts, arrays."""
        rows, found = self.rows(split), ""
        for start in range(0, len(rows), HASHED):
            here = rows[start : start + HASHED]
            answers = {task: _answers(self.tasks[task], values[here]) for task, values in self.targets.items()}
            present = {name: flags[here].tolist() for name, flags in self.present.items()}
            arrays = [hashlib.sha256(array[here].tobytes()).hexdigest() for array in self.arrays.values()]
            texts = [self.texts[row] for row in here.tolist()]
            found = runs.fingerprint(found, self.ids[here].tolist(), answers, present, texts, *(arrays or [""]))
        return found

    def class_counts(self, split: str) -> dict[str, NDArray[np.int64]]:
        """Return how many of a split's rows each class has: task -> int64 [C], or [2, K] without and with each label.

        Numbers have no classes.
        """
        shapes = {CLASSIFICATION: (), MULTILABEL: (2,)}
        counts = {
            name: np.zeros((*shapes[task.kind], len(task.names)), np.int64)
            for name, task in self.tasks.items()
            if task.kind in shapes
        }
        for here in chunks(len(self)):  # the columns may be larger than the memory
            rows = self.split[here] == split
            for name, total in counts.items():
                values = self.targets[name][here][rows]
                if total.ndim == 1:
                    total += np.bincount(values[values != IGNORE], minlength=len(total))
                else:
                    total += np.stack([(values == 0).sum(0), (values == 1).sum(0)])
        return counts


def _answers(task: Task, values: NDArray[Any]) -> Any:
    """Targets as JSON values by which rows are told apart: whatever the training rows make of them."""
    if task.kind == CLASSIFICATION:
        return [None if label == IGNORE else task.names[label] for label in values.tolist()]
    if task.kind == CAPTIONING:
        return [task.text(row) for row in values]
    if task.kind == REGRESSION:
        return [task.names, [[f"{number:.4g}" for number in row] for row in task.numbers(values).tolist()]]
    return [[task.names[place] for place in np.flatnonzero(row == 1)] for row in values]


def _open_arrays(
    folder: Path, formats: Mapping[str, Format], rows: NDArray[np.int64], config: DataConfig | None, base: Path
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    source = None
    for modality, format in formats.items():
        for name in format.arrays:
            if array_file(folder, name).is_file():
                found[name] = runs.read_array(array_file(folder, name), mmap_mode="r")
            elif config is not None:
                source = source or open_source(config.source, base, folder)
                (column,) = config.columns(modality)
                found[name] = SourceMedia(source, column, rows, format, name)
    return found


def _with_prefix(records: NDArray[Any], prefix: str) -> dict[str, NDArray[Any]]:
    names = [name for name in records.dtype.names or () if name.startswith(prefix)]
    return {name.removeprefix(prefix): np.asarray(records[name]) for name in names}


def record_type(modalities: Iterable[str], tasks: Mapping[str, Task], media: Iterable[str]) -> np.dtype[np.void]:
    """Return the type of a row's record: id, text, group, source_row, codes of media, split, presences and targets."""
    fields: list[tuple[Any, ...]] = [(name, "<i8") for name in ("id", "text", "group", "source_row")]
    fields += [
        *((CODE + name, "<i8") for name in media),
        *((TARGET + name, *task.target_type) for name, task in tasks.items()),
        ("split", "<U5"),
        *((PRESENT + m, "|b1") for m in modalities),
    ]
    return np.dtype(fields, align=True)


def write_prepared(
    folder: Path,
    *,
    ids: NDArray[np.int64],
    split: Sequence[str],
    texts: Sequence[str],
    present: Mapping[str, NDArray[np.bool_]],
    targets: Mapping[str, NDArray[Any]],
    labels: Mapping[str, Sequence[str] | Task],
    arrays: Mapping[str, NDArray[Any]] | None = None,
    formats: Mapping[str, Format] | None = None,
    groups: NDArray[np.int64] | None = None,
) -> Path:
    """Write rows that are in memory as prepared data: for benchmarks and tests; return the folder, which is made.

    Files count as different ones. ``labels`` are names of classes, or a task of another kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoded = Texts.of(texts)
    media = [name for name in formats or {} if name in MEDIA]
    tasks = {
        name: given if isinstance(given, Task) else Task(CLASSIFICATION, tuple(given)) for name, given in labels.items()
    }
    records = np.zeros(len(ids), record_type(present, {name: tasks[name] for name in targets}, media))
    records["id"], records["split"], records["source_row"] = ids, split, np.arange(len(ids))
    records["text"], records["group"] = encoded.numbers, np.arange(len(ids)) if groups is None else groups
    codes = {name: np.arange(len(ids)) for name in media}
    for prefix, columns in ((PRESENT, present), (TARGET, targets), (CODE, codes)):
        for name, values in columns.items():
            records[prefix + name] = values
    np.save(folder / ROWS_FILE, records, allow_pickle=False)
    with TextWriter(folder / TEXT_FILE) as writer:
        for text in dict.fromkeys(texts):
            writer.add(text)
    for name, values in (arrays or {}).items():
        np.save(array_file(folder, name), values, allow_pickle=False)
    runs.write_json(folder / FORMATS_FILE, to_json(formats or {}))
    runs.write_json(folder / LABELS_FILE, tasks_to_json(tasks))
    return folder
