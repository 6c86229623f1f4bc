"""The benchmark of balance: its arms are valid recipes that differ in what they should, and its tables."""

import json
from argparse import Namespace

import pytest

import students
from benchmarks import balance
from benchmarks.balance import ALL, NOTHING, PLAIN, arm_recipe, arms, markdown, measure, parse
from benchmarks.quickstart_seeds import seed_recipes
from benchmarks.seed_tables import command_line
from distill import pipeline
from distill.check import check_recipe


@pytest.mark.parametrize("name", ["quickstart", "trimodal"])
def test_arms_are_valid_and_differ_in_dropout_and_alpha_alone(name, tmp_path):
    (recipe,) = seed_recipes(name, [], str(tmp_path), 1)
    made = {arm: arm_recipe(recipe, *settings) for arm, settings in arms(0.2, 0.3).items()}
    found = {}
    for arm, changed in made.items():
        check_recipe(changed, pipeline.ENCODERS, students.INHERITANCES)
        content = changed.model_dump()
        found[arm] = content["student"].pop("modality_dropout"), content["student"]["train"].pop("balance")["alpha"]
        assert json.dumps(content) == json.dumps(made[PLAIN].model_dump() | {"student": content["student"]})
    assert found == {"plain": (0, 0), "modality dropout": (0.2, 0), "OGM-GE": (0, 0.3), "both": (0.2, 0.3)}


def result(accuracy):
    subsets = {ALL: accuracy, "image": 0.5, "text": 0.25, NOTHING: 0.1}
    return {
        "accuracy": {"kind": subsets},
        "shapley": {"kind": {"image": 0.5, "text": -0.1}},
        "scores": {"image": 0.4, "text": 0.2},
    }


def test_tables(monkeypatch, tmp_path):
    accuracies = {"plain": 0.6, "modality dropout": 0.7, "OGM-GE": 0.5, "both": 0.6}

    def run_arm(recipe, name):
        return result(accuracies[name] + 0.01 * recipe.seed)

    monkeypatch.setattr(balance, "run_arm", run_arm)
    recipes, lines = seed_recipes("quickstart", [], str(tmp_path), 2), []
    found = measure(recipes, 0.2, 0.3, lines.append)
    assert len(lines) == 8 and lines[0] == "quickstart-seed0, plain: {'kind': 0.6}"
    text = markdown(found, recipes[0], Namespace(modality_dropout=0.2, alpha=0.3), "python -m benchmarks.balance")
    assert text.startswith("# Balance of modalities: quickstart, seeds 0 to 1\n\n    python -m benchmarks.balance\n")
    assert "| modality dropout | 70.5 ±6.4 | +10.0 (+10.0 to +10.0) | 50.0 ±0.0 | 25.0 ±0.0 |" in text
    assert "| plain | 60.5 ±6.4 |  | 50.0 ±0.0 |" in text
    assert "| both | 50.0 ±0.0 | −10.0 ±0.0 |" in text
    assert "The most frequent class has 10.0" in text
    assert max(map(len, text.splitlines())) < 125


def test_command_line_has_no_places():
    given = ["--recipe", "trimodal", "--out", "a.md", "student.train.epochs=2", "--json=b.json", "--seeds", "2"]
    options = parse(given)
    assert (options.recipe, options.seeds, str(options.markdown)) == ("trimodal", 2, "a.md")
    assert options.overrides == ["student.train.epochs=2"]
    shown = command_line("benchmarks.balance", given)
    assert shown == "python -m benchmarks.balance --recipe trimodal student.train.epochs=2 --seeds 2"
