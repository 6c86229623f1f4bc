"""Labels for some rows, the teacher for all: who learns from which rows of a run."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file
from test_report import context
from tiny_project import distill, make_project, refusal

from distill import estimate, pipeline
from distill.config import TermConfig
from distill.data.prepared import PreparedData
from distill.losses.terms import labelled_alone, learns_unlabelled
from distill.optimize import as_many_steps
from distill.recipe import load_recipe
from distill.report import build_report, render_html, render_markdown
from distill.results import _curve


@pytest.mark.parametrize(
    "value, message",
    [
        ("0", "'data.labelled.groups' is 0"),
        ("1.5", "'data.labelled.groups' is 1.5"),
        ("{share: 0.1}", "unknown key 'data.labelled.share'"),
        ("{rows: 0}", "'data.labelled.rows' is 0"),
        ("all", "'data.labelled' is 'all': Input should be a mapping of keys"),
    ],
)
def test_mistakes_in_the_recipe_are_one_sentence(tmp_path, monkeypatch, value, message):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert message in refusal(distill("validate", "recipe.yaml", f"data.labelled={value}"))


HIDDEN = "data.labelled={rows: 30}"


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    """Recipes: labels hidden by the recipe; the same ones missing in the table; those rows missing."""
    folder = tmp_path_factory.mktemp("labelled")
    make_project(folder)
    runs = {"hidden": load_recipe(folder / "recipe.yaml", [HIDDEN, f"output={folder}/runs", "name=hidden"])}
    data = PreparedData.open(pipeline.run(runs["hidden"], until="data", quiet=True)["data"].path)
    kept = set(data.ids[data.rows("train", labelled=True)].tolist())
    table = list(csv.DictReader((folder / "rows.csv").read_text(encoding="utf-8").splitlines()))
    unlabelled = [row for row in table if row["split"] == "train" and int(row["id"]) not in kept]
    blank = [row | {"colour": "", "shape": ""} if row in unlabelled else row for row in table]
    for name, rows in (("missing", blank), ("dropped", [row for row in table if row not in unlabelled])):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(rows)
        extra = [f"data.source.path={folder}/{name}.csv", f"output={folder}/runs", f"name={name}"]
        runs[name] = load_recipe(folder / "recipe.yaml", extra)
    return runs


@pytest.fixture(scope="module")
def finished(projects):
    """Name of a project -> its stages up to student and baseline."""
    return {
        name: pipeline.run(recipe, until="baseline", quiet=True) | pipeline.run(recipe, until="student", quiet=True)
        for name, recipe in projects.items()
    }


def weights(done, stage):
    return load_file(done[stage].path / "model.safetensors")


@pytest.mark.parametrize("stage", ["teacher", "baseline", "student"])
def test_hidden_labels_are_as_good_as_missing_ones(finished, stage):
    torch.testing.assert_close(weights(finished["hidden"], stage), weights(finished["missing"], stage), rtol=0, atol=0)


def test_the_teacher_learns_from_labelled_rows_alone(finished):
    torch.testing.assert_close(weights(finished["hidden"], "teacher"), weights(finished["dropped"], "teacher"))


def test_the_student_learns_from_all_rows(finished):
    hidden, dropped = finished["hidden"], finished["dropped"]
    assert hidden["cache"].info["rows"] == 72 and dropped["cache"].info["rows"] == 30
    assert hidden["student"].info["steps"] == 2 * 5 and dropped["student"].info["steps"] == 2 * 2


def test_the_baseline_takes_as_many_steps_on_its_few_rows(finished):
    assert finished["hidden"]["baseline"].info["steps"] == finished["hidden"]["student"].info["steps"]
    assert finished["hidden"]["baseline"].info["epochs"] == 5
    lines = (finished["hidden"]["baseline"].path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert ["valid/accuracy" in json.loads(line) for line in lines] == [False, True, False, True, True]


def test_a_student_without_a_teacher_reads_labelled_rows_alone(projects, finished):
    """So does one whose teacher's terms need labels too."""
    folder = projects["hidden"].output
    for name, needs in (("alone", ""), ("both", ", {loss: dkd, task: colour}")):
        objective = f"student.objective=[{{loss: cross_entropy, task: colour}}{needs}]"
        recipe = load_recipe(f"{folder}/../recipe.yaml", [HIDDEN, f"output={folder}/{name}", "name=hidden", objective])
        done = pipeline.run(recipe, until="student", quiet=True) | pipeline.run(recipe, until="baseline", quiet=True)
        assert done["student"].info["steps"] == done["baseline"].info["steps"] == 2 * 2


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (["cross_entropy"], True),
        (["cross_entropy", "dkd"], True),
        (["cross_entropy", "clip_infonce"], True),
        (["cross_entropy", "kd"], False),
        (["dkd", "clip_relational_kl"], False),
        (["clip_infonce"], False),
        ([], False),
    ],
)
def test_rows_without_labels_are_left_out_where_labels_are_read_and_nothing_else_teaches(losses, expected):
    terms = [TermConfig(loss=loss) for loss in losses]
    assert labelled_alone(terms) is expected and not (expected and learns_unlabelled(terms))


