"""The studies on the emoji: arms differ in nothing but how they learn, and validation alone chooses."""

from __future__ import annotations

import pytest

import students
from benchmarks import emoji_studies
from benchmarks.emoji_studies import STUDIES, Trial, parse
from benchmarks.student_arms import Result
from distill import pipeline
from distill.check import check_recipe
from distill.config import Recipe
from distill.losses.terms import labelled_alone, needs_teacher
from distill.recipe import load_recipe

TRIALS = [
    (name, arm, trial) for name, study in STUDIES.items() for arm, trials in study.arms.items() for trial in trials
]


def recipe_of(name: str, trial: Trial) -> Recipe:
    recipe = load_recipe(STUDIES[name].recipe, [*STUDIES[name].overrides, *trial.overrides])
    return recipe.model_copy(
        update={"student": recipe.student.model_copy(update={"objective": trial.objective(recipe)})}
    )


@pytest.mark.parametrize(("name", "arm", "trial"), TRIALS, ids=lambda value: getattr(value, "shown", value))
def test_every_trial_is_a_valid_recipe(name: str, arm: str, trial: Trial) -> None:
    recipe = recipe_of(name, trial)
    check_recipe(recipe, pipeline.ENCODERS, students.INHERITANCES)
    taught_by_labels = arm.startswith(("labels alone", "labels and inheritance", "contrastive alone"))
    assert needs_teacher(recipe.student.objective) is not taught_by_labels


def rows_seen(recipe: Recipe) -> float:
    """Passes over all training rows that the student's steps amount to."""
    hidden = recipe.data.labelled is not None and labelled_alone(recipe.student.objective)
    return recipe.student.train.epochs * (recipe.data.labelled.groups if hidden else 1.0)


@pytest.mark.parametrize("name", STUDIES)
def test_arms_share_teacher_rows_and_steps_and_have_equally_many_trials(name: str) -> None:
    arms = STUDIES[name].arms
    assert len({len(trials) for trials in arms.values()}) == 1
    recipes = [recipe_of(name, trial) for trials in arms.values() for trial in trials]
    for shared in ("data", "teacher", "cache", "seed"):
        assert len({repr(getattr(recipe, shared)) for recipe in recipes}) == 1, shared
    assert len({recipe.student.train.batch_size for recipe in recipes}) == 1
    assert len({round(rows_seen(recipe), 2) for recipe in recipes}) == 1
    assert len({repr(recipe.student.encoders) for recipe in recipes}) == 1


def test_a_trial_is_chosen_by_validation_on_the_first_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def run_arm(recipe: Recipe, name: str, objective: list[object]) -> Result:
        asked.append((recipe.seed, name))
        valid, test = (0.9, 0.5) if name.endswith(("lr 0.006", "one text a row")) else (0.5, 0.9)
        return Result({"valid": {"category": valid}, "test": {"category": test}})

    monkeypatch.setattr(emoji_studies, "run_arm", run_arm)
    found = {"scratch": emoji_studies.measure("scratch", parse(["--seeds", "2"]))}
    assert [arm["chosen"] for arm in found["scratch"]] == ["lr 0.006", "one text a row"]
    assert [name for seed, name in asked if seed == 1] == [
        "scratch, labels alone, lr 0.006",
        "scratch, labels and KD, one text a row",
    ]
    text = emoji_studies.markdown(found, "the command", 2)
    assert "| labels and KD | one text a row | 90.0 | 50.0 ±0.0 | 0.0 (0.0 to 0.0) |" in text
    assert "labels alone: lr 0.0015 50.0, lr 0.003 50.0, lr 0.006 90.0" in text
