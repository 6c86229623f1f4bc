"""The stage ``qat`` and its bundle: a whole run, what depends on what, a training that is stopped, and mistakes."""

from __future__ import annotations

import logging
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_dual import RECIPE as DUAL
from tiny_job import interrupt_at
from tiny_project import make_project

from distill import aware, evaluate, jobs, pipeline
from distill.build import input_spec
from distill.contracts import TEST, TRAIN, VALID, UserError
from distill.interrupts import InterruptedRunError
from distill.losses.terms import needs_teacher
from distill.planning import Planned
from distill.predict import load, open_graph
from distill.quantization.static import StaticQuantizer
from distill.recipe import load_recipe
from distill.rounding import Plan, round_inside, without_rounding
from distill.runs import read_json
from distill.workspace import STUDENT, Workspace
from students import INHERITANCES

BUNDLE = "export.bundles=[onnx-int8,onnx-int8-qat]"
TRAIN_QAT = "export.quantize.qat.train={epochs: 3, batch_size: 16}"
LABELS = 'export.quantize.qat.objective=[{loss: cross_entropy, task: "*"}]'
ARMS = (BUNDLE, TRAIN_QAT, "trackers=[]")
QAT = Path("runs/tiny/qat")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the bundle, made in two steps: without it, and then with it."""
    folder = tmp_path_factory.mktemp("aware")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pipeline.run(load_recipe("recipe.yaml", ["trackers=[]"]), quiet=True)
        assert not QAT.exists()
        pipeline.run(load_recipe("recipe.yaml", ARMS), quiet=True)
    return folder


@pytest.fixture
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished run; tests leave it as it is."""
    monkeypatch.chdir(finished)


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def plans(*overrides: str) -> dict[str, Planned]:
    return {item.stage.name: item for item in pipeline.plan(load_recipe("recipe.yaml", overrides))}


def opened(*overrides: str, until: str | None = "quantize") -> Workspace:
    recipe = load_recipe("recipe.yaml", overrides)
    done = pipeline.run(recipe, until=until, quiet=True)
    return Workspace(recipe, pipeline.ENCODERS, INHERITANCES, done=done, quiet=True)


def test_the_bundle_says_what_was_trained(here: None) -> None:
    work = opened(*ARMS)
    model, bundle = aware.trained(work), load("runs/tiny/quantize/onnx-int8-qat")
    shipped = work.model("pruned")
    for split in (TRAIN, VALID, TEST):
        batches = evaluate.clean_batches(work.clean_loader(split, input_spec(model), STUDENT), STUDENT)
        expected, found = evaluate.predict_torch(model, batches), evaluate.predict_bundle(bundle, batches)
        before = evaluate.predict_torch(shipped, batches)
        for name, logits in expected.items():
            assert (logits.argmax(1) == found[name].argmax(1)).mean() >= 0.98
            off, learnt = (np.abs(logits - other).mean() for other in (found[name], before[name]))
            assert off < 0.02 * np.abs(logits).max() and off < 0.5 * learnt


def test_the_bundle_is_as_large_as_without_training(here: None) -> None:
    sizes = [Path(f"runs/tiny/quantize/{name}/model.onnx").stat().st_size for name in ("onnx-int8", "onnx-int8-qat")]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
    plan = Plan.load(QAT / aware.PLAN_FILE)
    assert plan.missed == [] and read_json(QAT / "manifest.json")["info"]["rounded"]["values"] == len(plan.values)
    source = read_json(Path("runs/tiny/quantize/onnx-int8-qat/bundle.json"))["source"]
    assert source["stage"] == "qat"


def test_the_report_has_it_beside_the_others(here: None) -> None:
    report = read_json(Path("runs/tiny/report/report.json"))
    assert [model["name"] for model in report["models"]][-2:] == ["onnx-int8", "onnx-int8-qat"]
    assert len(report["curves"]["onnx-int8-qat"]) == 3 and "onnx-int8" not in report["curves"]
    assert report["parity"]["onnx-int8-qat"]["logits.colour"]["agreement"] >= 0.98


