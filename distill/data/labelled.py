"""Which training rows have a label, and which of them lose it: what an experiment on few labels hides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distill.contracts import SPLITS, TRAIN, UserError
from distill.data.hashing import mix
from distill.data.rows import Rows
from distill.data.scratch import chunks, positions_where, scratch, take
from distill.data.targets import MISSING, Labels
from distill.data_config import LabelledConfig
from distill.targets import CLASSIFICATION


def labelled_rows(rows: Rows) -> NDArray[np.bool_]:
    """Return which usable training rows have a label of any task, bool [N], on disk where they are many.

    Where there is no task, no label is missing.
    """
    found = scratch(rows.folder, len(rows.ids), np.bool_)
    for part in chunks(len(rows.ids)):
        known = [targets.known(part) for targets in rows.targets.values()]
        found[part] = (
            (np.any(known, axis=0) if known else True)
            & (rows.split[part] == SPLITS.index(TRAIN))
            & ~rows.bad.flags[part]
        )
    return found


def keep_labels(rows: Rows, wanted: LabelledConfig | None, seed: int) -> NDArray[np.bool_]:
    """Return which training rows keep their labels, bool [N]; all that have one, unless the recipe hides some.

    Groups are ranked by a hash of seed and group, and the first ones keep theirs. So a larger share holds a smaller
    one, and a group is labelled or not as a whole, but for the one in which a number of rows ends.

    Args:
        rows: checked; each row is a group of its own where the recipe names no group column.
        wanted: the recipe's ``data.labelled``.
        seed: the recipe's.

    Raises:
        UserError: more rows are wanted than have a label, or a task has fewer than two classes left.
    """
    kept = labelled_rows(rows)
    if wanted is None:
        return kept
    if not rows.targets:
        raise UserError("data.labelled hides labels, and data.targets names none; leave it out")
    ranks: NDArray[np.uint64] = scratch(rows.folder, len(kept), np.uint64)
    start = mix(np.array([seed], np.uint64))
    for part in chunks(len(kept)):
        own = rows.ids[part].astype(np.uint64) if rows.groups is None else rows.groups[part, 0]
        ranks[part] = mix(start ^ own)
        if wanted.groups < 1:
            kept[part] &= ranks[part] < np.uint64(wanted.groups * 2**64)
    if wanted.rows is not None:
        _keep_first(rows, kept, ranks, wanted.rows)
    _check_classes(rows, kept)
    return kept


def _keep_first(rows: Rows, kept: NDArray[np.bool_], ranks: NDArray[np.uint64], count: int) -> None:
    """Leave so many rows in ``kept``, those of the lowest ranks; of equal ranks the first rows."""
    known = take(ranks, positions_where(kept, rows.folder), rows.folder)
    if count > len(known):
        raise UserError(f"data.labelled.rows is {count}, and {len(known)} training rows have a label; lower it")
    known.sort()
    limit = known[count - 1]
    ties = count - int(np.searchsorted(known, limit))
    for part in chunks(len(kept)):
        tied = kept[part] & (ranks[part] == limit)
        tied &= np.cumsum(tied) <= ties
        ties -= int(tied.sum())
        kept[part] &= tied | (ranks[part] < limit)


def _check_classes(rows: Rows, kept: NDArray[np.bool_]) -> None:
    for task, targets in rows.targets.items():
        if not isinstance(targets, Labels) or targets.config.kind != CLASSIFICATION:
            continue
        seen = np.zeros(len(targets.values), bool)
        for part in chunks(len(kept)):
            codes = targets.codes[part][kept[part]]
            seen[codes[codes != MISSING]] = True
        if seen.sum() < 2:
            raise UserError(
                f"data.labelled leaves labels of {seen.sum()} class(es) of task {task!r} in train; at least 2 are "
                "needed: raise it"
            )
