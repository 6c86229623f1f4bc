"""Whole trainings on each source: the same rows give the same student, wherever they come from."""

import csv
import json
import re

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_tar_shards import write_tar
from tiny_project import distill, make_project, refusal

FEW = ["student.train.epochs=1", "teacher.train.epochs=1"]
ROW = ("id", "colour", "shape", "family")


def write_sources(folder):
    with open(folder / "rows.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    splits = {"train": [], "valid": [], "test": []}
    for row in rows:
        splits[row["split"]].append(row)
    cells = [
        {**row, "id": int(row["id"]), "family": int(row["family"]), "image": {"bytes": None, "path": row["image"]}}
        for row in rows
    ]
    Dataset.from_list(cells).save_to_disk(folder / "set")
    for split, own in splits.items():
        files = []
        for row in own:
            fields = {name: int(row[name]) if row[name].isdigit() else row[name] for name in ROW}
            files.append((f"{row['id']}.png", (folder / row["image"]).read_bytes()))
            files.append((f"{row['id']}.txt", row["caption"].encode()))
            files.append((f"{row['id']}.json", json.dumps(fields).encode()))
        write_tar(folder / f"shards/{split}-0.tar", files)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    recipe = make_project(tmp_path_factory.mktemp("sources"))
    write_sources(recipe.parent)
    for name in ("rows.csv", "set"):
        assert (recipe.parent / name).exists()
    return recipe


SHARDS = [
    "data.source={type: tar_shards, train: 'shards/train-*.tar', valid: 'shards/valid-{0..0}.tar', "
    "test: shards/test-0.tar}",
    "data.modalities.text=text",
]
SOURCES = {
    "decoded": ["data.decode_once=false"],
    "dataset": ["data.source={type: hf_dataset, path: set, root: .}"],
    "shards": SHARDS,
    "shards-decoded": [*SHARDS, "data.decode_once=false"],
}


def train(project, name, overrides):
    answer = distill("train", project, *FEW, f"name={name}", *overrides)
    assert answer.code == 0, answer.err
    return load_file(project.parent / "runs" / name / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def plain(project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.parent)
        return train(project, "plain", [])


@pytest.mark.parametrize("name", SOURCES)
def test_the_student_is_the_same(project, plain, name, monkeypatch):
    monkeypatch.chdir(project.parent)
    weights = train(project, name, SOURCES[name])
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[key], plain[key]) for key in plain)
    assert (project.parent / "runs" / name / "data" / "image.npy").exists() == (
        "data.decode_once=false" not in SOURCES[name]
    )


def test_orders_of_two_levels_train_another_student(project, plain, monkeypatch):
    monkeypatch.chdir(project.parent)
    weights = train(project, "two-level", ["data.two_level_order=10"])
    assert any(not torch.equal(weights[key], plain[key]) for key in plain)


def test_a_finished_run_on_shards_is_up_to_date_until_a_shard_changes(project, monkeypatch):
    monkeypatch.chdir(project.parent)
    arguments = ["run", project, *FEW, "name=shards", *SHARDS, "--dry-run", "--json"]
    train(project, "shards", SHARDS)

    def to_do():
        answer = distill(*arguments)
        assert answer.code == 0, answer.err
        return [entry["stage"] for entry in json.loads(answer.out)["stages"] if entry["state"] == "to do"]

    assert not {"data", "teacher", "student"}.intersection(to_do())
    shard = project.parent / "shards/test-0.tar"
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)
    assert to_do()[0] == "data"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source={type: tar_shards, path: 'none-*.tar'}"], r"no shard .*none-\*\.tar"),
        (["data.source={type: tar_shards, path: 's3://bucket/*.tar', folder: x}"], "no parameter 'folder'"),
        (["data.source={type: hf_dataset, path: images}"], "cannot be read as a data set"),
        (["data.source={type: hf_dataset}"], "needs the parameter 'path'"),
        (["data.decode_once=perhaps"], "data.decode_once"),
    ],
)
def test_mistakes_are_one_sentence(project, overrides, message, monkeypatch):
    monkeypatch.chdir(project.parent)
    sentence = refusal(distill("run", project, "name=never", *overrides))
    assert re.search(message, sentence)
