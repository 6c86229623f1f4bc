"""Labels that a teacher doubts: candidates for a second look, found by confident learning.

Northcutt, Jiang and Chuang 2021 (JAIR 70, arXiv 1911.00068): a class is likely for a row if its probability reaches the
mean probability of that class over the rows that have it as their label. A label is a candidate if the most probable of
the likely classes is another one. A teacher that was fitted on a row has learnt its label too, so of training rows
fewer mistakes come to light than of others.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distill import evaluate
from distill.cache import TeacherCache
from distill.contracts import IGNORE, TEST, TRAIN
from distill.jobs import cache_key
from distill.metrics import Floats, Integers, log_softmax
from distill.progress import progress
from distill.runs import atomic
from distill.targets import CLASSIFICATION, MULTILABEL, Task
from distill.workspace import TEACHER, Workspace

JUDGED = (CLASSIFICATION, MULTILABEL)
"""Kinds of tasks whose labels can be doubted."""
ROWS = 4096  # of the cache at once
COLUMNS = ("task", "split", "id", "given", "answer", "probability_given", "probability_answer")

Rows = tuple[Integers, NDArray[Any], Floats]
"""Ids [N], targets as their task says, and what a teacher thinks: probabilities [N, C], or of K labels [N, K]."""


class Doubt(NamedTuple):
    """A label that a teacher doubts.

    Attributes:
        id: of the row.
        label: which of several labels; 0 of a task of classes.
        given: the row's class; of a label 1 where the row has it and 0 where not.
        answer: the teacher's in its place.
        probability_given: what the teacher gives the one.
        probability_answer: and the other.
    """

    id: int
    label: int
    given: int
    answer: int
    probability_given: float
    probability_answer: float


class Doubts(NamedTuple):
    """What a teacher doubts of a task's rows in a split.

    Attributes:
        found: the strongest first: the largest distance of the two probabilities.
        judged: how many labels there are: rows with a class, or known labels of rows.
    """

    found: list[Doubt]
    judged: int


def doubts_of(work: Workspace) -> dict[str, dict[str, Doubts]]:
    """Return what a finished run's own teacher doubts: task -> split -> doubts.

    Of the test rows it asks the predictions, of the training rows the cache, where there is one: the mean over its
    views. Tasks that the teacher does not answer are left out.
    """
    data = work.data()
    said = evaluate.read_arrays(work.path("evaluate") / f"{TEACHER}.safetensors")
    rows, found = data.rows(TEST), {}
    for name, task in data.tasks.items():
        if task.kind not in JUDGED or f"logits.{name}" not in said:
            continue
        tested = [(data.ids[rows], data.targets[name][rows], probabilities(task.kind, said[f"logits.{name}"]))]
        found[name] = {TEST: doubts(task.kind, partial(iter, tested))}
    if not found or not work.recipe.cache.enabled:
        return found
    cache = TeacherCache.open(work.path("cache"), cache_key(work))
    with progress("look for wrong labels", quiet=work.quiet) as report:
        for number, name in enumerate(found):
            if f"logits.{name}" in cache.info["tensors"]:
                read = _Cached(cache, name, data.tasks[name], data.ids, data.targets[name], data.rows(TRAIN))
                found[name] = {TRAIN: doubts(data.tasks[name].kind, read), **found[name]}
            report(number + 1, len(found), name)
    return found


class _Cached:
    """Passes over the training rows of a task, with the mean of what the cache holds about each."""

    def __init__(
        self, cache: TeacherCache, name: str, task: Task, ids: Integers, targets: NDArray[Any], rows: Integers
    ) -> None:
        self.cache, self.name, self.task = cache, name, task
        self.ids, self.targets, self.rows = ids, targets, rows

    def __call__(self) -> Iterator[Rows]:
        for start in range(0, len(self.rows), ROWS):
            rows = self.rows[start : start + ROWS]
            ids = torch.from_numpy(np.asarray(self.ids[rows], np.int64))
            parts = [self.cache.lookup(ids, torch.full_like(ids, view)).logits[self.name] for view in self.cache.views]
            mean = np.mean([probabilities(self.task.kind, part.numpy()) for part in parts], axis=0)
            yield ids.numpy(), self.targets[rows], mean


def probabilities(kind: str, logits: Floats) -> Floats:
    """Return what logits [N, C], or [N, K] of labels, say: probabilities of the same shape."""
    if kind == CLASSIFICATION:
        return np.exp(log_softmax(logits))
    return 0.5 * (1 + np.tanh(logits.astype(np.float64) / 2))


def doubts(kind: str, read: Callable[[], Iterable[Rows]]) -> Doubts:
    """Find the labels that a teacher doubts.

    Args:
        kind: of the task, one of :data:`JUDGED`.
        read: begins a pass over the rows, of which there are two, in as many parts as it likes.
    """
    total: Any = 0.0
    count: Any = 0
    for _, given, chances in _labels(kind, read()):
        has = given[..., None] == np.arange(chances.shape[-1])
        total, count = total + (chances * has).sum(0), count + has.sum(0)
    likely = np.divide(total, count, out=np.full(np.shape(total), np.inf), where=np.asarray(count) > 0)
    found: list[Doubt] = []
    for ids, given, chances in _labels(kind, read()):
        reached = np.where(chances >= likely, chances, -1.0)
        answers = reached.argmax(-1)
        for row, label in zip(*np.nonzero((given >= 0) & (reached.max(-1) >= 0) & (answers != given)), strict=True):
            own, other = int(given[row, label]), int(answers[row, label])
            sure = float(chances[row, label, own]), float(chances[row, label, other])
            found.append(Doubt(int(ids[row]), int(label), own, other, *sure))
    found.sort(key=lambda doubt: (doubt.probability_given - doubt.probability_answer, doubt.id, doubt.label))
    return Doubts(found, int(np.sum(count)))


def _labels(kind: str, parts: Iterable[Rows]) -> Iterator[tuple[Integers, Integers, Floats]]:
    """Ids [N], what is given [N, K] (-1 where nothing is) and probabilities [N, K, C]; a class is the only label."""
    for ids, targets, chances in parts:
        if kind == CLASSIFICATION:
            yield ids, np.where(targets == IGNORE, -1, targets)[:, None], chances[:, None]
        else:
            given = np.where(np.isnan(targets), -1, targets).astype(np.int64)
            yield ids, given, np.stack([1 - chances, chances], axis=-1)


def named(task: Task, label: int, value: int) -> str:
    """Return a class, or whether there is a label, in words."""
    if task.kind == CLASSIFICATION:
        return task.names[value]
    return task.names[label] if value else f"not {task.names[label]}"


def told(task: Task, splits: Mapping[str, Doubts], most: int) -> dict[str, Any]:
    """Return JSON values: how many labels of each split are doubted, and the strongest doubts of all in words.

    Args:
        task: what there was to answer.
        splits: split -> doubts.
        most: doubts to name.
    """
    together = [(split, doubt) for split, each in splits.items() for doubt in each.found]
    together.sort(key=lambda one: one[1].probability_given - one[1].probability_answer)
    strongest = [
        {
            "id": doubt.id,
            "split": split,
            "given": named(task, doubt.label, doubt.given),
            "answer": named(task, doubt.label, doubt.answer),
            "probability_given": doubt.probability_given,
            "probability_answer": doubt.probability_answer,
        }
        for split, doubt in together[:most]
    ]
    counts = {split: {"judged": each.judged, "doubted": len(each.found)} for split, each in splits.items()}
    return {"splits": counts, "strongest": strongest}


def write_doubts(path: Path, tasks: Mapping[str, Task], found: Mapping[str, Mapping[str, Doubts]]) -> None:
    """Write every doubt as a line of CSV.

    Args:
        path: the file.
        tasks: what there was to answer.
        found: as :func:`doubts_of` returns it.
    """
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name, splits in found.items():
            for split, each in splits.items():
                for one in each.found:
                    words = [named(tasks[name], one.label, value) for value in (one.given, one.answer)]
                    sure = [f"{value:.4f}" for value in (one.probability_given, one.probability_answer)]
                    table.writerow([name, split, one.id, *words, *sure])
