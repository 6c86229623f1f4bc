"""Where two models differ: classes, confusions, calibration, and the rows that got worse."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill import measures, metrics
from distill.report import formats
from distill.report.context import TEACHER, ModelEntry, ReportContext
from distill.report.evidence import TaskEvidence
from distill.targets import CAPTIONING, CLASSIFICATION, MULTILABEL, Task

MATRIX_CLASSES = 20
"""Most classes for which the whole confusion matrix is kept; beyond it the most confused pairs say more."""

NUM_PAIRS = 12
CLEARLY = 0.25  # deviations by which a number is worse than the teacher's, to be told
TEXT_LENGTH = 300


def class_differences(evidence: TaskEvidence, names: list[str], model: str, reference: str) -> dict[str, Any]:
    """Return both models' recall for each class that has rows, the one that lost most right answers first.

    Of labels, which rows may have several of, it is their average precision.
    """
    several = evidence.kind == MULTILABEL
    ours, theirs = (_by_class(evidence, name) for name in (model, reference))
    rows = np.nansum(evidence.targets, axis=0) if several else np.bincount(evidence.targets, minlength=len(names))
    rows = rows.astype(np.int64)
    classes = [
        {
            "class": names[c],
            "n": rows[c],
            "model": ours[c],
            "reference": theirs[c],
            "difference": ours[c] - theirs[c],
            "change": round((ours[c] - theirs[c]) * rows[c]),
        }
        for c in np.flatnonzero(rows)
    ]
    measure = "average precision" if several else "recall"
    ordered = sorted(classes, key=lambda c: int(c["change"]))
    return {"model": model, "reference": reference, "measure": measure, "classes": ordered}


def _by_class(evidence: TaskEvidence, model: str) -> Any:
    if evidence.kind == MULTILABEL:
        return measures.average_precision(evidence.logits[model], evidence.targets)[0]
    return metrics.per_class_recall(evidence.logits[model], evidence.targets)


def confusions(evidence: TaskEvidence, names: list[str], model: str, reference: str | None) -> dict[str, Any]:
    """Return the most frequent mistakes of a model beside the reference's count, and the matrix where it is small.

    A mistake that was made once is listed only if none was made twice.
    """
    counts = metrics.confusion_matrix(evidence.logits[model], evidence.targets)
    other = metrics.confusion_matrix(evidence.logits[reference], evidence.targets) if reference else None
    mistakes = counts - np.diag(np.diag(counts))
    largest = np.argsort(-mistakes, axis=None, kind="stable")[:NUM_PAIRS]
    pairs = [
        {
            "target": names[target],
            "predicted": names[predicted],
            "count": mistakes[target, predicted],
            "n": counts[target].sum(),
            "reference_count": None if other is None else other[target, predicted],
        }
        for target, predicted in zip(*np.unravel_index(largest, mistakes.shape), strict=True)
        if mistakes[target, predicted] >= max(1, min(2, mistakes.max(initial=0)))
    ]
    matrix = counts if len(names) <= MATRIX_CLASSES else None
    return {"model": model, "reference": reference, "pairs": pairs, "classes": len(names), "matrix": matrix}


def reliability(evidence: TaskEvidence, model: str) -> dict[str, Any]:
    """Return the points of a model's reliability diagram."""
    return metrics.reliability(evidence.logits[model], evidence.targets)._asdict()


def regressions(context: ReportContext, evidences: list[TaskEvidence], model: ModelEntry) -> list[dict[str, Any]]:
    """Return rows that the teacher gets right and the model wrong, the largest loss of the true class first.

    Of labels and numbers, rows with more wrong labels or a larger error than the teacher's.

    The examples are shared between the tasks, and no group is shown twice.
    """
    chosen: list[dict[str, Any]] = []
    seen: set[int] = set()
    evidences = [e for e in evidences if TEACHER in e.logits and model.name in e.logits and model.name != TEACHER]
    for number, evidence in enumerate(evidences, start=1):
        limit = context.num_examples * number // len(evidences)
        for position in _worst_rows(evidence, model.name):
            row = int(evidence.rows[position])
            if len(chosen) >= limit:
                break
            if int(context.groups[row]) not in seen:
                seen.add(int(context.groups[row]))
                chosen.append(_example(context, evidence, model.name, int(position)))
    return chosen


