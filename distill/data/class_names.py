"""Names of classes as texts that a teacher learns from, beside those of the rows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distill.contracts import UserError
from distill.data.mixed import as_data
from distill.data.prepared import PreparedData
from distill.preprocess import has_text


def class_names(data: PreparedData, tasks: Sequence[str]) -> PreparedData:
    """Return the names of some tasks' classes as training rows, each with its label and no other.

    Hyphens and underscores are read as spaces: what classifiers make of a class's name (Radford et al. 2021, arXiv
    2103.00020) is learnt here from its text, beside the texts of its rows. A name of nothing else stays as it is; one
    of white space is left out, as no row may have a text without words.

    Raises:
        UserError: all names are white space.
    """
    named = [
        (task, label, spoken(name)) for task in tasks for label, name in enumerate(data.labels[task]) if has_text(name)
    ]
    if not named:
        raise UserError(
            f"teacher.class_names.tasks: the classes of {' and '.join(tasks)} have no names; leave them out"
        )
    rows = as_data([name for _, _, name in named], data)
    for row, (task, label, _) in enumerate(named):
        rows.targets[task][row] = label
    return rows


def spoken(name: str) -> str:
    """Return a class's name as a text, with spaces in place of hyphens and underscores."""
    words = re.sub(r"[-_]+", " ", name)
    return words if has_text(words) else name
