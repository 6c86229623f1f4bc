"""Several processes train what one trains: losses, gradients, weights, caches; they stop and go on together."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import relations_job
import torch
from safetensors.torch import load_file
from tiny import terms, write_prepared, write_wordpiece
from tiny_project import ROOT, make_project

from distill.batch_parts import take
from distill.losses.objective import Objective
from distill.losses.terms import LOSSES

TESTS = Path(__file__).parent


def launch(count: int, *command: str | Path) -> subprocess.Popen:
    """Start processes as a user does, one thread each."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    arguments = [sys.executable, *launcher, *map(str, command)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_prepared(folder / "data")
    write_wordpiece(folder / "tokenizer.json")
    return folder


def train(place, name, count, *settings):
    finished(launch(count, TESTS / "ranks_job.py", place, place / name, *settings))
    found = json.loads((place / name / "losses.json").read_text())
    weights = load_file(place / name / "run" / "model.safetensors")
    return found, load_file(place / name / "gradients.safetensors"), weights


@pytest.mark.parametrize(
    "name", [name for name, loss in LOSSES.items() if loss.kind in relations_job.ON and loss.arrangement != "map"]
)
def test_a_loss_counts_as_comparing_rows_just_if_it_does(name):
    """Two halves of 8 rows are less than the whole for such losses alone."""
    torch.manual_seed(0)
    student, teacher, batch = relations_job.said(0), relations_job.teachers(), relations_job.batch()
    objective = Objective(terms(relations_job.item_of(name)), student, teacher).double()
    rows = torch.tensor([row for row in range(relations_job.ROWS) if row not in relations_job.NO_TEXT][:8])
    whole, first, second = (
        objective(*(take(item, some) for item in (student, teacher, batch)))[0].item()
        for some in (rows, rows[:4], rows[4:])
    )
    assert ((first + second) / 2 != pytest.approx(whole, rel=1e-9)) == LOSSES[name].relational