def written(context: ReportContext, evidence: TaskEvidence, shown: Sequence[str]) -> list[dict[str, Any]]:
    """Return what models wrote for some rows, evenly spread over the first rows of groups: typical cases."""
    _, first = np.unique(context.groups[evidence.rows], return_index=True)
    first = np.sort(first)
    chosen = (
        first[np.linspace(0, len(first) - 1, min(context.num_examples, len(first))).astype(int)] if len(first) else []
    )
    task, found = context.tasks[evidence.task], []
    for position in chosen:
        row_id = int(context.ids[evidence.rows[position]])
        answers = {name: task.text(evidence.logits[name][position]) for name in shown if name in evidence.logits}
        image = _inlined(_shown(context, row_id).get("image_png"))
        found.append({"id": row_id, "true": task.text(evidence.targets[position]), "answers": answers, "image": image})
    return found


def doubted(context: ReportContext, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the labels of a task that the teacher doubts, with what the rows show."""
    strongest = []
    for doubt in found["strongest"]:
        shown = _shown(context, doubt["id"])
        text = str(shown.get("text") or "")[:TEXT_LENGTH]
        strongest.append({**doubt, "text": text, "image": _inlined(shown.get("image_png"))})
    return {**found, "strongest": strongest}


def _inlined(image: bytes | None) -> str | None:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}" if image else None


def _worst_rows(evidence: TaskEvidence, model: str) -> Any:
    """Positions among the rows with a target, the worst first."""
    if evidence.kind != CLASSIFICATION:
        ours, theirs = (_errors(evidence, evidence.logits[name]) for name in (model, TEACHER))
        positions = np.flatnonzero(ours > theirs + CLEARLY)
        return positions[np.argsort(-(ours - theirs)[positions], kind="stable")]
    teacher, ours = evidence.logits[TEACHER], evidence.logits[model]
    lost = (teacher.argmax(axis=1) == evidence.targets) & (ours.argmax(axis=1) != evidence.targets)
    positions = np.flatnonzero(lost)
    targets = evidence.targets[positions]
    fall = _true_probability(teacher[positions], targets) - _true_probability(ours[positions], targets)
    return positions[np.argsort(-fall, kind="stable")]


def _errors(evidence: TaskEvidence, outputs: Any) -> Any:
    """Of each row: wrong labels, what CIDEr-D lacks, or the mean error of its numbers in deviations."""
    if evidence.kind == CAPTIONING:
        return 1 - evidence.rows_score(outputs)
    if evidence.kind == MULTILABEL:
        return (((outputs > 0) != (evidence.targets == 1)) & ~np.isnan(evidence.targets)).sum(axis=1)
    return np.nanmean(np.abs(outputs - evidence.targets), axis=1)


def _true_probability(logits: Any, targets: Any) -> Any:
    return np.exp(metrics.log_softmax(logits))[np.arange(len(targets)), targets] if len(targets) else np.zeros(0)


def _example(context: ReportContext, evidence: TaskEvidence, model: str, position: int) -> dict[str, Any]:
    task, row_id = context.tasks[evidence.task], int(context.ids[evidence.rows[position]])
    shown = _shown(context, row_id)
    return {
        "id": row_id,
        "task": evidence.task,
        "target": _truth(task, evidence.targets[position]),
        "teacher": _guess(task, evidence.logits[TEACHER][position]),
        "model": {"name": model} | _guess(task, evidence.logits[model][position]),
        "text": str(shown.get("text") or "")[:TEXT_LENGTH],
        "image": _inlined(shown.get("image_png")),
    }


def _truth(task: Task, target: Any) -> str:
    if task.kind == CLASSIFICATION:
        return task.names[target]
    if task.kind == CAPTIONING:
        return task.text(target)
    return _labels(task, target == 1) if task.kind == MULTILABEL else _numbers(task, target)


def _guess(task: Task, outputs: Any) -> dict[str, Any]:
    """What a model answers, and how sure it is: of a class alone."""
    if task.kind == CLASSIFICATION:
        best = int(outputs.argmax())
        return {"class": task.names[best], "probability": np.exp(metrics.log_softmax(outputs[None])[0])[best]}
    if task.kind == CAPTIONING:
        return {"class": task.text(outputs) or "nothing", "probability": None}
    said = _labels(task, outputs > 0) if task.kind == MULTILABEL else _numbers(task, outputs)
    return {"class": said, "probability": None}


def _labels(task: Task, given: Any) -> str:
    return ", ".join(name for name, holds in zip(task.names, given, strict=True) if holds) or "none"


def _numbers(task: Task, values: Any) -> str:
    found = zip(task.names, task.numbers(values), strict=True)
    return ", ".join(f"{name} {formats.significant(value)}" for name, value in found if not np.isnan(value))


def _shown(context: ReportContext, row_id: int) -> Mapping[str, Any]:
    if context.examples is None:
        return {}
    if callable(context.examples):
        return context.examples(row_id)
    return context.examples.get(row_id, {})
