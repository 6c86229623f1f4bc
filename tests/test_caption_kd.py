"""The benchmark of captions: its arms are valid recipes that differ in what they should, and its tables."""

import json

import pytest
from tiny_project import make_captioning

import students
from benchmarks.caption_kd import (
    BOTH,
    LABELS,
    SEQUENCES,
    WORDS,
    arms,
    caption_task,
    example_table,
    markdown,
    measure,
    parse,
    scores,
)
from benchmarks.quickstart_seeds import seed_recipes
from distill import pipeline
from distill.check import check_recipe
from distill.contracts import UserError
from distill.recipe import load_recipe

TRUE = ["red sun", "red sun", "blue cat", "green moon over there"]
WRITTEN = {
    "true": TRUE,
    "teacher": TRUE,
    LABELS: ["red sun", "blue sun", "red cat", "moon"],
    WORDS: ["red sun", "red sun", "red cat", "green moon"],
    SEQUENCES: TRUE,
    BOTH: TRUE,
}


@pytest.mark.parametrize("name", ["speech_to_text", "caption"])
def test_arms_are_valid_and_differ_in_objective_and_told_captions_alone(name, tmp_path):
    (recipe,) = seed_recipes(name, [], str(tmp_path), 1)
    contents = {}
    for arm, changed in arms(recipe).items():
        check_recipe(changed, pipeline.ENCODERS, students.INHERITANCES)
        content = changed.model_dump()
        told, teaches = content["cache"].pop("captions"), len(content["student"].pop("objective")) > 1
        contents[arm] = (told is not None, teaches)
        name = content.pop("name")
        assert name.startswith(recipe.name) and json.dumps(content) == json.dumps(contents.setdefault("rest", content))
    assert contents[LABELS] == (False, False) and contents[WORDS] == (False, True)
    assert contents[SEQUENCES] == (True, False) and contents[BOTH] == (True, True)


def test_a_recipe_without_captions_is_refused():
    with pytest.raises(UserError, match="quickstart has no task of kind captioning"):
        caption_task(load_recipe("quickstart"))


def test_tables(tmp_path):
    (recipe,) = seed_recipes("caption", [], str(tmp_path), 1)
    assert scores(WRITTEN, "teacher")["exact match"] == 1 and scores(WRITTEN, LABELS)["exact match"] == 0.25
    text = markdown([WRITTEN, WRITTEN], recipe, "python -m benchmarks.caption_kd")
    lines = text.splitlines()
    assert lines[0] == "# Captions, with distillation and without: caption" and "4 test rows, seeds 0 to 1" in text
    (row,) = (line for line in lines if line.startswith(f"| student, {WORDS} |"))
    assert "| 50.0 ±0.0 | +25.0 (+25.0 to +25.0) |" in row
    (row,) = (line for line in lines if line.startswith("| teacher |"))
    assert "| 100.0 ±0.0 |  | 100.0 ±0.0 |  |" in row
    assert example_table(WRITTEN).count("\n") == 4  # each true caption once


def test_a_small_run_writes_captions_in_every_way(tmp_path):
    small = ["teacher.train.epochs=4", "student.train.epochs=2", f"output={tmp_path / 'runs'}"]
    recipe = load_recipe(make_captioning(tmp_path), small)
    found = measure(recipe)
    assert {*found} == {*WRITTEN} and all(len(said) == len(found["true"]) for said in found.values())
    assert all(0 <= value <= 1 for name in found for value in scores(found, name).values())


def test_options():
    options = parse(["student.train.epochs=2", "--seeds", "1", "--recipe", "caption"])
    assert (options.recipe, options.seeds, options.overrides) == ("caption", 1, ["student.train.epochs=2"])
