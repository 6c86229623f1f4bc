"""What a task's targets are: one class, several labels, or numbers. Without torch, so that bundles know it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.contracts import IGNORE

CLASSIFICATION, MULTILABEL, REGRESSION = KINDS = ("classification", "multilabel", "regression")


@dataclass(frozen=True)
class Task:
    """A task as the data stage found it.

    Attributes:
        kind: "classification" (targets int64 [N], IGNORE where missing), "multilabel" (float32 [N, K], 1 where a label
            holds, 0 where it does not, NaN where nobody knows) or "regression" (float32 [N, K], standardised, NaN where
            missing).
        names: of the K outputs: classes, labels or columns of numbers.
        mean: of each column of numbers in the training rows; empty for other kinds.
        std: the same of its standard deviation: a target t is (number - mean) / std.
    """

    kind: str
    names: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def target_type(self) -> tuple[str, tuple[int, ...]]:
        """Type and shape of a row's target."""
        return ("<i8", ()) if self.kind == CLASSIFICATION else ("<f4", (len(self.names),))

    def numbers(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return standardised numbers [..., K] in their own units."""
        return np.asarray(values, np.float64) * self.std + self.mean


def known(targets: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows have a target, or one of several: bool [N]."""
    found = ~np.isnan(targets) if np.issubdtype(targets.dtype, np.floating) else targets != IGNORE
    return found if found.ndim == 1 else found.any(axis=tuple(range(1, found.ndim)))


def missing_like(targets: NDArray[Any], count: int) -> NDArray[Any]:
    """Return the targets of so many rows that have none, of the same type."""
    nothing = np.nan if np.issubdtype(targets.dtype, np.floating) else IGNORE
    return np.full((count, *targets.shape[1:]), nothing, targets.dtype)


def tasks_to_json(tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Return tasks as JSON values; one of classes is the list of their names."""
    return {name: list(task.names) if task.kind == CLASSIFICATION else _plain(task) for name, task in tasks.items()}


def _plain(task: Task) -> dict[str, Any]:
    found = {"kind": task.kind, "names": list(task.names)}
    return found | ({"mean": list(task.mean), "std": list(task.std)} if task.kind == REGRESSION else {})


def tasks_from_json(content: Mapping[str, Any]) -> dict[str, Task]:
    """Return what :func:`tasks_to_json` was given.

    Raises:
        ValueError: it is no such content.
    """
    return {name: _task(name, value) for name, value in content.items()}


def _task(name: str, value: Any) -> Task:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Task(CLASSIFICATION, tuple(map(str, value)))
    if not isinstance(value, Mapping) or value.get("kind") not in KINDS:
        raise ValueError(f"task {name!r}: expected a list of classes, or a mapping with a kind of {', '.join(KINDS)}")
    found = Task(str(value["kind"]), *(tuple(value.get(field, ())) for field in ("names", "mean", "std")))
    if found.kind == REGRESSION and not len(found.names) == len(found.mean) == len(found.std):
        raise ValueError(f"task {name!r}: names, mean and std need one entry each")
    return found
