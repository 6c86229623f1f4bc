"""The targets of a source's rows: read a piece at a time, then numbered or standardised by what training rows have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill.contracts import IGNORE, SPLITS, TRAIN, UserError
from distill.data.cells import Cells, encoded, is_text
from distill.data.moments import Moments
from distill.data.scratch import scratch
from distill.data.tabular import LARGEST, numbers_of
from distill.data.vocabulary import learnt_tokenizer
from distill.data_config import TargetConfig
from distill.preprocess import has_text
from distill.targets import CAPTIONING, CLASSIFICATION, FIRST, LAST, MULTILABEL, PAD, REGRESSION, Task

MISSING = -1  # code of a missing label


class Targets:
    """One task's targets as the source has them.

    Attributes:
        config: the recipe's.
    """

    def __init__(self, task: str, config: TargetConfig) -> None:
        self.task, self.config = task, config

    @abstractmethod
    def read(self, cells: Cells) -> dict[int, str]:
        """Take a piece's targets; return row of the piece -> why its target cannot be used."""

    @abstractmethod
    def known(self, rows: Any) -> NDArray[np.bool_]:
        """Return which of some rows have a target, or one of several: bool [B]."""

    @abstractmethod
    def settle(self, source: str, parts: Iterable[tuple[NDArray[Any], NDArray[np.uint8]]]) -> Task:
        """Learn from training rows what the task is; before it, :meth:`of` cannot be asked.

        Args:
            source: its name, for messages.
            parts: positions of all usable rows and the split of each, some at a time.

        Raises:
            UserError: the targets make no task.
        """

    @abstractmethod
    def of(self, rows: Any) -> NDArray[Any]:
        """Return the targets of some rows, as :class:`~distill.targets.Task` has them."""


