"""Quality and comparisons of one task, from one bootstrap that all models share.

Every measure that the report gives an interval for is resampled with the same draws: so differences and ratios are
paired. Those that are means over rows are columns of one matrix: a report of six models costs one bootstrap a task.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from distill import captions, measures, metrics
from distill.metrics import Floats, Integers
from distill.report.context import BASELINE, PRUNED, STUDENT, TEACHER, ModelEntry, ReportContext
from distill.shapley import contributions
from distill.targets import CAPTIONING, CLASSIFICATION, MULTILABEL, REGRESSION, known

Key = tuple[str, ...]
FREQUENT: Key = ("most frequent class",)
"""The column of what is right without reading anything."""
Score = Callable[[Floats | None], Any]
"""Weights [R, N] -> a measure of each resample, [R]."""


class TaskEvidence:
    """One task's rows with a target, the models that answer it, and the bootstrap replicates of their measures.

    Attributes:
        kind: of the task.
        measure: by which models are compared; the columns ("score", MODEL) and ("score", MODEL, MODALITIES) hold it.
    """

    def __init__(self, context: ReportContext, task: str) -> None:
        """Resample every measure of the task once."""
        self.task, self.info = task, context.tasks[task]
        self.kind, self.measure = self.info.kind, measures.NAMES[self.info.kind]
        answered = known(context.targets[task])
        self.models = [model for model in context.models if task in model.logits]
        self.targets = context.targets[task][answered]
        self.rows = np.flatnonzero(answered)
        self.num_groups = len(np.unique(context.groups[answered]))
        self.logits = {model.name: model.logits[task][answered] for model in self.models}
        self.means: dict[Key, Any] = {}
        self.replicates: dict[Key, Floats] = {}
        self.true: list[list[str]] = []  # captions of each row
        draw = (context.groups[answered], context.resamples, context.bootstrap_seed)
        if self.kind == CAPTIONING:
            shown = None if context.shown is None else context.shown[answered]
            self.true = captions.references(self.info, self.targets, shown)
        if self.kind in (CLASSIFICATION, CAPTIONING):
            self._resample_means(self._columns(answered), *draw)
        else:
            self._resample_scores(self._scores(answered), *draw)

    def _resample_means(self, columns: dict[Key, Floats], groups: Integers, resamples: int, seed: int) -> None:
        """Of what is a mean over rows, all at once."""
        empty = np.zeros((len(self.rows), 0))
        matrix = np.stack(list(columns.values()), axis=1).astype(np.float64) if columns else empty
        replicates = metrics.resampled_means(matrix, groups, resamples, seed)
        means = matrix.mean(axis=0) if len(matrix) else np.full(len(columns), np.nan)
        self.means = dict(zip(columns, means, strict=True))
        self.replicates = dict(zip(columns, replicates.T, strict=True))

    def _resample_scores(self, scores: dict[Key, Score], groups: Integers, resamples: int, seed: int) -> None:
        """Of what is none, one by one."""
        self.means = {key: score(None)[0] for key, score in scores.items()}
        parts = list(metrics.resampled_weights(groups, resamples, seed))
        self.replicates = {
            key: np.concatenate([score(weights) for weights in parts]) if parts else np.full(resamples, np.nan)
            for key, score in scores.items()
        }

    def _columns(self, answered: Any) -> dict[Key, Floats]:
        columns: dict[Key, Any] = {}
        teacher = self.logits.get(TEACHER)
        for model in self.models:
            ours = self.logits[model.name]
            columns["score", model.name] = self.rows_score(ours)
            if teacher is not None and self.kind == CAPTIONING:
                columns["agrees", model.name] = (ours == teacher).all(axis=1)
            elif teacher is not None:
                columns["agrees", model.name] = ours.argmax(axis=1) == teacher.argmax(axis=1)
            for modality, logits in model.subsets.items():
                if self.task in logits:
                    columns["score", model.name, modality] = self.rows_score(logits[self.task][answered])
        if self.kind == CLASSIFICATION and len(self.targets):
            columns[FREQUENT] = self.targets == np.bincount(self.targets).argmax()
        return columns

    def rows_score(self, outputs: Floats) -> Floats:
        """What each row adds to a measure that is a mean over rows."""
        if self.kind == CAPTIONING:
            return captions.cider(captions.texts(self.info, outputs), self.true)
        return np.asarray(outputs.argmax(axis=1) == self.targets)

    def _scores(self, answered: Any) -> dict[Key, Score]:
        scores: dict[Key, Score] = {}
        for model in self.models:
            scores["score", model.name] = self._score(self.logits[model.name])
            if TEACHER in self.logits:
                agrees = partial(measures.agreement, self.kind, self.logits[model.name], self.logits[TEACHER])
                scores["agrees", model.name] = agrees
            for modality, logits in model.subsets.items():
                if self.task in logits:
                    scores["score", model.name, modality] = self._score(logits[self.task][answered])
        return scores

    def _score(self, outputs: Floats) -> Score:
        return partial(measures.score, self.kind, outputs, self.targets)

    def mean(self, *key: str) -> dict[str, Any]:
        """Return a measure's value and interval."""
        return {"value": self.means[key], "ci95": _interval(self.replicates[key])}

    def quality(self, name: str) -> dict[str, Any]:
        """Return every measure of one model on this task."""
        score = self.mean("score", name)
        result = {self.measure: score["value"], "ci95": score["ci95"], **DETAILS[self.kind](self, self.logits[name])}
        return {**result, "n": len(self.targets), **self._closeness(name)}

    def _closeness(self, name: str) -> dict[str, Any]:
        keys = ("agreement_with_teacher", "agreement_ci95", "kl_to_teacher", "retention", "retention_ci95")
        if TEACHER not in self.logits:
            return dict.fromkeys(keys)
        agrees = self.mean("agrees", name)
        with np.errstate(divide="ignore", invalid="ignore"):
            better = self.means["score", TEACHER] > 0  # an R² may be below
            ratio = self.means["score", name] / self.means["score", TEACHER] if better else np.nan
            ratios = self.replicates["score", name] / self.replicates["score", TEACHER] * (1.0 if better else np.nan)
        classes = self.kind == CLASSIFICATION
        kl = metrics.kl_divergence(self.logits[name], self.logits[TEACHER]) if classes else None
        return dict(zip(keys, (agrees["value"], agrees["ci95"], kl, ratio, _interval(ratios)), strict=True))

    def subset(self, name: str, modality: str) -> dict[str, Any] | None:
        """Return the measure of a model that is given some modalities alone, or None where it was not tried."""
        if ("score", name, modality) not in self.means:
            return None
        score = self.mean("score", name, modality)
        return {self.measure: score["value"], "ci95": score["ci95"], "n": len(self.targets)}

    def contributions(self, name: str) -> dict[str, dict[str, Any]] | None:
        """Return the Shapley value of each modality, in accuracy; None of other tasks, or where a subset was not tried.

        They add up to the accuracy with all modalities less the share of the most frequent class, which is what no
        modality at all is worth.
        """
        if FREQUENT not in self.means:
            return None
        parts = [key[2] for key in self.means if key[:2] == ("score", name) and len(key) == 3]
        values, replicates = (
            contributions(of["score", name], {part: of["score", name, part] for part in parts}, of[FREQUENT])
            for of in (self.means, self.replicates)
        )
        if values is None or replicates is None:
            return None
        return {part: {"value": float(values[part]), "ci95": _interval(replicates[part])} for part in values}

    def comparison(self, model: ModelEntry, reference: ModelEntry, kind: str) -> dict[str, Any]:
        """Return the paired comparison of two models' measures, with what an export must not change."""
        ours, theirs = ("score", model.name), ("score", reference.name)
        replicates = self.replicates[ours] - self.replicates[theirs]
        a, b = self.logits[model.name], self.logits[reference.name]
        result = {
            "model": model.name,
            "reference": reference.name,
            "task": self.task,
            "kind": kind,
            "difference": self.means[ours] - self.means[theirs],
            "ci95": _interval(replicates),
            "p_value": metrics.two_sided_p(replicates),
            "n": len(self.targets),
            "num_groups": self.num_groups,
            "agreement": float(measures.agreement(self.kind, a, b)[0]),
        }
        if self.kind == CLASSIFICATION:
            a_right, b_right = a.argmax(axis=1) == self.targets, b.argmax(axis=1) == self.targets
            result["only_model_right"] = int((a_right & ~b_right).sum())
            result["only_reference_right"] = int((b_right & ~a_right).sum())
        if kind == "source" and self.kind != CAPTIONING:
            gap = np.abs(model.logits[self.task].astype(np.float64) - reference.logits[self.task])
            result["max_abs_logit_difference"] = gap.max(initial=0.0)
        return result


