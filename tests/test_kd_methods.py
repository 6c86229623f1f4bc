"""The table of methods: its objectives are valid, weights are chosen by validation, failures stay in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import students
from benchmarks import kd_methods
from benchmarks.kd_methods import FACTORS, METHODS, NONE, RECIPE, Method, seed_recipe
from benchmarks.seed_tables import command_line
from benchmarks.student_arms import Result
from distill import pipeline
from distill.check import check_recipe
from distill.config import Recipe, TermConfig


def result(valid: float, test: float) -> Result:
    return Result(
        {split: dict.fromkeys(kd_methods.TASKS, share) for split, share in (("valid", valid), ("test", test))}
    )


def test_every_objective_is_valid_and_reads_what_the_cache_holds(tmp_path: Path) -> None:
    recipe = seed_recipe(0, str(tmp_path), [])
    assert len({method.name for method in METHODS}) == len(METHODS)
    for method in METHODS:
        objective = method.objective(recipe.student.baseline, 3.0)
        changed = recipe.model_copy(update={"student": recipe.student.model_copy(update={"objective": objective})})
        check_recipe(changed, pipeline.ENCODERS, students.INHERITANCES)
        for term, usual in zip(objective[len(recipe.student.baseline) :], method.terms, strict=True):
            assert term.weight == 3 * usual["weight"]
            assert {*term.tapped("teacher")} <= {*recipe.cache.taps}


def test_the_weight_is_chosen_by_validation_on_the_first_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def run_arm(recipe: Recipe, name: str, objective: list[TermConfig]) -> Result:
        asked.append((recipe.seed, name))
        return result(valid=0.9 if name == f"kd x{FACTORS[2]:.2g}" else 0.5, test=0.1)

    monkeypatch.setattr(kd_methods, "run_arm", run_arm)
    recipes = [seed_recipe(seed, "runs", []) for seed in (0, 1)]
    arms = kd_methods.measure(recipes, METHODS[:1])
    assert [arm["name"] for arm in arms] == [NONE, RECIPE, "kd"]
    assert arms[2]["factor"] == FACTORS[2] and [run.chosen_by for run in arms[2]["runs"]] == [0.9, 0.9]
    assert [name for seed, name in asked if seed == 1] == [NONE, RECIPE, f"kd x{FACTORS[2]:.2g}"]


def test_the_table_is_ordered_by_validation_and_keeps_failures() -> None:
    def arm(name: str, factor: float | None, *runs: Result) -> dict[str, Any]:
        return {"name": name, "on": "logits", "factor": factor, "runs": list(runs)}

    arms = [
        arm(NONE, None, result(0.5, 0.60), result(0.5, 0.62)),
        arm("kd", 1 / 3, result(0.4, 0.70), result(0.4, 0.74)),
        arm("dkd", 3.0, result(0.6, 0.61), result(0.6, 0.61)),
        arm("nkd", 1.0, result(0.9, 0.9), Result({}, "the loss is not finite")),
    ]
    lines = kd_methods.markdown(arms, "command").splitlines()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    assert list(rows)[2:] == ["dkd", NONE, "kd", "nkd"]
    assert rows["kd"][:3] == ["logits", "1/3", "40.0"] and rows["kd"][4].startswith("+11.0 (")
    assert rows[NONE][4] == "" and rows["nkd"][2] == "failed in 1 of 2: the loss is not finite"


def test_a_table_stands_without_the_arm_that_others_are_compared_with() -> None:
    failed, fine = Result({}, "the loss is not finite"), result(0.5, 0.6)
    alone = {"name": NONE, "on": "", "factor": None}
    for runs in ([failed, fine], [fine, failed], [failed, failed]):
        arms = [{**alone, "runs": runs}, {"name": "kd", "on": "logits", "factor": 1.0, "runs": [fine, fine]}]
        rows = [line.split("|")[1:-1] for line in kd_methods.markdown(arms, "command").splitlines() if "|" in line]
        assert [row[0].strip() for row in rows[2:]] == ["kd", NONE]
        assert [cell.strip() for cell in rows[2][4:]] == ["60.0 ±0.0", "", "60.0 ±0.0", ""]
    assert "failed in 2 of 2" in kd_methods.markdown([{**alone, "runs": [failed, failed]}], "command")


def test_a_method_adds_its_terms_to_the_labels() -> None:
    labels = [TermConfig(loss="cross_entropy", task="category")]
    method = Method("kd", "logits", ({"loss": "kd", "task": "category", "weight": 0.5},))
    assert [(term.loss, term.weight) for term in method.objective(labels, 3.0)] == [("cross_entropy", 1.0), ("kd", 1.5)]


def test_the_command_shown_names_no_place_of_a_machine() -> None:
    arguments = [
        "--seeds",
        "3",
        "--output",
        "/a/b",
        "--json=/c",
        "student.train.epochs=5",
        "--markdown",
        "d.md",
        "--methods",
        "a b",
    ]
    shown = command_line("benchmarks.kd_methods", arguments)
    assert shown == "python -m benchmarks.kd_methods --seeds 3 student.train.epochs=5 --methods 'a b'"