def test_a_run_without_the_bundle_knows_nothing_of_it(here: None) -> None:
    without, tuned, asked = plans(), plans(TRAIN_QAT), plans(BUNDLE)
    assert "qat" not in without and "qat" in asked
    assert {name: item.key for name, item in without.items()} | {"report": tuned["report"].key} == {
        name: item.key for name, item in tuned.items()
    }
    assert {name for name, item in without.items() if asked[name].key != item.key} == {
        "quantize",
        "evaluate",
        "bench",
        "report",
    }


@pytest.mark.parametrize(
    "override, expected",
    [
        ("export.quantize.qat.train.lr=0.001", True),
        (LABELS, True),
        ("export.quantize.calibration_rows=32", True),
        ("export.quantize.search=true", False),
        ("export.min_agreement_int8=0.1", False),
        ("prune.ratio=0.5", True),
    ],
)
def test_the_stage_is_done_again_when_what_it_reads_changes(here: None, override: str, expected: bool) -> None:
    assert (plans(*ARMS)["qat"].key != plans(*ARMS, override)["qat"].key) == expected


def test_labels_alone_train_it_too(copied: None) -> None:
    teacher = load_file(QAT / "model.safetensors")
    seen: list[bool] = []
    whole = jobs.make_job

    def make_job(*arguments: Any, **options: Any) -> Any:
        seen.append(needs_teacher(arguments[6]))
        return whole(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "make_job", make_job)
        recipe = load_recipe("recipe.yaml", [*ARMS, LABELS])
        assert [term.task for term in recipe.export.quantize.qat.objective or ()] == ["colour", "shape"]
        pipeline.run(recipe, until="qat", quiet=True)
    labels = load_file(QAT / "model.safetensors")
    assert seen == [False]
    assert any(not torch.equal(teacher[name], labels[name]) for name in teacher)


def test_a_killed_training_goes_on_as_if_nothing_had_been(copied: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(QAT / "model.safetensors")
    lines = (QAT / "metrics.jsonl").read_text()
    recipe = load_recipe("recipe.yaml", ARMS)

    @contextmanager
    def stopped(name: str, **_: Any) -> Any:
        yield interrupt_at(7) if name == "train for int8" else (lambda *_: None)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "progress", stopped)
        with pytest.raises(InterruptedRunError):
            pipeline.run(recipe, until="qat", force=["qat"], quiet=True)
    assert not (QAT / "manifest.json").exists() and (QAT / "checkpoint").exists()
    pipeline.run(recipe, until="qat", quiet=True)
    again = load_file(QAT / "model.safetensors")
    assert again.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    assert (QAT / "metrics.jsonl").read_text() == lines


def test_encoders_of_one_embedding_space_are_trained_too(copied: None) -> None:
    Path("dual.yaml").write_text(DUAL, encoding="utf-8")
    pipeline.run(load_recipe("dual.yaml", [*ARMS, "export.min_agreement_int8=0.9"]), quiet=True)
    report = read_json(Path("runs/dual/report/report.json"))
    assert "onnx-int8-qat" in [model["name"] for model in report["models"]]
    assert all(found["agreement"] > 0.999 for found in report["parity"]["onnx-int8-qat"].values())
    assert Path("runs/dual/quantize/onnx-int8-qat-text/model.onnx").is_file()


