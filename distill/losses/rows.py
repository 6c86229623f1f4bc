"""Which rows of a batch a term is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.config import EMA, TermConfig
from distill.contracts import IGNORE, Batch
from distill.losses.terms import LABELS, LOSSES, mixes, modalities, needs_teacher

Reads = Mapping[str | None, Sequence[str]]
"""Teacher -> the modalities that it reads; one that is not named answers all rows.

None is the run's own. EMA is the student, by itself or as the average of its weights.
"""


def term_rows(term: TermConfig, batch: Batch, reads: Reads) -> Tensor | None:
    """Return the rows with a term's modalities, one that the student reads and one of its teachers': bool [B], or None
    for all.

    Of teachers that are mixed, one that can read a row suffices. A student that reads nothing of a row answers with the
    bias of its head, and would learn nothing else there.
    """
    masks = [batch.present[name] for name in modalities(term) if name in batch.present]
    own = readable(EMA, batch, reads)
    if own is not None:
        masks.append(own)
    theirs = [readable(teacher, batch, reads) for teacher in term.teachers] if needs_teacher([term]) else []
    known = [mask for mask in theirs if mask is not None]
    if not mixes(term):
        masks += known
    elif len(known) == len(theirs):
        masks.append(torch.stack(known).any(dim=0))
    if not masks:
        return None
    keep = torch.stack(masks).all(dim=0)
    return None if bool(keep.all()) else keep


def readable(teacher: str | None, batch: Batch, reads: Reads) -> Tensor | None:
    """Return the rows of which a teacher, or the student, can read something: bool [B], or None for all."""
    theirs = reads.get(teacher, ())
    if not theirs or batch.present.keys() <= set(theirs):  # every row has one modality at least
        return None
    return torch.stack([batch.present[name] for name in theirs]).any(dim=0)


def term_ids(term: TermConfig, batch: Batch, reads: Reads) -> Tensor:
    """Return the ids of the rows that a term is about: int64 [N]."""
    rows = term_rows(term, batch, reads)
    return batch.ids if rows is None else batch.ids[rows]


def num_rows(term: TermConfig, batch: Batch, reads: Reads) -> int:
    """Return how many rows a term averages over."""
    rows = term_rows(term, batch, reads)
    counted = torch.ones_like(batch.ids, dtype=torch.bool) if rows is None else rows
    if LOSSES[term.loss].kind in LABELS:
        counted = counted & _has_target(batch.targets[str(term.task).split(".")[0]])
    return int(counted.sum())


def with_others(batch: Batch) -> Batch:
    """Return a batch whose images are mixed with the targets of the rows that were mixed in."""
    return batch._replace(targets={task: batch.mixed[f"target.{task}"] for task in batch.targets}, mixed={})


def _has_target(targets: Tensor) -> Tensor:
    """Whether a row has a label, or one of several, a number or a token: bool [B]."""
    known = ~targets.isnan() if targets.is_floating_point() else targets != IGNORE
    return known if known.ndim == 1 else known.flatten(1).any(dim=1)  # of no rows too