@pytest.fixture(scope="module")
def relations(tmp_path_factory):
    file = tmp_path_factory.mktemp("relations") / "found.json"
    finished(launch(2, TESTS / "relations_job.py", file))
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.relational])
def test_a_loss_that_compares_rows_has_the_value_and_gradient_of_one_rank(relations, name):
    """Of 11 rows, two without a text, one rank has 7, 10 or all; those with a text are then all on one rank."""
    own = {case: result for case, result in relations.items() if case.split(",")[0].split(" ")[0] == name}
    assert len(own) == len(relations_job.SPLITS) * (1 + LOSSES[name].keys)
    for case, result in own.items():
        assert abs(result["value"]) > 1e-6 and result["gradient"] > 1e-6, case
        assert max(result["apart"]) < 1e-12 * max(1.0, abs(result["value"]), result["gradient"]), case


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], id="adamw"),
        pytest.param(["accumulate=3", 'optimizer="sgd"'], id="micro"),
        pytest.param(["terms=[0,1,2,19]", "ema=0.9"], id="mean-teacher", marks=pytest.mark.slow),
        pytest.param(["batch_size=79"], id="one-row-for-two-ranks", marks=pytest.mark.slow),
        pytest.param(['balance={"alpha":0.5}', "terms=[0,1,4,21]"], id="balance", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_give_what_one_gives(place, settings):
    """Of 80 rows, one lacks its text, one its image and one a label; the last batch of 24 has 8 rows.

    Micro-batches are the two ranks' alone: one process takes the whole batch at once.
    """
    assert_one_as_two(place, settings)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["max_steps=40", "batch_size=2", "ema=0.9", "clip_norm=0.5"], id="modality-missing-on-a-rank"),
        pytest.param(["terms=[1,4]", "max_steps=40", "batch_size=2"], id="terms-on-text-alone", marks=pytest.mark.slow),
        pytest.param(["accumulate=3", "batch_size=5", "max_steps=20"], id="empty-part", marks=pytest.mark.slow),
        pytest.param(
            ["terms=[0,1,2,3,4,5]", "accumulate=3", "batch_size=5", "max_steps=20", 'optimizer="sgd"'],
            id="empty-part-without-contrast",
            marks=pytest.mark.slow,
        ),
        pytest.param(["batch_size=79"], id="one-row-for-two-ranks", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_with_half_of_the_weights_each_give_what_one_gives(place, settings):
    """Of two rows a batch, each rank has one: where it lacks its text, that rank has no use for the text encoder."""
    one, two = assert_one_as_two(place, settings, "shard=true")
    assert 0.45 < two["held"]["weights"] / one["held"]["weights"] < 0.6


def assert_one_as_two(place, settings, *only_two):
    name = "-".join(item.split("=")[0] for item in [*settings, *only_two]) or "plain"
    one = train(place, f"{name}-1", 1, *(item for item in settings if not item.startswith("accumulate")))
    two = train(place, f"{name}-2", 2, *settings, *only_two)
    assert len(one[0]["losses"]) == len(two[0]["losses"]) == one[0]["info"]["steps"]
    for alone, joined in zip(one[0]["losses"], two[0]["losses"], strict=True):
        assert joined == pytest.approx(alone, rel=1e-6)
    assert one[1].keys() == two[1].keys() and len(one[1]) > 15
    for term, value in one[1].items():
        torch.testing.assert_close(two[1][term], value, rtol=1e-6, atol=1e-9, msg=term)
    assert_same(two[2], one[2])
    recalls = [[line["valid/recall@1"] for line in map(json.loads, metrics(place / f"{name}-{n}"))] for n in (1, 2)]
    assert recalls[0] == pytest.approx(recalls[1], abs=1e-9)
    memories = [load_file(place / f"{name}-{count}" / "memories.safetensors") for count in (1, 2)]
    assert_same(memories[1], memories[0])
    return one[0], two[0]


def metrics(folder):
    return (folder / "run" / "metrics.jsonl").read_text().splitlines()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_run_goes_on_with_parts_without_and_with_other_ranks(place):
    """Stopped by SIGTERM at the last rank after 7 of 20 steps; the files are those of one process."""
    settings = ["ema=0.9", 'keep="last"']
    _, _, expected = train(place, "resume-whole", 1, *settings)
    ways = {"one": (1, []), "halves": (2, ["shard=true"]), "thirds": (3, ["shard=true"])}
    for name, (count, shard) in ways.items():
        finished(launch(count, TESTS / "ranks_job.py", place, place / name, *settings, *shard, "stop=7"))
    groups = ("trainee", "optimizer", "kept", "average")
    for name, group in itertools.product(("halves", "thirds"), groups):
        file = f"run/checkpoint/{group}.safetensors"
        assert_same(load_file(place / name / file), load_file(place / "one" / file))
    for before, after in (("one", "halves"), ("halves", "thirds"), ("thirds", "one")):
        shutil.copytree(place / before, place / f"{before}-{after}")
        count, shard = ways[after]
        found, _, weights = train(place, f"{before}-{after}", count, *settings, *shard)
        assert len(found["losses"]) == 13
        assert_same(weights, expected)


@pytest.mark.slow
def test_two_ranks_with_batch_norm_validate_one_model_and_go_on_exactly(place):
    """Each rank's BatchNorm sees its own rows: within an epoch statistics differ, and at its end they are averaged."""
    settings = ["terms=[0,1,2]", "norm=true", "ema=0.9", 'keep="last"']
    _, _, expected = train(place, "norm-whole", 2, *settings)
    spread = [json.loads(line)["valid/apart"] for line in metrics(place / "norm-whole")]
    assert spread == pytest.approx([0.0] * 5, abs=1e-12)
    finished(launch(2, TESTS / "ranks_job.py", place, place / "norm", *settings, "stop=7"))
    found, _, weights = train(place, "norm", 2, *settings)
    assert len(found["losses"]) == 13
    assert weights.keys() == expected.keys() and any(name.endswith("running_mean") for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("*.safetensors")}


def test_a_recipe_runs_under_a_launcher_and_its_cache_is_the_same(tmp_path):
    """The second run finds data and teacher of the first, and does the rest with two processes.

    That weights are split is no part of a result's identity.
    """
    parts = ["teacher.train.shard=true", "prune.train.shard=true"]
    recipe = make_project(tmp_path)
    one, two = tmp_path / "one" / "tiny", tmp_path / "two" / "tiny"
    finished(launch(1, "-m", "distill", "cache", recipe, f"output={one.parent}"))
    shutil.copytree(one, two)
    shutil.rmtree(two / "cache")
    out = finished(launch(2, "-m", "distill", "run", recipe, f"output={two.parent}", *parts))
    assert out.count("cache: done") == out.count("student: done") == out.count("report: done") == 1
    assert "teacher: done" not in out
    assert shards(two / "cache") == shards(one / "cache") and len(shards(one / "cache")) > 1
    assert len(list((two / "trackers" / "student" / "tensorboard").glob("events*"))) == 1  # the first rank's
    report = json.loads((two / "report" / "report.json").read_text())
    assert {model["name"] for model in report["models"]} >= {"teacher", "student", "onnx-int8"}


@pytest.mark.slow
def test_a_signal_stops_all_ranks_and_the_same_command_goes_on(tmp_path):
    recipe = make_project(tmp_path)
    budget = ["teacher.train.epochs=100", "teacher.train.keep=last"]
    whole = [recipe, *budget, f"output={tmp_path / 'whole'}"]
    stopped = [recipe, *budget, f"output={tmp_path / 'stopped'}"]
    finished(launch(2, "-m", "distill", "cache", *whole))
    process = launch(2, "-m", "distill", "cache", *stopped)
    marker = tmp_path / "stopped" / "tiny" / "teacher" / ".fingerprint"
    wait_for(marker.is_file, process)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("stopped by SIGTERM; state saved in") == 2
    assert (tmp_path / "stopped" / "tiny" / "teacher" / "checkpoint").is_dir()
    finished(launch(2, "-m", "distill", "cache", *stopped))
    one, two = (load_file(tmp_path / name / "tiny" / "teacher" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def wait_for(happened, process):
    for _ in range(1200):
        if happened():
            return
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.05)
    raise AssertionError("it did not happen within a minute")
