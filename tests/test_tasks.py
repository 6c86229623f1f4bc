"""Several labels a row and numbers, beside classes: from the columns of a table to a report and a bundle's answers."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from tiny_project import distill, make_project

from distill.contracts import UserError
from distill.data.prepare import prepare
from distill.data.prepared import PreparedData
from distill.data_config import DataConfig
from distill.predict import load
from distill.recipe import load_recipe
from distill.runs import read_json
from distill.targets import CLASSIFICATION, MULTILABEL, REGRESSION, Task, known, tasks_from_json, tasks_to_json

TARGETS = """\
  targets:
    colour: colour
    traits: {column: traits, kind: multilabel}
    sizes: {column: [place, height], kind: regression}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The tiny project with labels (the words of the caption) and numbers (of the row and of its shape)."""
    folder = tmp_path_factory.mktemp("tasks")
    recipe = make_project(folder)
    with open(folder / "rows.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["traits"] = ";".join(row["caption"].split()[1:])
        row["place"] = "" if number == 3 else 100 + 5 * (row["colour"] == "red")
        row["height"] = 8.5 if row["shape"] == "moon" else 16.5
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    text = recipe.read_text()
    assert "  targets: {colour: colour, shape: shape}\n" in text
    text = text.replace("  targets: {colour: colour, shape: shape}\n", TARGETS)
    teacher = """\
    - {loss: cross_entropy, task: colour}
    - {loss: bce, task: traits, params: {positive_weight: balanced}}
    - {loss: smooth_l1, task: sizes}
"""
    student = (
        teacher
        + """\
    - {loss: kd, task: colour}
    - {loss: multilabel_kd, task: traits}
    - {loss: mse_logits, task: sizes}
    - {loss: regression_kd, task: sizes, weight: 0.1}