def test_budgets_in_epochs_of_fewer_batches(projects):
    train = projects["hidden"].student.train.model_copy(update={"epochs": 6, "validate_every": 2, "patience": 3})
    assert as_many_steps(train, 7, 7) is train
    longer = as_many_steps(train, 50, 5)
    assert (longer.epochs, longer.max_steps, longer.validate_every, longer.patience) == (60, 300, 20, 30)
    capped = as_many_steps(train.model_copy(update={"max_steps": 42}), 50, 5)
    assert (capped.epochs, capped.max_steps) == (9, 42)


def test_the_seed_chooses_the_rows_and_so_counts_for_the_data(projects):
    folder = projects["hidden"].output

    def keys(*extra):
        recipes = [load_recipe(f"{folder}/../recipe.yaml", [*extra, f"seed={seed}"]) for seed in (0, 1)]
        return [pipeline.plan(recipe, until="data")[0].key for recipe in recipes]

    hidden, shown = keys(HIDDEN), keys()
    assert hidden[0] != hidden[1] and shown[0] == shown[1] not in hidden
    assert keys("data.labelled=1.0") == keys("data.labelled={groups: 1}") == shown  # hides nothing


def test_other_seeds_label_other_rows_and_leave_the_test_rows(projects, finished):
    hidden = [finished["hidden"]["data"].path]
    folder = projects["hidden"].output
    other = load_recipe(f"{folder}/../recipe.yaml", [HIDDEN, f"output={folder}/seeds", "seed=1"])
    hidden.append(pipeline.run(other, until="data", quiet=True)["data"].path)
    one, two = (PreparedData.open(place) for place in hidden)
    assert one.fingerprint("test") == two.fingerprint("test") and one.fingerprint("train") != two.fingerprint("train")


def test_the_plan_counts_labelled_rows(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "_least_seconds", lambda work: [work(), 64.0][1])  # a second a row, whatever it does
    answer = distill("run", "recipe.yaml", HIDDEN, "--dry-run", "--json")
    found = json.loads(answer.out)
    assert found["labelled"] == 30 and found["rows"]["train"] == 72
    assert found["seconds"]["teacher"] == 3 * 30 and found["seconds"]["baseline"] == found["seconds"]["student"] == 144
    assert ", 30 of train labelled\n" in distill("run", "recipe.yaml", HIDDEN, "--dry-run").out


def test_what_the_report_says_of_the_data(finished):
    done = finished["hidden"]
    curves = {name: _curve(done[name].path / "metrics.jsonl") for name in ("baseline", "student")}
    report = build_report(context(data=done["data"].info, curves=curves))
    assert report["data"]["labelled"]["train"] == 30 and report["data"]["rows"]["train"] == 72
    assert "- data, hidden labels: 42\n" in render_markdown(report)
    baseline, student = report["curves"].values()
    assert len(baseline) > len(student) and baseline[-1]["step"] == student[-1]["step"] == 10
    page = render_html(report)
    assert "Training loss by step" in page and "by epoch" not in page


def test_the_packaged_recipe_is_found_by_name():
    labelled = load_recipe("few_labels").data.labelled
    assert labelled is not None and (labelled.groups, labelled.rows) == (0.1, None)
