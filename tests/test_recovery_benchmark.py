"""The benchmark of pruning and int8: arms without a teacher are valid recipes, and its tables say what was found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

import students
from benchmarks.quickstart_seeds import seed_recipes
from benchmarks.recovery import ARMS, BUNDLES, BY_KD, DENSE, ONE_SHOT, labels_alone, markdown, summarize
from distill import pipeline
from distill.check import check_recipe
from distill.config import TransferConfig
from distill.losses.terms import needs_teacher


def recipes(number: int) -> list[Any]:
    return seed_recipes("quickstart", [BUNDLES], "runs", number)


def test_labels_alone_need_no_teacher_and_leave_the_recipe_as_it_is() -> None:
    (recipe,) = recipes(1)
    before = recipe.model_dump()
    changed = labels_alone(recipe)
    check_recipe(changed.model_copy(update={"transfer": TransferConfig()}), pipeline.ENCODERS, students.INHERITANCES)
    assert recipe.model_dump() == before and needs_teacher(recipe.student.objective)
    assert not needs_teacher(changed.student.objective)
    assert changed.export.quantize.qat.objective == changed.student.objective == recipe.student.baseline
    assert changed.prune == recipe.prune


def finished(faster: float) -> Any:
    """A workspace of four test rows, two a family."""
    data = SimpleNamespace(groups=np.array([0, 0, 1, 1]), targets={"kind": None}, rows=lambda split: np.arange(4))
    sizes = {"teacher": 40e6, "student": 10e6, "onnx-int8": 1e6, "onnx-int8-qat": 1e6}
    models = {name: {"size_bytes": size, "latency_ms": {"p50": size / 1e6}} for name, size in sizes.items()}
    models["onnx-int8"]["latency_ms"]["p50"] /= faster
    return SimpleNamespace(data=lambda: data, done={"bench": SimpleNamespace(info={"models": models})})


def test_tables() -> None:
    right = {DENSE: [1, 1, 1, 1], ONE_SHOT: [1, 0, 0, 0], BY_KD: [1, 1, 1, np.nan]}
    scores = [{name: {"kind": np.array(right.get(name, [1, 1, 0, 0]), float)} for name in ARMS}] * 2
    summary = summarize(recipes(2), scores, [finished(1), finished(2)])
    text = markdown({"command": "python -m benchmarks.recovery", **summary})
    assert text.startswith("# quickstart: what pruning and int8 cost, 2 seeds\n\n    python -m benchmarks.recovery\n")
    assert f"| {ONE_SHOT} | kind | 25.0 ±0.0 | 25.0 | 25.0 |" in text
    assert f"| {ONE_SHOT} − {DENSE} | kind | −75.0 |" in text
    assert "| onnx-int8 | 1.00 MB | 0.750 ms | 40.0× | 60.0× | 40.0× | 80.0× |" in text
    assert summary["accuracy"][BY_KD] == {"kind": [1.0, 1.0]}
    assert [entry["of"] for entry in summary["differences"]].count(BY_KD) == 3
