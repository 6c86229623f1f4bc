"""The columns of a source, read as a recipe says and checked, a piece at a time; no file of media is touched here."""

from __future__ import annotations

import hashlib
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill.config import nearest
from distill.contracts import SPLITS, TEST, TRAIN, VALID, UserError
from distill.data.cells import Cells, encoded, is_text, read_cells
from distill.data.columns import Source
from distill.data.hashing import mix
from distill.data.scratch import chunks, positions_where, repeated, scratch, take
from distill.data.tabular import Table
from distill.data.targets import MISSING, Labels, Targets, targets_for
from distill.data_config import DataConfig
from distill.formats import MEDIA, MODALITIES, TABULAR, TEXT, formats_of
from distill.formats.tabular import TabularFormat
from distill.preprocess import has_text
from distill.targets import Task

SPLIT_ALIASES = {"val": "valid", "validation": "valid"}
NO_TARGET, EMPTY = "no target", "every modality is missing"
NUM_LISTED = 1000  # bad rows whose reasons are kept; all are counted
IN_ROW = ""  # in place of a column of media: the row itself is at fault

Keys = NDArray[np.uint64]


class BadRows:
    """Rows that cannot be used: all are marked, and the first ones have their reasons.

    Attributes:
        flags: bool [N].
        listed: the first bad rows with their reasons, in order, and the column of media that is at fault; None where
            the source knows, IN_ROW where none is.
    """

    def __init__(self, num_rows: int, folder: Path) -> None:
        self.flags: NDArray[np.bool_] = scratch(folder, num_rows, np.bool_)
        self.listed: list[tuple[int, str, str | None]] = []

    def add(self, row: int, reason: str, column: str | None = None) -> None:
        """Mark a row, which was not marked before."""
        self.flags[row] = True
        insort(self.listed, (row, reason, column), key=lambda entry: entry[0])
        del self.listed[NUM_LISTED:]

    def count(self) -> int:
        """How many there are."""
        return sum(int(np.count_nonzero(self.flags[rows])) for rows in chunks(len(self.flags)))


@dataclass(frozen=True)
class Rows:
    """The columns of a source as a recipe reads them, media aside; all of one length N, large ones on disk.

    Attributes:
        source: the source's name, for messages.
        folder: where large arrays are.
        ids: int64 [N], unique but for those of bad rows.
        split: uint8 [N], positions in SPLITS.
        groups: [N, 2], hashes of the group column's values; None where each row is its own group.
        texts: [N, 2], hashes of the texts.
        present: modality -> bool [N].
        targets: task -> what the source says of it.
        table: the records; None without any.
        bad: rows to leave out.
    """

    source: str
    folder: Path
    ids: NDArray[np.int64]
    split: NDArray[np.uint8]
    groups: Keys | None
    texts: Keys
    present: dict[str, NDArray[np.bool_]]
    targets: dict[str, Targets]
    table: Table | None
    bad: BadRows


def read_rows(config: DataConfig, source: Source, folder: Path) -> Rows:
    """Read the columns that a recipe names.

    A row is bad if the source cannot read it, if all its modalities are missing (of media nobody knows yet), or if it
    is one of valid or test and has no target of any task, where there are tasks. Training rows need none: a teacher can
    say what they are.

    Args:
        config: the recipe's ``data``.
        source: the rows.
        folder: an existing folder, on whose disk large arrays are kept.

    Raises:
        UserError: a modality is unknown, a column is missing or of a wrong type, an id is used twice, or a split
            is unknown.
    """
    for modality in config.modalities:
        if modality not in MODALITIES:
            raise UserError(f"unknown modality {modality!r} in data.modalities; {nearest(modality, MODALITIES)}")
    optional = [config.group, config.id]
    if config.random_split and config.split in source.columns:
        raise UserError(
            f"data.random_split deals rows, and {source.name} has a column {config.split!r} for that; leave it out, or "
            "set data.split to '' to ignore the column"
        )
    optional += [] if config.random_split else [config.split]
    columns = [column for modality in config.modalities for column in config.columns(modality)]
    answers = [column for target in config.targets.values() for column in target.columns]
    named = [*columns, *answers, *filter(None, optional)]
    for column in named:
        if column not in source.columns:
            hint = "; data.random_split deals the rows where there is none" if column == config.split else ""
            raise UserError(f"{source.name} has no column {column!r}; {nearest(column, source.columns)}{hint}")
    total = len(source)
    rows = Rows(
        source=source.name,
        folder=folder,
        ids=scratch(folder, total, np.int64),
        split=scratch(folder, total, np.uint8),
        groups=scratch(folder, (total, 2), np.uint64) if config.group else None,
        texts=scratch(folder, (total, 2), np.uint64),
        present={name: scratch(folder, total, np.bool_) for name in config.modalities},
        targets={task: targets_for(task, target, total, folder) for task, target in config.targets.items()},
        table=Table.empty(_tabular(config), total, folder) if TABULAR in config.modalities else None,
        bad=BadRows(total, folder),
    )
    media = {column for modality in MEDIA for column in config.columns(modality)}
    wanted = [name for name in dict.fromkeys(named) if name not in media or named.count(name) > 1]
    for cells in read_cells(source, wanted):
        _read_piece(config, rows, cells)
    _check_ids(config, rows)
    if config.random_split:
        _deal({VALID: config.random_split.valid, TEST: config.random_split.test}, rows)
        _keep_classes(rows)
    if config.hold_out and count_splits(rows)[VALID]:
        raise UserError(f"data.hold_out is {config.hold_out}, and {rows.source} has rows of split 'valid'; set it to 0")
    if config.hold_out:
        _deal({VALID: config.hold_out}, rows)
    return rows