def _of_classes(evidence: TaskEvidence, logits: Floats) -> dict[str, Any]:
    return {
        "macro_f1": metrics.macro_f1(logits, evidence.targets),
        "ece": metrics.ece(logits, evidence.targets),
        "correct": int((logits.argmax(axis=1) == evidence.targets).sum()),
    }


def _of_labels(evidence: TaskEvidence, logits: Floats) -> dict[str, Any]:
    areas = measures.auroc(logits, evidence.targets)[0]
    measured = areas[~np.isnan(areas)]
    mean = float(measured.mean()) if len(measured) else None
    return {"auroc": mean, **measures.label_f1(logits, evidence.targets)}


def _of_numbers(evidence: TaskEvidence, values: Floats) -> dict[str, Any]:
    task = evidence.info
    errors = measures.mean_absolute_error(task.numbers(values), task.numbers(evidence.targets))[0]
    return {"mean_absolute_error": dict(zip(task.names, errors.tolist(), strict=True))}


def _of_captions(evidence: TaskEvidence, ids: Floats) -> dict[str, Any]:
    written = captions.texts(evidence.info, ids)
    exact = captions.exact(written, evidence.true)
    return {
        "exact_match": float(exact.mean()) if len(exact) else None,
        "bleu1": captions.bleu(written, evidence.true, 1),
        "bleu4": captions.bleu(written, evidence.true, 4),
    }


DETAILS = {CLASSIFICATION: _of_classes, MULTILABEL: _of_labels, REGRESSION: _of_numbers, CAPTIONING: _of_captions}
"""Kind of task -> what is told of a model beside the measure."""


def pairs(models: list[ModelEntry]) -> list[tuple[ModelEntry, ModelEntry, str]]:
    """Return (model, reference, kind) of each comparison: the stages, exports, the teacher."""
    named = {model.name: model for model in models}
    found: dict[tuple[str, str], str] = {}
    if STUDENT in named and BASELINE in named:
        found[STUDENT, BASELINE] = "baseline"
    if PRUNED in named and STUDENT in named:
        found[PRUNED, STUDENT] = "pruning"
    for model in models:
        if model.source in named and model.source != model.name:
            found[model.name, str(model.source)] = "source"
    for model in models:
        if TEACHER in named and model.name != TEACHER:
            found.setdefault((model.name, TEACHER), "teacher")
    return [(named[a], named[b], kind) for (a, b), kind in found.items()]


def _interval(replicates: Floats) -> tuple[float, float] | None:
    return metrics.interval95(replicates) if np.isfinite(replicates).all() else None