class Labels(Targets):
    """Classes or sets of labels: the number of each distinct value a row, and what the values are.

    Attributes:
        codes: int32 [N], numbers of the values in order of first appearance; MISSING where there is none.
        values: the distinct values -> their numbers. A value is a class, or for "multilabel" a tuple of labels, or of
            0, 1 and None where labels are columns.
    """

    def __init__(self, task: str, config: TargetConfig, num_rows: int, folder: Path) -> None:
        super().__init__(task, config)
        self.codes: NDArray[np.int32] = scratch(folder, num_rows, np.int32)
        self.values: dict[Any, int] = {}
        self._table: NDArray[Any] = np.zeros(0)

    def read(self, cells: Cells) -> dict[int, str]:
        """Number the piece's values."""
        if self.config.kind == CLASSIFICATION:
            values, numbers = _classes(cells, self.config.columns[0], self.values)
        elif isinstance(self.config.column, str):
            values, numbers = _sets(cells, self.config.column, self.config.separator)
        else:
            values, numbers = _flags(cells, self.config.columns)
        codes = [MISSING if value is None else self.values.setdefault(value, len(self.values)) for value in values]
        self.codes[cells.rows] = np.array([*codes, MISSING], np.int32)[numbers]
        return {}

    def known(self, rows: Any) -> NDArray[np.bool_]:
        """Return which rows have a class or a set of labels."""
        return np.asarray(self.codes[rows] != MISSING)

    def classes(self) -> list[Any]:
        """All classes or labels that any row has, in order of first appearance; of columns, their names."""
        if self.config.kind == CLASSIFICATION:
            return list(self.values)
        if not isinstance(self.config.column, str):
            return self.config.columns
        return list(dict.fromkeys(label for value in self.values for label in value))

    def holds(self, classes: list[Any]) -> NDArray[np.float32]:
        """Return which of some classes each value holds: [values + 1, K], NaN where nobody knows, as at MISSING."""
        table = np.zeros((len(self.values) + 1, len(classes)), np.float32)
        table[MISSING] = np.nan
        place = {name: number for number, name in enumerate(classes)}
        for value, number in self.values.items():
            if self.config.kind == MULTILABEL and not isinstance(self.config.column, str):
                table[number] = [np.nan if flag is None else flag for flag in value]
            else:
                named = [value] if self.config.kind == CLASSIFICATION else value
                table[number, [place[name] for name in named if name in place]] = 1
        return table

    def counts(self, parts: Iterable[tuple[NDArray[Any], NDArray[np.uint8]]]) -> NDArray[np.int64]:
        """Return how many of some rows of each split have each class: int64 [splits, K], K as :meth:`classes`."""
        counts = np.zeros((len(SPLITS), len(self.values)), np.int64)
        for rows, split in parts:
            codes = self.codes[rows]
            labelled = codes != MISSING
            np.add.at(counts, (split[labelled], codes[labelled]), 1)
        if self.config.kind == CLASSIFICATION:
            return counts
        held: NDArray[np.int64] = np.nan_to_num(self.holds(self.classes())[:MISSING]).astype(np.int64)
        return counts @ held

    def has_any(self, rows: Any, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which rows have one of the classes that are True in ``wanted`` [K]: bool [B]."""
        if self.config.kind == CLASSIFICATION:
            found = np.append(wanted, False)
        else:
            found = (self.holds(self.classes())[:, wanted] == 1).any(axis=1)
        return np.asarray(found[self.codes[rows]])

    def settle(self, source: str, parts: Iterable[tuple[NDArray[Any], NDArray[np.uint8]]]) -> Task:
        """Number the classes that training rows have, in their sorted order; columns stay as they are.

        Raises:
            UserError: a class occurs in evaluation only, or there are too few.
        """
        what = "class" if self.config.kind == CLASSIFICATION else "label"
        found, counts = self.classes(), self.counts(parts)
        train = SPLITS.index(TRAIN)
        for name, each in zip(found, counts.T, strict=True):
            if each.any() and not each[train]:
                split = SPLITS[int(each.argmax())]
                raise UserError(
                    f"{source}: task {self.task!r}: {what} {str(name)!r} of split {split!r} never occurs in train; "
                    f"move some of its rows to train, or leave the {what} out"
                )
            if not each[train] and not isinstance(self.config.column, str):
                raise UserError(f"{source}: task {self.task!r}: column {name!r} is 1 nowhere in train; leave it out")
        kept = [name for name, count in zip(found, counts[train], strict=True) if count]
        ordered = sorted(kept) if isinstance(self.config.column, str) else kept
        least = 2 if self.config.kind == CLASSIFICATION else 1
        if len(ordered) < least:
            shown = "class(es)" if least == 2 else "label(s)"
            raise UserError(
                f"{source}: task {self.task!r} has {len(ordered)} {shown} in train; at least {least} are needed"
            )
        if self.config.kind == CLASSIFICATION:
            label = {value: number for number, value in enumerate(ordered)}
            self._table = np.array([label.get(value, IGNORE) for value in self.values] + [IGNORE], np.int64)
        else:
            self._table = self.holds(found)[:, [found.index(name) for name in ordered]]
        return Task(self.config.kind, tuple(map(str, ordered)))

    def of(self, rows: Any) -> NDArray[Any]:
        """Return int64 [B] of classes, float32 [B, K] of labels."""
        return np.asarray(self._table[self.codes[rows]])  # MISSING is -1: the last entry


class Numbers(Targets):
    """Numbers, one a column.

    Attributes:
        values: float64 [N, K], NaN where missing.
    """

    def __init__(self, task: str, config: TargetConfig, num_rows: int, folder: Path) -> None:
        super().__init__(task, config)
        self.values: NDArray[np.float64] = scratch(folder, (num_rows, len(config.columns)), np.float64)
        self._mean, self._std = np.zeros(0), np.ones(0)

    def read(self, cells: Cells) -> dict[int, str]:
        """Take the piece's numbers; those that 32 bits cannot hold make their row bad."""
        bad: dict[int, str] = {}
        for place, name in enumerate(self.config.columns):
            found = numbers_of(cells, name, f"task {self.task!r} is a regression, so name a column of numbers")
            beyond = np.flatnonzero(np.abs(found) > LARGEST).tolist()
            bad |= {row: f"column {name!r} holds {found[row]:g}, which is beyond 32 bits" for row in beyond}
            self.values[cells.rows, place] = found
        return bad

    def known(self, rows: Any) -> NDArray[np.bool_]:
        """Return which rows have a number."""
        return np.asarray(~np.isnan(self.values[rows]).all(axis=1))

    def settle(self, source: str, parts: Iterable[tuple[NDArray[Any], NDArray[np.uint8]]]) -> Task:
        """Find mean and deviation of the training rows.

        Raises:
            UserError: a column is the same everywhere, or empty.
        """
        moments = Moments(len(self.config.columns))
        for rows, split in parts:
            moments.add(self.values[rows[split == SPLITS.index(TRAIN)]])
        for name, constant in zip(self.config.columns, moments.constant(), strict=True):
            if constant:
                raise UserError(
                    f"{source}: task {self.task!r}: column {name!r} holds one number or none in train, so there is "
                    "nothing to learn; name another"
                )
        self._mean, self._std = moments.mean, moments.std
        return Task(REGRESSION, tuple(self.config.columns), tuple(self._mean.tolist()), tuple(self._std.tolist()))

    def of(self, rows: Any) -> NDArray[Any]:
        """Return float32 [B, K], standardised."""
        return ((self.values[rows] - self._mean) / self._std).astype(np.float32)


class Captions(Targets):
    """Texts to write: the number of each distinct one a row.

    Attributes:
        codes: int32 [N], numbers of the texts in order of first appearance; MISSING where there is none.
        texts: the distinct texts -> their numbers.
    """

    def __init__(self, task: str, config: TargetConfig, num_rows: int, folder: Path) -> None:
        super().__init__(task, config)
        self.codes: NDArray[np.int32] = scratch(folder, num_rows, np.int32)
        self.texts: dict[str, int] = {}
        self._table: NDArray[np.int64] = np.zeros((0, 0), np.int64)

    def read(self, cells: Cells) -> dict[int, str]:
        """Number the piece's texts; an empty one is missing."""
        array = cells.typed(self.config.columns[0], is_text, "a text", optional=True)
        texts, numbers = encoded(array)
        given = [text if has_text(text) else None for text in texts]
        codes = [MISSING if text is None else self.texts.setdefault(text, len(self.texts)) for text in given]
        self.codes[cells.rows] = np.array([*codes, MISSING], np.int32)[numbers]
        return {}

    def known(self, rows: Any) -> NDArray[np.bool_]:
        """Return which rows have a text."""
        return np.asarray(self.codes[rows] != MISSING)

    def settle(self, source: str, parts: Iterable[tuple[NDArray[Any], NDArray[np.uint8]]]) -> Task:
        """Learn a vocabulary of the training rows' texts, and cut all texts into its tokens.

        Raises:
            UserError: no training row has a text, or the vocabulary is too small for their characters.
        """
        seen = np.zeros(len(self.texts) + 1, np.int64)
        for rows, split in parts:
            np.add.at(seen, self.codes[rows[split == SPLITS.index(TRAIN)]], 1)
        words = (text for text, number in self.texts.items() for _ in range(seen[number]))
        try:
            tokenizer = learnt_tokenizer(words, self.config.vocab_size)
        except UserError as error:
            raise UserError(f"{source}: task {self.task!r}: {error}") from error
        length = self.config.max_length
        self._table = np.full((len(self.texts) + 1, length), IGNORE, np.int64)  # MISSING is -1: the last entry
        for text, number in self.texts.items():
            found = tokenizer.encode(text, add_special_tokens=False).ids
            ids = [token for token in found if token not in (PAD, FIRST, LAST)][: length - 1]  # texts may spell these
            if ids:  # else a text of nothing that can be written, which is missing
                self._table[number, : len(ids) + 1] = [*ids, LAST]
        names = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        return Task(CAPTIONING, tuple(name for name, _ in names), length=length)

    def of(self, rows: Any) -> NDArray[Any]:
        """Return int64 [B, L]."""
        return np.asarray(self._table[self.codes[rows]])


def targets_for(task: str, config: TargetConfig, num_rows: int, folder: Path) -> Targets:
    """Return what reads a task's targets."""
    kind = {REGRESSION: Numbers, CAPTIONING: Captions}.get(config.kind, Labels)
    return kind(task, config, num_rows, folder)


def _classes(cells: Cells, column: str, seen: dict[Any, int]) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct classes of a piece, None for an empty one, and the number of each row's."""
    array = cells.plain(column)
    nested = pa.types.is_nested(array.type)
    values, numbers = ([array.type], np.zeros(0, np.int64)) if nested else encoded(array)
    kinds = {type(value) for value in [*values, *list(seen)[:1]]}
    if len(kinds) > 1 or not kinds <= {str, int, bool}:
        found = str(array.type) if nested else ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(f"{cells.source}: column {column!r} holds {found}; labels are all strings or all integers")
    return [None if value == "" else value for value in values], numbers


def _sets(cells: Cells, column: str, separator: str) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct sets of labels of a piece, and the number of each row's; an empty one is a set too."""
    array = cells.plain(column)
    if is_text(array.type):
        texts, numbers = encoded(array)
        return [_labels(text.split(separator)) for text in texts], numbers
    if pa.types.is_null(array.type):
        return encoded(array)
    lists = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    if not lists or not (is_text(array.type.value_type) or pa.types.is_null(array.type.value_type)):
        raise UserError(
            f"{cells.source}: column {column!r} holds {array.type}; several labels a row are a list of texts, a text "
            f"that joins them with {separator!r}, or a column of 0 and 1 for each"
        )
    numbered: dict[Any, int] = {}
    found = [None if labels is None else _labels(labels) for labels in array.to_pylist()]
    codes = [MISSING if value is None else numbered.setdefault(value, len(numbered)) for value in found]
    return list(numbered), np.array(codes, np.int64)  # MISSING is -1, the place behind the last


def _labels(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(sorted({name.strip() for name in names if name and name.strip()}))


def _flags(cells: Cells, columns: list[str]) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct rows of 0, 1 and None of a piece, None for one of nothing else, and the number of each row's."""
    advice = "columns of labels hold 0 and 1"
    flags = np.stack([numbers_of(cells, name, advice) for name in columns], axis=1)
    wrong = ~np.isnan(flags) & (flags != 0) & (flags != 1)
    wrong[list(cells.bad)] = False
    if wrong.any():
        row, place = np.argwhere(wrong)[0].tolist()
        cells.refuse(columns[place], row, f"{flags[row, place]:g} is neither 0 nor 1, which say whether a label holds")
    distinct, numbers = np.unique(np.nan_to_num(flags, nan=-1).astype(np.int8), axis=0, return_inverse=True)
    values = [tuple(None if flag < 0 else int(flag) for flag in row) for row in distinct.tolist()]
    return [None if all(flag is None for flag in value) else value for value in values], numbers.reshape(-1)