def test_what_is_not_found_in_the_model_is_logged(copied: None, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    planned = aware.planned

    def missing(*arguments: Any) -> Plan:
        plan = planned(*arguments)
        return Plan(plan.weights[1:], plan.tables, plan.values, [plan.weights[0]])

    monkeypatch.setattr(aware, "planned", missing)
    with caplog.at_level(logging.WARNING):
        pipeline.run(load_recipe("recipe.yaml", ARMS), until="qat", force=["qat"], quiet=True)
    assert "qat: encoders.image.stages.0.0.0 are rounded after training alone" in caplog.text


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.encoders.text={type: small_transformer, vocab_size: 64, dim: 16, heads: 4, max_length: 12}"],
        ["student.encoders.text={type: text_cnn, vocab_size: 64, dim: 8, channels: 8, max_length: 12}"],
        ["student.encoders.text={type: recurrent_text, vocab_size: 64, dim: 8, hidden: 5, max_length: 12}"],
        ["student.encoders.image={type: timm, name: mobilenetv3_small_050, pretrained: false}"],
        ["student.encoders.image={type: resnet_cifar, depth: 8, widths: [8, 8, 16, 32]}"],
        ["student.fusion={type: cross_attention, dim: 16, heads: 2, depth: 1}"],
        ["student.fusion={type: gated, dim: 16}", "student.unimodal_heads=false"],
    ],
)
def test_all_kinds_of_students_round_what_their_graphs_do(copied: None, tmp_path: Path, overrides: list[str]) -> None:
    work = opened(*ARMS, "student.inherit={}", *overrides, until="inherit")
    model: Any = work.blank(STUDENT)
    model.requires_grad_(False).eval()
    plan = aware.planned(work, model)
    assert plan.missed == [] and plan.weights and plan.values
    batches = evaluate.clean_batches(work.clean_loader(VALID, input_spec(model), STUDENT), STUDENT)
    plain = evaluate.predict_torch(model, batches)
    round_inside(model, plan)
    expected = evaluate.predict_torch(model, batches)
    ranges = without_rounding(model)
    aware.export_graph(work, model, tmp_path / "float.onnx")
    settings = aware.settings(work, model)
    quantizer = StaticQuantizer(tmp_path / "float.onnx", aware.calibration(work, model), settings, ranges)
    quantizer.write(tmp_path / "int8.onnx")
    found = evaluate.predict_bundle(open_graph(tmp_path / "int8.onnx"), batches)
    share = 1.0 if "mobilenet" in overrides[0] else 0.3  # in 54 untrained layers single roundings add up to noise
    for name, logits in expected.items():
        assert np.abs(found[name] - logits).mean() < share * np.abs(plain[name] - logits).mean() + 1e-5


@pytest.mark.parametrize(
    "override, expected",
    [
        ("export.bundles=[onnx-int8-qta]", "there is no bundle 'onnx-int8-qta'; did you mean 'onnx-int8-qat'"),
        ("export.quantize.per_channel=false", "export.quantize.per_channel: onnx-int8-qat learns one scale a channel"),
        ("export.quantize.qat.train.shard=true", "export.quantize.qat.train.shard: "),
        ("export.quantize.qat.train.balance={}", "export.quantize.qat.train.balance: "),
        ("transfer={texts: 20}", "a batch takes 24 of them"),
        (
            "student.objective.2={loss: kd, task: colour, teacher: ema}",
            "teacher 'ema' is the average that export.quantize.qat.train.ema keeps",
        ),
        ("export.quantize.qat.train.optimizer_params={nothing: 1}", "export.quantize.qat.train"),
        ("export.quantize.qat.objective=[]", "export.quantize.qat.objective"),
        ("export.quantize.qat.objective=[{loss: cross_entropy, task: size}]", "export.quantize.qat.objective[0]: no"),
        ("export.quantize.qat.epochs=3", "export.quantize.qat"),
        (
            "export.quantize.qat.objective=[{loss: fitnet, taps: {student: encoders.image.stages, "
            "teacher: encoders.image.stages}}]",
            "export.quantize.qat.objective[0]: the teacher's 'encoders.image.stages' is not in the cache; add it to "
            "cache.taps",
        ),
    ],
)
def test_mistakes_are_refused_before_any_work(here: None, override: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        averaged = ["student.train.ema=0.9", "prune.train.ema=0.9"] if "student.objective" in override else []
        batch = ["export.quantize.qat.train.batch_size=24"] if "transfer" in override else []
        pipeline.check(load_recipe("recipe.yaml", [*ARMS, *averaged, *batch, override]))
    assert expected in str(error.value)


def test_the_average_of_the_training_itself_may_teach(here: None) -> None:
    term = "export.quantize.qat.objective=[{loss: kd, task: colour, teacher: ema}]"
    with pytest.raises(UserError, match=r"teacher 'ema' is the average that export\.quantize\.qat\.train\.ema keeps"):
        pipeline.check(load_recipe("recipe.yaml", [*ARMS, term]))
    pipeline.check(load_recipe("recipe.yaml", [*ARMS, term, "export.quantize.qat.train.ema=0.9"]))


def test_they_do_not_matter_without_the_bundle(here: None) -> None:
    pipeline.check(load_recipe("recipe.yaml", ["export.quantize.per_channel=false"]))
    with pytest.raises(UserError, match="stage 'qat' is not needed for 'tiny'"):
        pipeline.plan(load_recipe("recipe.yaml"), force=["qat"])
