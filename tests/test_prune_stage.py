"""The stage ``pruned`` with what a recipe may ask of it: data, heads, depth, a scan, steps that are interrupted."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_dual import RECIPE as DUAL
from tiny_job import interrupt_at
from tiny_project import make_project

from distill import jobs, pipeline, recovery
from distill.contracts import UserError
from distill.interrupts import InterruptedRunError
from distill.prune import PrunePlan, check_pruning
from distill.recipe import load_recipe
from distill.runs import read_json
from distill.workspace import PRUNED, Workspace
from students import INHERITANCES

ATTENTION = "student.encoders.text={type: small_transformer, vocab_size: 64, dim: 16, heads: 4, max_length: 12}"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return with_student(tmp_path_factory.mktemp("project"))


def with_student(folder: Path) -> Path:
    """A run with its student; what each test prunes is a stage after it."""
    make_project(folder)
    (folder / "dual.yaml").write_text(DUAL, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pipeline.run(load_recipe("recipe.yaml", ["trackers=[]"]), until="student", quiet=True)
    return folder


@pytest.fixture(autouse=True)
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project / "runs/tiny/pruned"


def pruned(*options: str, recipe: str = "recipe.yaml") -> tuple[Any, Any, PrunePlan]:
    """Run to the stage; return its model, its info and its plan."""
    read = load_recipe(recipe, ["trackers=[]", *options])
    done = pipeline.run(read, until="pruned", quiet=True)
    work = Workspace(read, pipeline.ENCODERS, INHERITANCES, done=done, quiet=True)
    plan = PrunePlan.load(done[PRUNED].path / "plan.json")
    return work.model(PRUNED), done[PRUNED].info, plan


@pytest.mark.parametrize("kind", ["taylor", "hessian", "bn_scale"])
def test_importance_reads_training_rows_with_the_terms_of_the_baseline(kind: str, monkeypatch) -> None:
    given: list[Any] = []
    whole = recovery.prune.plan
    monkeypatch.setattr(recovery.prune, "plan", lambda *args, **kwargs: given.append(kwargs) or whole(*args, **kwargs))
    model, info, plan = pruned(f"prune.importance={kind}", "prune.rows=20", "prune.ratio=0.5")
    assert plan.report["channels"][1] < plan.report["channels"][0]
    assert info["num_params"] == plan.report["parameters"][1] == sum(p.numel() for p in model.parameters())
    (options,) = given
    sizes = [len(batch.ids) for batch in options["rows"]]
    assert sizes == {"taylor": [20], "hessian": [1] * 20, "bn_scale": []}[kind]
    assert (options["loss"] is None) == (kind == "bn_scale")
    ids = [row for batch in options["rows"] for row in batch.ids.tolist()]
    assert len(set(ids)) == len(ids)
    assert ids != sorted(ids) or not ids


def test_encoders_of_one_embedding_space_are_judged_by_data_too() -> None:
    """Their loss compares rows, so that even "hessian" takes them together."""
    _, _, plan = pruned("prune.importance=hessian", "prune.rows=40", "transfer.texts=0", recipe="dual.yaml")
    assert plan.report["channels"][1] < plan.report["channels"][0]


def test_another_loss_of_the_baseline_is_another_importance_of_data_alone() -> None:
    def key(*options: str) -> str:
        recipe = load_recipe("recipe.yaml", options)
        return next(item.key for item in pipeline.plan(recipe, until="pruned") if item.stage.name == "pruned")

    other = "student.baseline.0.weight=2"
    assert key(other) == key()
    for reads in ("prune.importance=taylor", "prune.depth={encoders.image.stages.1: 1}", "prune.sensitivity=true"):
        assert key(other, reads) != key(reads)


STEPS = (
    "prune.steps=2",
    "prune.train.epochs=4",
    "prune.ratio=0.5",
    "prune.rows=24",
    "prune.depth={encoders.image.stages.1: 1}",
)


def test_steps_are_recovered_from_one_by_one_and_continue_where_they_were_stopped(here, monkeypatch) -> None:
    def weights() -> list[dict[str, torch.Tensor]]:
        return [load_file(here / name / "model.safetensors") for name in ("step-1", ".")]

    model, info, plan = pruned(*STEPS)
    whole = weights()
    first = PrunePlan.load(here / "step-1/plan.json")
    assert first.report["channels"][1] > plan.report["channels"][1]
    assert plan.removed["encoders.image.stages.1"]["of"] == 3
    assert info["num_params"] == sum(p.numel() for p in model.parameters()) == plan.report["parameters"][1]
    epochs = [len({line["epoch"] for line in lines(here / name / "metrics.jsonl")}) for name in ("step-1", ".")]
    assert epochs == [2, 2]

    told: list[str] = []
    for label in ("recover pruned, step 1 of 2", "recover pruned"):

        @contextmanager
        def stopped(name: str, stop: str = label, **_: Any):
            told.append(name)
            yield interrupt_at(4) if name == stop else (lambda *_: None)

        with monkeypatch.context() as patch:
            patch.setattr(jobs, "progress", stopped)
            with pytest.raises(InterruptedRunError):
                pipeline.run(
                    load_recipe("recipe.yaml", ["trackers=[]", *STEPS]),
                    until="pruned",
                    quiet=True,
                    force=["pruned"] if label != "recover pruned" else [],
                )
        assert (here / "step-1/plan.json").is_file()
    assert told == ["recover pruned, step 1 of 2", "recover pruned, step 1 of 2", "recover pruned"]
    before = (here / "step-1/model.safetensors").stat().st_mtime_ns
    pruned(*STEPS)
    assert (here / "step-1/model.safetensors").stat().st_mtime_ns == before
    for one, other in zip(whole, weights(), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_changed_plan_stops_who_reads_the_model(here) -> None:
    read = load_recipe("recipe.yaml", ["trackers=[]"])
    done = pipeline.run(read, until="pruned", quiet=True)
    file = here / "plan.json"
    content = file.read_text()
    file.write_text(content.replace('"of": 8', '"of": 9', 1))
    work = Workspace(read, pipeline.ENCODERS, INHERITANCES, done=done, quiet=True)
    with pytest.raises(UserError, match="was changed after it was written, as its sha256 says; prune again"):
        work.model(PRUNED)
    file.write_text(content)
    assert work.model(PRUNED) and read_json(file)["version"] == 1


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("prune.ratios={encoders.sound: 0.5}", r"prune\.ratios: the student has no module 'encoders\.sound'; it has"),
        (
            "prune.depth={encoders.sound.blocks: 1}",
            r"prune\.depth: the student has no module 'encoders\.sound\.blocks'",
        ),
        (
            "prune.depth={encoders.image: 1, encoders.image.stages.1: 1}",
            r"lies in 'encoders\.image', whose blocks may go",
        ),
        (
            "prune.ratios={encoders.image: 1.5}",
            r"'prune\.ratios\.encoders\.image' is 1\.5: Input should be less than 1",
        ),
        (
            "student.objective.0={loss: fitnet, taps: {student: encoders.image.stages.1.2:mean, teacher: "
            "encoders.image.stages.1:mean}} prune.depth={encoders.image.stages.1: 1}",
            r"student\.objective\[0\]\.taps: 'encoders\.image\.stages\.1\.2:mean' lies in 'encoders\.image\.stages\.1'",
        ),
        (
            "prune.sensitivity=true prune.steps=2 prune.train.epochs=2",
            "measures the whole student once; set steps to 1",
        ),
        ("prune.steps=9", r"'prune' is .*: Value error, train\.epochs is 1, fewer than steps, 9; each step needs one"),
    ],
)
def test_what_cannot_be_is_refused_before_a_run(option: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_pruning(load_recipe("recipe.yaml", re.split(r" (?=prune\.)", option)), pipeline.ENCODERS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["prune.modules=[encoders.image.stagse]"],
            r"prune\.modules: the model has no module 'encoders\.image\.stagse'; did",
        ),
        (["prune.ratios={encoders.image.stages.9: 0.5}"], r"prune\.ratios: the model has no module .*stages\.9'; did"),
        (
            ["prune.depth={encoders.image.stags: 1}"],
            r"prune\.depth: 'encoders\.image\.stags' is no plain list of blocks; did you",
        ),
        (["prune.depth={encoders.image.stages.1: 3}"], r"stages\.1 is 3, and one of its 3 blocks stays; lower it"),
        (["prune.heads=0.5"], r"prune\.heads: no attention in encoders\.image whose heads can be cut"),
    ],
)
def test_what_a_student_lacks_is_said_before_it_is_trained(options: list[str], sentence: str, project: Path) -> None:
    recipe = load_recipe("recipe.yaml", ["trackers=[]", "name=other", *options])
    with pytest.raises(UserError, match=sentence):
        pipeline.run(recipe, until="pruned", quiet=True)
    assert not (project / "runs/other/teacher").exists()
    if options != ["prune.depth={encoders.image.stages.1: 3}"]:
        assert pipeline.run(recipe, until="vocabulary", quiet=True)