"""
    )
    head, _, rest = text.partition("  members: 2\n")
    train, _, rest = rest.partition("  objective:\n")
    _, _, rest = rest.partition("student:\n")
    body, _, rest = rest.partition("  baseline:\n")
    _, _, end = rest.partition("cache: {views")
    fitted = f"{head}{train}  objective:\n{teacher}"
    learnt = f"student:\n{body}  baseline:\n{teacher}  objective:\n{student}"
    recipe.write_text(f"{fitted}{learnt}cache: {{views{end}")
    return recipe


@pytest.fixture(scope="module")
def finished(project):
    answer = distill(
        "run", project, f"output={project.parent / 'runs'}", "student.train.epochs=6", "teacher.train.epochs=6"
    )
    assert answer.code == 0, answer.err
    return project.parent / "runs" / "tiny", answer


def test_a_run_measures_each_task_by_its_own_measure(finished):
    folder, answer = finished
    report = read_json(folder / "report" / "report.json")
    assert {name: (task["kind"], task["measure"]) for name, task in report["tasks"].items()} == {
        "colour": (CLASSIFICATION, "accuracy"),
        "traits": (MULTILABEL, "map"),
        "sizes": (REGRESSION, "r2"),
    }
    for model in report["models"]:
        quality = model["quality"]
        for task, measure in (("colour", "accuracy"), ("traits", "map"), ("sizes", "r2")):
            low, high = quality[task]["ci95"]
            assert low <= quality[task][measure] <= high or model["name"] == "onnx-int8"
        assert {"auroc", "macro_f1", "micro_f1", "precision", "recall"} <= quality["traits"].keys()
        assert quality["sizes"]["mean_absolute_error"].keys() == {"place", "height"}
        assert quality["traits"]["agreement_with_teacher"] <= 1
    models = {model["name"]: model for model in report["models"]}
    assert models["teacher"]["quality"]["traits"]["map"] > 0.6  # words of the caption are the labels
    assert models["teacher"]["quality"]["traits"]["agreement_with_teacher"] == 1
    assert models["onnx-fp32"]["quality"]["sizes"]["r2"] == pytest.approx(
        models["pruned"]["quality"]["sizes"]["r2"], abs=1e-3
    )
    assert "mAP" in answer.out and "R²" in answer.out
    written = (folder / "report" / "report.md").read_text() + (folder / "report" / "report.html").read_text()
    assert "mean absolute error" in written and "AUROC" in written


def test_the_best_epoch_is_chosen_by_the_mean_score(finished):
    lines = (finished[0] / "student" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    parts = [last[f"valid/{name}"] for name in ("colour_accuracy", "traits_map", "sizes_r2")]
    assert last["valid/score"] == pytest.approx(np.mean(parts))
    assert "valid/accuracy" not in last


def test_a_bundle_answers_in_labels_and_in_the_columns_own_units(finished):
    folder, _ = finished
    bundle = load(folder / "export" / "onnx-fp32")
    image = next((folder.parents[1] / "images").iterdir())
    (answer,) = bundle.predict([{"image": image, "text": "a big red moon"}])
    assert set(answer) == {"colour", "traits", "sizes"}
    assert set(answer["traits"]) == {"labels", "top"} and len(answer["traits"]["top"]) == 3
    assert all(entry["probability"] > 0.5 for entry in answer["traits"]["top"][: len(answer["traits"]["labels"])][:3])
    assert answer["sizes"]["values"].keys() == {"place", "height"}
    assert 80 < answer["sizes"]["values"]["place"] < 130 and 0 < answer["sizes"]["values"]["height"] < 30
    assert "times `std`, plus `mean`" in (folder / "export" / "onnx-fp32" / "README.md").read_text()
    labels = read_json(folder / "export" / "onnx-fp32" / "labels.json")
    assert labels["colour"] == ["blue", "green", "red"] and labels["sizes"]["std"][1] > 1


def test_predict_answers_in_words(finished):
    folder, _ = finished
    image = next((folder.parents[1] / "images").iterdir())
    answer = distill("predict", folder / "export" / "onnx-fp32", "--image", image, "--text", "a big red moon")
    assert answer.code == 0, answer.err
    lines = dict(line.split(": ", 1) for line in answer.out.splitlines())
    assert lines.keys() == {"colour", "traits", "sizes"} and lines["sizes"].startswith("place 1")
    assert "%" in lines["traits"] and "(" in lines["traits"]


def test_a_row_is_known_by_what_it_says_and_not_by_what_training_makes_of_it(tmp_path):
    prints = []
    for extra in ([], [50.0]):
        folder = tmp_path / str(len(extra))
        folder.mkdir()
        rows(folder, found=[1.0, 2.0, *extra, 3.0, 4.5])
        table = pa_parquet.read_table(folder / "rows.parquet").append_column(
            "id", pa.array([0, 1, *[9] * len(extra), 2, 3])
        )
        table = table.set_column(0, "text", pa.array(["word"] * len(table)))
        pa_parquet.write_table(table, folder / "rows.parquet")
        prints.append(prepared(folder, {"column": "found", "kind": "regression"}, id="id").fingerprint("test"))
    assert prints[0] == prints[1]


def test_prepared_targets(finished):
    data = PreparedData.open(finished[0] / "data")
    assert (
        data.targets["traits"].shape == (96, len(data.labels["traits"])) and data.targets["traits"].dtype == np.float32
    )
    assert set(np.unique(data.targets["traits"])) == {0, 1} and (data.targets["traits"].sum(1) == 3).all()
    (third,) = np.flatnonzero(data.ids == 1003)
    assert np.isnan(data.targets["sizes"][third, 0]) and not np.isnan(data.targets["sizes"][third, 1])
    train = data.rows("train")
    assert np.nanmean(data.targets["sizes"][train], axis=0) == pytest.approx([0, 0], abs=1e-5)
    assert np.nanstd(data.targets["sizes"][train], axis=0) == pytest.approx([1, 1], abs=1e-5)
    numbers = data.tasks["sizes"].numbers(data.targets["sizes"][third])
    assert numbers[1] in (pytest.approx(8.5), pytest.approx(16.5))
    report = read_json(finished[0] / "data" / "data_report.json")
    assert report["missing_targets"]["sizes"] == 0 and report["numbers"]["sizes"]["height"]["std"] > 1
    assert sum(report["classes"]["traits"]["train"].values()) == 3 * len(train)


def rows(folder, **columns):
    """A table of texts with columns, the last two rows valid and test."""
    count = len(next(iter(columns.values())))
    split = ["train"] * (count - 2) + ["valid", "test"]
    table = pa.table({"text": [f"word {n}" for n in range(count)], "split": split, **columns})
    pa_parquet.write_table(table, folder / "rows.parquet")


def prepared(folder, target, **more):
    config = {
        "source": {"type": "table", "path": str(folder / "rows.parquet")},
        "modalities": {"text": "text"},
        "targets": {"task": target},
        **more,
    }
    prepare(DataConfig.model_validate(config), folder / "data", folder)
    return PreparedData.open(folder / "data")


def test_labels_come_as_lists_too_and_none_is_not_unknown(tmp_path):
    rows(tmp_path, found=[["b", "a"], [], None, ["a"], ["b", "b"], ["a"]])
    data = prepared(tmp_path, {"column": "found", "kind": "multilabel"})
    assert data.labels["task"] == ["a", "b"]
    expected = [[1, 1], [0, 0], [np.nan, np.nan], [1, 0], [0, 1], [1, 0]]
    np.testing.assert_array_equal(data.targets["task"], np.array(expected, np.float32))
    assert known(data.targets["task"]).tolist() == [True, True, False, True, True, True]
    assert data.class_counts("train")["task"].tolist() == [[1, 2], [2, 1]]


def test_columns_of_zero_and_one_know_what_nobody_looked_at(tmp_path):
    rows(tmp_path, fever=[1, 0, None, 1, 0, 1], cough=[True, False, None, None, True, False])
    data = prepared(tmp_path, {"column": ["fever", "cough"], "kind": "multilabel"})
    assert data.labels["task"] == ["fever", "cough"]
    expected = [[1, 1], [0, 0], [np.nan, np.nan], [1, np.nan], [0, 1], [1, 0]]
    np.testing.assert_array_equal(data.targets["task"], np.array(expected, np.float32))


WRONG = [
    (
        {"found": [["a"], ["a"], ["a"], ["b"]]},
        {"column": "found", "kind": "multilabel"},
        r"label 'b' of split 'test' never",
    ),
    ({"found": [1, 2, 3, 4]}, {"column": "found", "kind": "multilabel"}, "several labels a row are a list of texts"),
    ({"found": [0, 2, 1, 1]}, {"column": ["found"], "kind": "multilabel"}, "row 1: 2 is neither 0 nor 1"),
    ({"found": [0, 0, 1, 1]}, {"column": ["found"], "kind": "multilabel"}, "label 'found' of split 'valid' never"),
    ({"found": [0, 0, 0, 0]}, {"column": ["found"], "kind": "multilabel"}, "column 'found' is 1 nowhere in train"),
    ({"found": ["a", "b", "a", "b"]}, {"column": "found", "kind": "regression"}, "so name a column of numbers"),
    ({"found": [2.0, 2.0, 3.0, 4.0]}, {"column": "found", "kind": "regression"}, "one number or none in train"),
    ({"found": [2.0, 1e300, 3.0, 4.0, 5.0]}, {"column": "found", "kind": "regression"}, "beyond 32 bits"),
]


@pytest.mark.parametrize(("columns", "target", "message"), WRONG)
def test_wrong_targets_are_told_in_a_sentence(tmp_path, columns, target, message):
    rows(tmp_path, **columns)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.targets.colour={column: [colour, shape]}", "classification has one"),
        ("data.targets.traits.kind=multilable", "did you mean 'multilabel'"),
        (
            "student.objective.0.loss=bce",
            "bce is for multilabel, and task 'colour' is a classification; use",
        ),
        (
            "student.objective.1={loss: cross_entropy, task: traits}",
            "is for classification, and task 'traits' is a multilabel; use bce",
        ),
        ("student.decision=mixture", "mixture is of the probabilities of classes, and task 'traits' is a multilabel"),
        ("teacher.class_names.tasks=[traits]", "task 'traits' is a multilabel, whose rows have no one class"),
    ],
)
def test_wrong_recipes_are_told_in_a_sentence(project, change, message):
    answer = distill("validate", project, change)
    assert answer.code == 2 and message in " ".join(answer.err.split()), answer.err


def test_a_word_in_a_recipe_is_a_column_of_classes(project):
    targets = load_recipe(project).data.targets
    assert targets["colour"].kind == CLASSIFICATION and targets["colour"].columns == ["colour"]


def test_tasks_survive_json_and_classes_are_a_plain_list():
    tasks = {
        "a": Task(CLASSIFICATION, ("x", "y")),
        "b": Task(MULTILABEL, ("x",)),
        "c": Task(REGRESSION, ("x",), (1.5,), (2.0,)),
    }
    assert tasks_from_json(tasks_to_json(tasks)) == tasks
    assert tasks_to_json(tasks)["a"] == ["x", "y"]
    for wrong in ({"a": {"kind": "unheard"}}, {"a": "words"}, {"a": {"kind": REGRESSION, "names": ["x"]}}):
        with pytest.raises(ValueError, match="task 'a'"):
            tasks_from_json(wrong)