def _deal(shares: Mapping[str, float], rows: Rows) -> None:
    """Make about these shares of the groups of train (of the rows, without a group column) those of other splits.

    Which ones follows from a hash of the group alone: it is the same for all seeds, so that runs compare. Groups with a
    row without any target stay: it could not be measured, and train must not have it beside those that are.
    """
    parts = list(chunks(len(rows.ids)))
    unknown = [np.unique(_groups(rows, part)[~_labelled(rows, part)]) for part in parts]
    staying = np.unique(np.concatenate(unknown)) if parts else np.zeros(0, np.uint64)
    for part in parts:
        groups = _groups(rows, part)
        place = mix(mix(groups))
        chosen = (rows.split[part] == SPLITS.index(TRAIN)) & ~np.isin(groups, staying)
        first = 0.0
        for split, share in shares.items():
            inside = (place >= np.uint64(first * 2**64)) & (place < np.uint64((first + share) * 2**64))
            rows.split[part] = np.where(chosen & inside, SPLITS.index(split), rows.split[part])
            first += share


def _keep_classes(rows: Rows) -> None:
    """Give train the groups of classes that came to other splits alone: nobody could learn them."""
    for targets in rows.targets.values():
        if not isinstance(targets, Labels):
            continue
        counts = targets.counts(usable(rows))
        unseen = counts.any(0) & (counts[SPLITS.index(TRAIN)] == 0)
        parts = list(chunks(len(rows.ids))) if unseen.any() else []
        groups = {group for part in parts for group in _groups(rows, part)[targets.has_any(part, unseen)].tolist()}
        for part in parts:
            back = np.isin(_groups(rows, part), np.fromiter(groups, np.uint64))
            rows.split[part] = np.where(back, SPLITS.index(TRAIN), rows.split[part])


def _labelled(rows: Rows, part: slice) -> NDArray[np.bool_]:
    """Which rows have a target of some task; all, where there are no tasks."""
    known = [targets.known(part) for targets in rows.targets.values()]
    return np.any(known, axis=0) if known else np.ones(part.stop - part.start, bool)


def _groups(rows: Rows, part: slice) -> NDArray[np.uint64]:
    """What tells the groups of rows apart."""
    return rows.ids[part].astype(np.uint64) if rows.groups is None else rows.groups[part, 0]


def _read_piece(config: DataConfig, rows: Rows, cells: Cells) -> None:
    here = cells.rows
    if config.id is None:
        rows.ids[here] = np.arange(here.start, here.stop)
    else:
        rows.ids[here] = _integers(cells, config.id)
    rows.split[here] = SPLITS.index(TRAIN) if config.random_split else _split_codes(cells, config.split)
    if config.group and rows.groups is not None:
        rows.groups[here] = _group_keys(cells, config.group)
    usable = np.full(here.stop - here.start, any(modality in MEDIA for modality in config.modalities))
    unusable = dict(cells.bad)
    for targets in rows.targets.values():
        unusable = targets.read(cells) | unusable
    if TEXT in config.modalities:
        texts = _texts(cells, *config.columns(TEXT))
        rows.texts[here] = hashes(texts)
        rows.present[TEXT][here] = has = np.array([text != "" for text in texts], bool)
        usable |= has
    if rows.table is not None:
        rows.present[TABULAR][here], wrong = rows.table.read(cells)
        usable |= rows.present[TABULAR][here]
        unusable = wrong | unusable
    labelled = rows.split[here] == SPLITS.index(TRAIN)
    labelled |= _labelled(rows, here)
    for row in np.flatnonzero(~(usable & labelled) | _marked(unusable, len(labelled))).tolist():
        reason = unusable.get(row) or (EMPTY if labelled[row] else NO_TARGET)
        rows.bad.add(here.start + row, reason, None if row in cells.bad else IN_ROW)


