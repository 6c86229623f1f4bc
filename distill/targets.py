"""What a task's targets are: one class, several labels, or numbers. Without torch, so that bundles know it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.contracts import IGNORE

CLASSIFICATION, MULTILABEL, REGRESSION, CAPTIONING = KINDS = (
    "classification",
    "multilabel",
    "regression",
    "captioning",
)
PAD, UNKNOWN, FIRST, LAST = range(4)
"""Ids of a vocabulary's first tokens: behind a caption, an unknown word, before a caption, the one that closes it."""
CONTINUES = "##"
"""Begins tokens that go on with a word."""


@dataclass(frozen=True)
class Task:
    """A task as the data stage found it.

    Attributes:
        kind: "classification" (targets int64 [N], IGNORE where missing), "multilabel" (float32 [N, K], 1 where a label
            holds, 0 where it does not, NaN where nobody knows), "regression" (float32 [N, K], standardised, NaN where
            missing) or "captioning" (int64 [N, L], token ids up to LAST, IGNORE behind it and where missing).
        names: of the K outputs: classes, labels, columns of numbers, or tokens of captions.
        mean: of each column of numbers in the training rows; empty for other kinds.
        std: the same of its standard deviation: a target t is (number - mean) / std.
        length: L of captions.
    """

    kind: str
    names: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    length: int = 0

    @property
    def target_type(self) -> tuple[str, tuple[int, ...]]:
        """Type and shape of a row's target."""
        shapes = {CLASSIFICATION: ("<i8", ()), CAPTIONING: ("<i8", (self.length,))}
        return shapes.get(self.kind, ("<f4", (len(self.names),)))

    def text(self, ids: NDArray[Any]) -> str:
        """Return a caption [L] as words with spaces between; it ends at LAST, or before what is no token."""
        words: list[str] = []
        for token in np.asarray(ids).astype(np.int64).tolist():
            if token in (PAD, LAST) or not 0 <= token < len(self.names):
                break
            name = self.names[token]
            if name.startswith(CONTINUES) and words:
                words[-1] += name.removeprefix(CONTINUES)
            else:
                words.append(name)
        return " ".join(words)

    def numbers(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return standardised numbers [..., K] in their own units."""
        return np.asarray(values, np.float64) * self.std + self.mean


def unnamed(count: int, kind: str = CLASSIFICATION, length: int = 0) -> Task:
    """Return a task of which only the number of outputs is known."""
    names = tuple(map(str, range(count)))
    some = count if kind == REGRESSION else 0
    return Task(kind, names, (0.0,) * some, (1.0,) * some, length)


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
    if task.kind == REGRESSION:
        return {**found, "mean": list(task.mean), "std": list(task.std)}
    return {**found, "length": task.length} if task.kind == CAPTIONING else found


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
    names, mean, std = (tuple(value.get(field, ())) for field in ("names", "mean", "std"))
    found = Task(str(value["kind"]), names, mean, std, int(value.get("length", 0)))
    if found.kind == REGRESSION and not len(found.names) == len(found.mean) == len(found.std):
        raise ValueError(f"task {name!r}: names, mean and std need one entry each")
    return found
