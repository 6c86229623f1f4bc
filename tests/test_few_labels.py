"""The benchmark of few labels, in miniature: which rows each model reads, and what it prints."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import few_labels
from benchmarks.fashion_mnist import TASK, read_idx
from benchmarks.few_labels import FEW, STUDENTS, WHOLE, Experiment, hold_out, open_data
from distill.contracts import IGNORE, UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """IDX files of 260 training and 40 test images, whose brightest row of pixels says the class."""
    folder = tmp_path_factory.mktemp("idx") / "somewhere"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, rows in (("train", 260), ("t10k", 40)):
        labels = random.integers(0, 10, rows).astype(np.uint8)
        images = random.integers(0, 60, (rows, 28, 28)).astype(np.uint8)
        images[np.arange(rows), 4 + 2 * labels] = 255
        for kind, header, content in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + content.tobytes()))
    return folder.parent


@pytest.fixture(scope="module")
def data(source, tmp_path_factory):
    return open_data(source, tmp_path_factory.mktemp("data"))


def test_files_are_found_below_a_folder(source, tmp_path):
    images, labels = read_idx(source, "test", 7)
    assert images.shape == (7, 28, 28) and (images.sum(axis=2).argmax(axis=1) == 4 + 2 * labels).all()
    with pytest.raises(UserError, match=r"0 files train-images-idx3-ubyte\.gz below it, expected one"):
        read_idx(tmp_path)


def test_only_few_training_images_are_labelled(data, tmp_path):
    first, second = (Experiment.of(data, 30, "test", seed, tmp_path) for seed in (0, 1))
    known = [set(e.few.rows("train", labelled=True).tolist()) for e in (first, second)]
    assert [len(rows) for rows in known] == [30, 30] and known[0] != known[1]
    assert len(data.rows("train", labelled=True)) == 260
    test = data.rows("test")
    assert (first.few.targets[TASK][test] == data.targets[TASK][test]).all()
    with pytest.raises(UserError, match="--labels is 261, and there are 260"):
        Experiment.of(data, 261, "test", 0, tmp_path)


def test_each_model_reads_its_rows_and_no_hidden_label(data, tmp_path):
    experiment = Experiment.of(hold_out(data, 60), 30, "valid", 0, tmp_path)
    for arm in (WHOLE, FEW, *STUDENTS):
        batches = [batches["model"] for batches in experiment.loader(arm).epoch(0)]
        labels = np.concatenate([batch.targets[TASK].numpy() for batch in batches])
        assert len(labels) == (200 if arm.rows == "all" else 30)
        assert (labels != IGNORE).sum() == (200 if arm == WHOLE else 30)
        held_out = experiment.loader(arm, "valid")
        assert held_out.num_rows == 60 and held_out.augment is None


def test_the_table(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_labels, "grey_teacher", few_labels.grey_student)  # which takes a tenth of the time
    arms = {"WHOLE": replace(WHOLE, epochs=2), "FEW": replace(FEW, epochs=2)}
    for name, arm in arms.items():
        monkeypatch.setattr(few_labels, name, arm)
    monkeypatch.setattr(few_labels, "TEACHERS", {arm.name: arm for arm in arms.values()})
    arguments = ["--fashion-mnist", str(source), "--labels", "30", "--seeds", "2", "--output", str(tmp_path)]
    few_labels.main([*arguments, "--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md")])
    found, text = json.loads((tmp_path / "found.json").read_text()), (tmp_path / "found.md").read_text()
    assert [model["name"] for model in found["models"]] == [arm.name for arm in (WHOLE, FEW, *STUDENTS)]
    assert found["steps"] == 9 and all(len(model["accuracies"]) == 2 for model in found["models"])
    assert (
        text in capsys.readouterr().out
        and "| labels alone | 30 |" in text
        and "| A's answers, all images | 260 |" in text
    )
    monkeypatch.setattr(few_labels.engine, "fit", None)  # nothing is trained again
    few_labels.main(arguments)
    assert text.splitlines()[4:] == capsys.readouterr().out.splitlines()[4:-1]