def _marked(bad: Mapping[int, str], num_rows: int) -> NDArray[np.bool_]:
    marked = np.zeros(num_rows, bool)
    marked[list(bad)] = True
    return marked


def _tabular(config: DataConfig) -> TabularFormat:
    found = formats_of(config)[TABULAR]
    assert isinstance(found, TabularFormat)
    return found


def _texts(cells: Cells, column: str) -> list[str]:
    values = cells.typed(column, is_text, "a text", optional=True).to_pylist()
    return [text if has_text(text) else "" for text in values]


def texts_of(config: DataConfig, source: Source) -> Iterable[tuple[int, list[str]]]:
    """Yield the texts of all rows, empty where absent: the first row, and those from it on."""
    if TEXT not in config.modalities:
        for part in chunks(len(source)):
            yield part.start, [""] * (part.stop - part.start)
        return
    (column,) = config.columns(TEXT)
    for cells in read_cells(source, [column]):
        yield cells.start, _texts(cells, column)


def hashes(values: Iterable[str]) -> Keys:
    """Return hashes of strings, [N, 2]: different ones have different hashes, as far as anybody will see."""
    digests = (hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest() for value in values)
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def row_keys(rows: Iterable[int]) -> Keys:
    """Return hashes of row numbers, [N, 2], for rows that have no value: each is unlike all others."""
    return hashes(f"row {row}" for row in rows)


def _integers(cells: Cells, column: str) -> NDArray[np.int64]:
    array = cells.typed(column, pa.types.is_integer, "an integer id")
    try:
        plain = array.cast(pa.int64()).fill_null(MISSING)
    except pa.ArrowInvalid as error:
        raise UserError(f"{cells.source}: column {column!r} holds an id beyond 64 bits; give smaller ids") from error
    return np.asarray(plain.to_numpy(zero_copy_only=False), np.int64)


def _split_codes(cells: Cells, column: str) -> NDArray[np.uint8]:
    values, numbers = encoded(cells.typed(column, is_text, f"one of {', '.join(SPLITS)}"))
    names = [SPLIT_ALIASES.get(name, name) for name in values]
    known = np.array([name in SPLITS for name in names] + [True])[numbers]
    if not known.all():
        row = int((~known).argmax())
        name = names[numbers[row]]
        cells.refuse(column, row, f"unknown split {name!r}; {nearest(name, SPLITS)}")
    return np.array([SPLITS.index(name) for name in names] + [0], np.uint8)[numbers]


def _group_keys(cells: Cells, column: str) -> Keys:
    array = cells.plain(column)
    if pa.types.is_nested(array.type):
        raise UserError(f"{cells.source}: column {column!r} holds {array.type}; groups are strings or numbers")
    values, numbers = encoded(array)
    keys = np.concatenate([hashes(f"value {value!r}" for value in values), np.zeros((1, 2), np.uint64)])[numbers]
    alone = np.flatnonzero(numbers == len(values))
    keys[alone] = row_keys((cells.start + alone).tolist())
    return keys


def _check_ids(config: DataConfig, rows: Rows) -> None:
    if config.id is None:
        return
    good = positions_where(rows.bad.flags, rows.folder, flag=False)
    if worst := repeated(take(rows.ids, good, rows.folder)):
        value, count = worst
        raise UserError(f"{rows.source}: column {config.id!r} has id {value} {count} times; give each row its own")


def count_splits(rows: Rows) -> dict[str, int]:
    """Return the number of usable rows a split."""
    counts = np.zeros(len(SPLITS), np.int64)
    for part in chunks(len(rows.ids)):
        counts += np.bincount(rows.split[part][~rows.bad.flags[part]], minlength=len(SPLITS))
    return dict(zip(SPLITS, counts.tolist(), strict=True))


def usable(rows: Rows) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Yield the positions of rows that are not bad, and the split of each, some at a time."""
    for part in chunks(len(rows.ids)):
        found = part.start + np.flatnonzero(~rows.bad.flags[part])
        yield found, rows.split[found]


def settle_tasks(rows: Rows) -> dict[str, Task]:
    """Number each task's classes, and standardise its numbers, by what the training split has.

    Raises:
        UserError: a split is empty, a class occurs in evaluation only, or there is nothing to tell apart.
    """
    for split, count in count_splits(rows).items():
        if not count:
            raise UserError(f"{rows.source} has no usable row of split {split!r}; train, valid and test each need some")
    return {task: targets.settle(rows.source, usable(rows)) for task, targets in rows.targets.items()}
