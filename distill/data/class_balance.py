"""Which rows an epoch draws where classes are balanced: the more often, the rarer their class is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distill.config import ClassBalance
from distill.contracts import IGNORE
from distill.data.order import Drawn
from distill.data.prepared import PreparedData
from distill.data.scratch import chunks, scratch
from distill.targets import MULTILABEL


def drawn_rows(data: PreparedData, split: str, positions: NDArray[np.int64], config: ClassBalance) -> Drawn:
    """Return how an epoch draws rows, with weight ``n ** -power`` for a class of n rows.

    A power of 1 shows all classes equally often, 0.5 is square-root sampling, and 0 draws all rows alike (Kang et al.
    2020, arXiv 1910.09217, whose q is 1 - power). Of several labels a row counts as its rarest, and rows with none of
    them are one class. Rows that nobody labelled are drawn as often as without balance.

    Args:
        data: the prepared data.
        split: whose rows they are.
        positions: int64 [N], the rows to draw from.
        config: the task, of kind classification or multilabel, and the power.
    """
    values, counts = data.targets[config.task], data.class_counts(split)[config.task]
    several = data.tasks[config.task].kind == MULTILABEL
    counts = np.concatenate([counts[1] if several else counts, [0, 0]])  # behind classes: no label, and unknown
    none, unknown = len(counts) - 2, len(counts) - 1
    groups = scratch(data.folder, len(positions), np.int64)
    sizes = np.zeros_like(counts)
    for part in chunks(len(positions)):
        here = values[positions[part]]
        if several:
            held = here == 1
            rarest = np.where(held, counts[:none], np.iinfo(np.int64).max).argmin(1)
            groups[part] = np.where(held.any(1), rarest, np.where(np.isnan(here).all(1), unknown, none))
        else:
            groups[part] = np.where(here == IGNORE, unknown, here)
        sizes += np.bincount(groups[part], minlength=len(sizes))
    counts[none:] = sizes[none:]
    weights = np.maximum(1, counts).astype(np.float64) ** -config.power
    labelled = sizes[:unknown].sum()
    weights[unknown] = (sizes * weights)[:unknown].sum() / labelled if labelled else 1.0
    return Drawn(positions, groups, weights, data.folder)
