"""Quality and comparisons of one task, from one bootstrap that all models share.

Every mean that the report gives an interval for is a column of one matrix, resampled once: so differences and
ratios of columns are paired, and a report of six models costs one bootstrap a task.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distill import metrics
from distill.contracts import IGNORE
from distill.metrics import Floats
from distill.report.context import BASELINE, PRUNED, STUDENT, TEACHER, ModelEntry, ReportContext
from distill.shapley import contributions

Key = tuple[str, ...]
FREQUENT: Key = ("most frequent class",)
"""The column of what is right without reading anything."""


class TaskEvidence:
    """One task's labelled rows, the models that answer it, and the bootstrap replicates of their measures."""

    def __init__(self, context: ReportContext, task: str) -> None:
        """Resample every measure of the task once."""
        labelled = context.targets[task] != IGNORE
        self.task = task
        self.models = [model for model in context.models if task in model.logits]
        self.targets = context.targets[task][labelled]
        self.rows = np.flatnonzero(labelled)
        self.num_groups = len(np.unique(context.groups[labelled]))
        self.logits = {model.name: model.logits[task][labelled] for model in self.models}
        columns = self._columns(labelled)
        matrix = (
            np.stack(list(columns.values()), axis=1).astype(np.float64) if columns else np.zeros((len(self.rows), 0))
        )
        groups = context.groups[labelled]
        replicates = metrics.resampled_means(matrix, groups, context.resamples, context.bootstrap_seed)
        means = matrix.mean(axis=0) if len(matrix) else np.full(len(columns), np.nan)
        self.means = dict(zip(columns, means, strict=True))
        self.replicates = dict(zip(columns, replicates.T, strict=True))

    def _columns(self, labelled: Any) -> dict[Key, Floats]:
        columns: dict[Key, Floats] = {}
        teacher = self.logits.get(TEACHER)
        for model in self.models:
            predictions = self.logits[model.name].argmax(axis=1)
            columns["right", model.name] = predictions == self.targets
            if teacher is not None:
                columns["agrees", model.name] = predictions == teacher.argmax(axis=1)
            for modality, logits in model.subsets.items():
                if self.task in logits:
                    alone = logits[self.task][labelled].argmax(axis=1)
                    columns["right", model.name, modality] = alone == self.targets
        if len(self.targets):
            columns[FREQUENT] = self.targets == np.bincount(self.targets).argmax()
        return columns

    def mean(self, *key: str) -> dict[str, Any]:
        """Return a measure's value and interval."""
        return {"value": self.means[key], "ci95": _interval(self.replicates[key])}

    def quality(self, name: str) -> dict[str, Any]:
        """Return every measure of one model on this task."""
        logits, right = self.logits[name], self.mean("right", name)
        result = {
            "accuracy": right["value"],
            "ci95": right["ci95"],
            "macro_f1": metrics.macro_f1(logits, self.targets),
            "ece": metrics.ece(logits, self.targets),
            "correct": int((logits.argmax(axis=1) == self.targets).sum()),
            "n": len(self.targets),
        }
        return result | self._closeness(name)

    def _closeness(self, name: str) -> dict[str, Any]:
        keys = ("agreement_with_teacher", "agreement_ci95", "kl_to_teacher", "retention", "retention_ci95")
        if TEACHER not in self.logits:
            return dict.fromkeys(keys)
        agrees = self.mean("agrees", name)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.means["right", name] / self.means["right", TEACHER]
            ratios = self.replicates["right", name] / self.replicates["right", TEACHER]
        kl = metrics.kl_divergence(self.logits[name], self.logits[TEACHER])
        return dict(zip(keys, (agrees["value"], agrees["ci95"], kl, ratio, _interval(ratios)), strict=True))

    def subset(self, name: str, modality: str) -> dict[str, Any] | None:
        """Return the accuracy of a model that is given some modalities alone, or None where it was not tried."""
        if ("right", name, modality) not in self.means:
            return None
        right = self.mean("right", name, modality)
        return {"accuracy": right["value"], "ci95": right["ci95"], "n": len(self.targets)}

    def contributions(self, name: str) -> dict[str, dict[str, Any]] | None:
        """Return the Shapley value of each modality, in accuracy; None where not all subsets were tried.

        They add up to the accuracy with all modalities less the share of the most frequent class, which is what no
        modality at all is worth.
        """
        if FREQUENT not in self.means:
            return None
        parts = [key[2] for key in self.means if key[:2] == ("right", name) and len(key) == 3]
        values, replicates = (
            contributions(of["right", name], {part: of["right", name, part] for part in parts}, of[FREQUENT])
            for of in (self.means, self.replicates)
        )
        if values is None or replicates is None:
            return None
        return {part: {"value": float(values[part]), "ci95": _interval(replicates[part])} for part in values}

    def comparison(self, model: ModelEntry, reference: ModelEntry, kind: str) -> dict[str, Any]:
        """Return the paired comparison of two models' accuracy, with what an export must not change."""
        ours, theirs = ("right", model.name), ("right", reference.name)
        replicates = self.replicates[ours] - self.replicates[theirs]
        a, b = self.logits[model.name], self.logits[reference.name]
        a_right, b_right = a.argmax(axis=1) == self.targets, b.argmax(axis=1) == self.targets
        result = {
            "model": model.name,
            "reference": reference.name,
            "task": self.task,
            "kind": kind,
            "difference": self.means[ours] - self.means[theirs],
            "ci95": _interval(replicates),
            "p_value": metrics.two_sided_p(replicates),
            "only_model_right": int((a_right & ~b_right).sum()),
            "only_reference_right": int((b_right & ~a_right).sum()),
            "n": len(self.targets),
            "num_groups": self.num_groups,
            "agreement": metrics.agreement(a, b),
        }
        if kind == "source":
            gap = np.abs(model.logits[self.task].astype(np.float64) - reference.logits[self.task])
            result["max_abs_logit_difference"] = gap.max(initial=0.0)
        return result


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
