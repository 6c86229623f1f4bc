"""What each model retrieves: recalls with intervals, ranks, and paired differences, for both directions."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill import metrics
from distill.metrics import Floats
from distill.report.context import TEACHER, ReportContext
from distill.report.evidence import pairs as compared
from distill.retrieval import DIRECTIONS, RECALLS, Found, Pairs, search

MAIN = "recall@1"
"""What models are compared by."""


def retrieval(context: ReportContext) -> dict[str, Any]:
    """Return for each direction its queries and what there is to find, each model's measures, and comparisons.

    Empty where nothing was measured. Queries are resampled by the group of the first row that they occur in.
    """
    answered = [model for model in context.models if model.embeddings]
    if context.pairs is None or not answered:
        return {}
    result = {}
    for direction, (asking, sought) in DIRECTIONS.items():
        found = {model.name: search(model.embeddings, context.pairs, direction) for model in answered}
        evidence = _Evidence(context, context.pairs, asking, found)
        result[direction] = {
            "queries": len(context.pairs.first_rows[asking]),
            "gallery": len(context.pairs.first_rows[sought]),
            "num_groups": evidence.num_groups,
            "models": {name: evidence.measures(name) for name in found},
            "comparisons": [
                {"kind": kind, **evidence.comparison(model.name, reference.name)}
                for model, reference, kind in compared(answered)
            ],
        }
    return result


class _Evidence:
    """The bootstrap replicates of one direction, which all models share."""

    def __init__(self, context: ReportContext, pairs: Pairs, asking: str, found: dict[str, Found]) -> None:
        groups = context.groups[pairs.first_rows[asking]]
        columns: dict[tuple[str, str], Any] = {
            (name, f"recall@{k}"): each.rank <= k for name, each in found.items() for k in RECALLS
        }
        columns |= {(name, "map"): each.average_precision for name, each in found.items()}
        matrix = np.stack([np.asarray(column, np.float64) for column in columns.values()], axis=1)
        replicates = metrics.resampled_means(matrix, groups, context.resamples, context.bootstrap_seed)
        self.found, self.num_groups = found, len(np.unique(groups))
        self.means = dict(zip(columns, matrix.mean(axis=0), strict=True))
        self.replicates: dict[tuple[str, str], Floats] = dict(zip(columns, replicates.T, strict=True))

    def measures(self, name: str) -> dict[str, Any]:
        """Recalls and mean average precision with intervals, ranks, and recall@1 as a share of the teacher's."""
        rank = self.found[name].rank
        result: dict[str, Any] = {
            measure: {"value": self.means[name, measure], "ci95": metrics.interval95(self.replicates[name, measure])}
            for measure in (*(f"recall@{k}" for k in RECALLS), "map")
        }
        result |= {"median_rank": float(np.median(rank)), "mean_rank": float(np.mean(rank)), "retention": None}
        if self.means.get((TEACHER, MAIN)):
            result["retention"] = self.means[name, MAIN] / self.means[TEACHER, MAIN]
        return result

    def comparison(self, model: str, reference: str) -> dict[str, Any]:
        """The paired differences of two models' recalls, that of recall@1 first."""
        measures = {f"recall@{k}": self._difference(model, reference, f"recall@{k}") for k in RECALLS}
        return {"model": model, "reference": reference, **measures[MAIN], "measures": measures}

    def _difference(self, model: str, reference: str, measure: str) -> dict[str, Any]:
        replicates = self.replicates[model, measure] - self.replicates[reference, measure]
        return {
            "difference": self.means[model, measure] - self.means[reference, measure],
            "ci95": metrics.interval95(replicates),
            "p_value": metrics.two_sided_p(replicates),
        }
