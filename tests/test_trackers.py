"""Trackers: what they are told, that they go on where training does, and that none of them can stop it."""

import json

import pytest
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_job import EPOCHS, assert_same, interrupt_at, lines, weights
from tiny_project import distill, make_project, refusal, run_python

from distill import trackers
from distill.contracts import UserError
from distill.engine import fit
from distill.interrupts import InterruptedRunError
from distill.recipe import load_recipe
from distill.runs import read_json
from distill.trackers import Trackers, check_trackers


def curves(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Spy:
    """Stands for a tracker's class; fails at one of its calls."""

    fails_at = ""
    calls: tuple = ()

    def __init__(self, **arguments):
        self._call("init", arguments)

    def _call(self, name, *values):
        type(self).calls = (*self.calls, (name, *values))
        if name == self.fails_at:
            raise RuntimeError(f"no\n {name}")

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self._call("settings", values)

    def log(self, values, step):
        self._call("log", step, values)

    def finish(self):
        self._call("finish")


@pytest.fixture
def spy(monkeypatch):
    kind = type("Spy", (Spy,), {})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", kind)
    found = trackers.util.find_spec  # which torch asks too, about packages of its own
    monkeypatch.setattr(
        trackers.util, "find_spec", lambda name, *more: object() if name == "wandb" else found(name, *more)
    )
    return kind


@pytest.fixture
def tracked(make_job, tmp_path):
    """A job that tells trackers, and these."""

    def make(name, *names, key="k", **config):
        job = make_job(name, **config)
        told = Trackers(list(names), tmp_path / "trackers", "project")
        job.track = told.of(name, key, {"lr": 0.02})
        return job, told

    return make


def test_tensorboard_has_steps_and_epochs(tracked, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "EVERY", 2)
    monkeypatch.setattr("distill.engine.EVERY", 2)
    job, _ = tracked("run", "tensorboard")
    fit(job)
    found, entries = curves(tmp_path / "trackers" / "run" / "tensorboard"), lines(job)
    assert [step for step, _ in found["step/loss"]] == list(range(2, 15, 2))
    assert {"step/lr", "step/cross_entropy/kind", "train/loss", "valid/kind_accuracy", "epoch"} <= set(found)
    for name in ("valid/accuracy", "train/loss", "lr"):
        assert found[name] == [(entry["step"], pytest.approx(entry[name])) for entry in entries]
    first = [value for step, value in found["step/loss"] if step <= 5]
    assert min(first) > 0 and max(first) < 3 * entries[0]["train/loss"]
    assert not [path for path in job.folder.rglob("*") if "tfevents" in path.name]


@pytest.mark.parametrize("stop", [3, 7])
def test_curves_go_on_with_the_run(tracked, tmp_path, monkeypatch, stop):
    """Steps made again after a kill replace those recorded before it."""
    monkeypatch.setattr("distill.engine.EVERY", 1)
    job, _ = tracked("run", "tensorboard", checkpoint_minutes=1e-9)

    def die(done, total, note):
        if done == stop:
            raise MemoryError

    job.report = die
    with pytest.raises(MemoryError):
        fit(job)
    job, _ = tracked("run", "tensorboard")
    fit(job)
    found = curves(tmp_path / "trackers" / "run" / "tensorboard")
    assert [step for step, _ in found["step/loss"]] == list(range(1, 16))
    assert len(found["valid/accuracy"]) == EPOCHS


@pytest.mark.parametrize(("key", "goes_on"), [("k", True), ("other", False)])
def test_a_run_goes_on_under_its_id_and_another_fingerprint_has_a_new_one(tracked, tmp_path, spy, key, goes_on):
    job, _ = tracked("run", "wandb")
    job.report = interrupt_at(7)
    with pytest.raises(InterruptedRunError):
        fit(job)
    assert spy.calls[-1] == ("finish",)
    job, _ = tracked("run", "wandb", key=key)
    fit(job)
    first, second = (call[1] for call in spy.calls if call[0] == "init")
    assert (first["id"] == second["id"]) is goes_on
    assert first["run_name"] == "project" and first["name"] == "run" and first["resume"] == "allow"
    told = [call for call in spy.calls if call[0] == "settings"]
    assert told == [("settings", {"lr": 0.02})] * (1 if goes_on else 2)
    assert read_json(tmp_path / "trackers" / "run" / "wandb" / "run.json")["id"] == second["id"]
    fit(tracked("run", "wandb")[0])
    assert [call[1]["id"] for call in spy.calls if call[0] == "init"][-1] not in (first["id"], second["id"])


def test_a_tracker_that_joins_a_stopped_run_is_told_the_settings(tracked, spy):
    job, _ = tracked("run")
    job.report = interrupt_at(7)
    with pytest.raises(InterruptedRunError):
        fit(job)
    assert not spy.calls
    fit(tracked("run", "wandb")[0])
    assert [call for call in spy.calls if call[0] == "settings"] == [("settings", {"lr": 0.02})]


def test_a_tracker_that_is_named_twice_is_asked_once(tracked, spy):
    fit(tracked("run", "wandb", "wandb")[0])
    assert [call[0] for call in spy.calls if call[0] != "log"] == ["init", "start", "settings", "finish"]


@pytest.mark.fault
@pytest.mark.parametrize("at", ["init", "start", "settings", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(make_job, tracked, tmp_path, spy, caplog, at):
    plain = make_job("plain")
    fit(plain)
    spy.fails_at = at
    job, told = tracked("run", "wandb", "tensorboard")
    fit(job)
    assert_same(weights(job), weights(plain))
    assert lines(job) == lines(plain)
    assert [record.message for record in caplog.records] == [
        f"tracker wandb failed and is left out from here on: no {at}"
    ]
    assert told.names == ["tensorboard"]
    assert len(curves(tmp_path / "trackers" / "run" / "tensorboard")["valid/accuracy"]) == EPOCHS
    job.track = told.of("next", "k", {})
    before = spy.calls
    with job.track(0) as tell:
        tell(1, {"loss": 1.0})
    assert spy.calls == before


def test_names_that_trackers_refuse_are_changed(spy, tmp_path):
    with Trackers(["wandb"], tmp_path, "p").of("run", "k", {})(0) as tell:
        tell(1, {"train/clip_infonce/image,text": 1.0, "train/kd/kind#1": 2.0, "fitnet/a.b:mean": 3.0})
    (values,) = [call[2] for call in spy.calls if call[0] == "log"]
    assert list(values) == ["train/clip_infonce/image_text", "train/kd/kind_1", "fitnet/a.b:mean"]


def test_a_missing_package_is_refused_where_it_was_asked_for(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(trackers.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackers: mlflow is not installed; pip install 'multidistill\[trackers\]', "):
        check_trackers(["mlflow"], asked_for=True)
    with pytest.raises(UserError, match=r"trackers: tensorboard is not installed; pip install tensorboard, or take"):
        check_trackers(["tensorboard"], asked_for=True)
    check_trackers(["tensorboard"], asked_for=False)
    assert "tensorboard is not installed, so training is recorded in metrics.jsonl alone" in caplog.text
    with Trackers(["tensorboard"], tmp_path, "p").of("run", "k", {})(0) as tell:
        tell(1, {"loss": 1.0})
    assert len(caplog.records) == 1 and not list(tmp_path.iterdir())


def test_a_recipe_says_what_was_asked_for(tmp_path):
    file = make_project(tmp_path)
    assert "trackers" not in load_recipe(file).model_fields_set
    assert load_recipe(file).trackers == ["tensorboard"]
    assert "trackers" in load_recipe(file, ["trackers=[tensorboard]"]).model_fields_set


def test_validate_names_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.util, "find_spec", lambda name: None)
    answer = distill("validate", make_project(tmp_path), "trackers=[mlflow]")
    assert refusal(answer).startswith("trackers: mlflow is not installed; pip install")


def test_a_run_tells_of_each_training_and_changed_trackers_repeat_nothing(tmp_path):
    recipe = make_project(tmp_path)
    budget = ["teacher.pretrain={image: {epochs: 1, batch_size: 16}}", f"output={tmp_path / 'runs'}"]
    assert distill("train", recipe, *budget).code == 0
    run = tmp_path / "runs" / "tiny"
    names = {"pretrain-image", "teacher", "student"}
    assert {path.name for path in (run / "trackers").iterdir()} == names
    for name in names:
        assert "valid/accuracy" in curves(run / "trackers" / name / "tensorboard")
    manifest = (run / "student" / "manifest.json").read_text()
    assert "tfevents" not in manifest
    again = distill("train", recipe, *budget, "trackers=[]", "workers=3", "--json")
    assert again.code == 0, again.err
    assert (run / "student" / "manifest.json").read_text() == manifest
    assert json.loads((run / "recipe.resolved.json").read_text())["trackers"] == []


def test_help_and_plans_import_no_tracker():
    code = "import sys, distill.cli, distill.pipeline; print({'wandb', 'mlflow', 'trackio'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"
