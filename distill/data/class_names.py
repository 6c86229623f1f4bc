"""Names of classes as texts that a teacher learns from, beside those of the rows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distill.data.mixed import as_data
from distill.data.prepared import PreparedData


def class_names(data: PreparedData, tasks: Sequence[str]) -> PreparedData:
    """Return the names of some tasks' classes as training rows, each with its label and no other.

    Hyphens and underscores are read as spaces: what classifiers make of a class's name (Radford et al. 2021, arXiv
    2103.00020) is learnt here from its text, beside the texts of its rows.
    """
    named = [
        (task, label, re.sub(r"[-_]+", " ", name)) for task in tasks for label, name in enumerate(data.labels[task])
    ]
    rows = as_data([name for _, _, name in named], data)
    for row, (task, label, _) in enumerate(named):
        rows.targets[task][row] = label
    return rows
