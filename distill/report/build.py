"""``report.json``: the truth that the Markdown and HTML reports are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.measures import LEARNT
from distill.report import details
from distill.report.context import BASELINE, STUDENT, TEACHER, ModelEntry, ReportContext, shipped
from distill.report.evidence import FREQUENT, TaskEvidence, pairs
from distill.report.headline import headline
from distill.report.retrieval import retrieval
from distill.targets import CAPTIONING, CLASSIFICATION, MULTILABEL

SCHEMA_VERSION = 1
WORST_LAYERS = 5


def build_report(context: ReportContext) -> dict[str, Any]:
    """Return the report as JSON values: finite numbers, strings, lists and dicts; None where nothing is known."""
    evidences = [TaskEvidence(context, task) for task in context.tasks]
    focus = shipped(context.models)
    report = {
        "schema_version": SCHEMA_VERSION,
        "name": context.name,
        "created": context.created,
        "seeds": list(context.seeds),
        "data": dict(context.data),
        "tasks": {
            e.task: {
                "kind": e.kind,
                "measure": e.measure,
                "validated_by": LEARNT[e.kind],
                "num_classes": len(e.info.names),
                "n": len(e.targets),
                "num_groups": e.num_groups,
                "most_frequent": e.means.get(FREQUENT),
            }
            for e in evidences
        },
        "intervals": {
            "level": 0.95,
            "method": "percentile cluster bootstrap",
            "resamples": context.resamples,
            "seed": context.bootstrap_seed,
            "num_rows": len(context.ids),
            "num_groups": len(np.unique(context.groups)),
        },
        "shipped": focus.name if focus else None,
        "models": [_model(model, evidences) for model in context.models],
        "comparisons": [
            evidence.comparison(model, reference, kind)
            for model, reference, kind in pairs(list(context.models))
            for evidence in evidences
            if model.name in evidence.logits and reference.name in evidence.logits
        ],
        "retrieval": retrieval(context),
        **_details(context, evidences, focus),
        "curves": context.curves,
        "costs": context.costs,
        "cache": context.cache,
        "teachers": context.teachers,
        "parity": context.parity,
        "not_run": context.not_run,
        "doubts": {task: details.doubted(context, found) for task, found in context.doubts.items()},
        "quantized": {name: _layers(found) for name, found in context.quantized.items()},
        "measured": context.measured,
        "versions": context.versions,
        "recipe": context.recipe,
    }
    clean: dict[str, Any] = finite(report)
    return clean | {"headline": headline(clean)}


def finite(value: Any) -> Any:
    """Return a value as plain JSON: arrays as lists, numpy numbers as Python's, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, np.generic):
        return finite(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Sequence | set | frozenset):
        return [finite(item) for item in value]
    return str(value)


def _model(model: ModelEntry, evidences: list[TaskEvidence]) -> dict[str, Any]:
    answered = [evidence for evidence in evidences if model.name in evidence.logits]
    return {
        "name": model.name,
        "stage": model.stage,
        "runtime": model.runtime,
        "source": model.source,
        "quality": {evidence.task: evidence.quality(model.name) for evidence in answered},
        "subsets": {
            modality: {e.task: e.subset(model.name, modality) for e in answered if e.task in model.subsets[modality]}
            for modality in model.subsets
        },
        "contributions": {e.task: found for e in answered if (found := e.contributions(model.name)) is not None},
        "num_params": model.num_params,
        "flops": model.flops,
        "size_bytes": model.size_bytes,
        "latency_ms": {key: (model.latency_ms or {}).get(key) for key in ("p50", "p95")},
        "latency_note": model.latency_note,
        "peak_memory_bytes": model.peak_memory_bytes,
        "seeds": list(model.seeds),
    }


def _layers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The layers whose output int8 changed most, and what a search for float layers found."""
    worst = sorted(found["layers"], key=lambda layer: layer["sqnr_db"])[:WORST_LAYERS]
    return {"num_layers": len(found["layers"]), "worst_layers": worst, "search": found.get("search")}


def _details(context: ReportContext, evidences: list[TaskEvidence], focus: ModelEntry | None) -> dict[str, Any]:
    if focus is None:
        return {"reliability": {}, "class_differences": {}, "confusions": {}, "written": {}, "regressions": []}
    shown = [name for name in (TEACHER, BASELINE, STUDENT, focus.name) if context.model(name)]
    answered = [evidence for evidence in evidences if focus.name in evidence.logits]
    taught = [evidence for evidence in answered if TEACHER in evidence.logits]
    names = {task: list(info.names) for task, info in context.tasks.items()}
    return {
        "reliability": {
            e.task: {name: details.reliability(e, name) for name in dict.fromkeys(shown) if name in e.logits}
            for e in evidences
            if e.kind == CLASSIFICATION
        },
        "class_differences": {
            e.task: details.class_differences(e, names[e.task], focus.name, TEACHER)
            for e in taught
            if e.kind in (CLASSIFICATION, MULTILABEL)
        },
        "class_names": {task: classes for task, classes in names.items() if len(classes) <= details.MATRIX_CLASSES},
        "confusions": {
            e.task: details.confusions(e, names[e.task], focus.name, TEACHER if e in taught else None)
            for e in answered
            if e.kind == CLASSIFICATION
        },
        "written": {
            e.task: details.written(context, e, list(dict.fromkeys(shown))) for e in evidences if e.kind == CAPTIONING
        },
        "regressions": details.regressions(context, evidences, focus),
    }
