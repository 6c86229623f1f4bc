"""A run writes, gates, evaluates and times bundles of other runtimes; a stand-in of one shows how."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_in_runtime
from stand_in_runtime import StandIn
from test_measured import measured_file
from tiny_project import distill, make_project, refusal

from distill.evaluate import read_arrays
from distill.predict import load
from distill.runs import read_json, sha256_file
from distill.runtimes import RUNTIMES

NAMES = ["executorch-fp32", "executorch-int8"]
BUNDLES = f"export.bundles=[{','.join(NAMES)}]"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run with the stand-in's bundles."""
    folder = tmp_path_factory.mktemp("runtimes")
    make_project(folder)
    with stand_in_runtime.installed() as patch:
        patch.chdir(folder)
        answer = distill("run", "recipe.yaml", BUNDLES)
        assert answer.code == 0, answer.err
        yield folder


def info(project: Path, stage: str) -> dict[str, Any]:
    return dict(read_json(project / "runs/tiny" / stage / "manifest.json")["info"])


def test_bundles_are_written_gated_and_evaluated(project: Path) -> None:
    made = info(project, "quantize")
    assert made["parity"].keys() == made["others"].keys() == {*NAMES}
    assert sorted(path.name for path in (project / "runs/tiny/quantize").iterdir() if path.is_dir()) == NAMES
    for name in NAMES:
        bundle = load(project / "runs/tiny/quantize" / name)
        assert bundle.info["runtime"] == "executorch" and bundle.info["info"]["precision"] == name.split("-")[1]
        assert {"inputs", "outputs"}.isdisjoint(bundle.info["info"])
        found, said = (read_arrays(project / f"runs/tiny/evaluate/{each}.safetensors") for each in (name, "pruned"))
        stand_in_runtime.close(found, said)


def test_programs_read_texts_of_the_recipes_length_and_training_rows_calibrate(project: Path) -> None:
    bundle = load(project / "runs/tiny/quantize/executorch-int8")
    assert bundle.info["inputs"]["text"]["shape"] == ["batch", 12]
    others = info(project, "quantize")["others"]
    assert others["executorch-fp32"]["calibrated"] == []
    (batch,) = others["executorch-int8"]["calibrated"]
    assert batch.keys() == {*bundle.inputs} and batch["image"] == [16, 3, 32, 32]


def test_the_report_has_them_with_their_runtime_and_its_neighbour(project: Path) -> None:
    report = read_json(project / "runs/tiny/report/report.json")
    models = {model["name"]: model for model in report["models"]}
    assert [*models][-3:] == ["onnx-fp32", *NAMES] and "in turns" not in models["onnx-fp32"]["latency_note"]
    for name in NAMES:
        model, bundle = models[name], project / "runs/tiny/quantize" / name
        assert model["runtime"] == "executorch" and 0 < model["latency_ms"]["p50"] <= model["latency_ms"]["p95"]
        assert model["size_bytes"] == (bundle / "model.pte").stat().st_size and model["flops"] > 0
        assert re.fullmatch(
            r"executorch 2\.\S+ CPU, batch 1, 1 thread; in turns with onnx-fp32, which took [\d.]+\sms",
            model["latency_note"],
        )
        assert model["latency_note"] in (project / "runs/tiny/report/report.md").read_text()


def test_bundles_of_other_runtimes_answer_and_the_default_ones_stay(project: Path) -> None:
    answers = [distill("predict", project / "runs/tiny" / place, "--text", "a red cat", "--json") for place in (
        "export/onnx-fp32", "quantize/executorch-fp32"
    )]  # fmt: skip
    assert [answer.code for answer in answers] == [0, 0]
    plan = distill("run", "recipe.yaml", BUNDLES, "--dry-run").out
    assert "to do" not in plan


def test_what_was_measured_on_devices_is_in_the_report(project: Path) -> None:
    for name in ("onnx-fp32", "executorch-int8"):
        file = next((project / "runs/tiny").glob(f"*/{name}/bundle.json"))
        content = measured_file(sha256_file(file))
        (project / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    change = "report.measured=[onnx-fp32.json,executorch-int8.json]"
    answer = distill("run", "recipe.yaml", BUNDLES, change)
    assert answer.code == 0 and "report: done" in answer.out and "bench: " not in answer.out, answer.err
    folder = project / "runs/tiny/report"
    rows = read_json(folder / "report.json")["measured"]
    assert [(row["bundle"], row["batch"]) for row in rows] == [
        ("onnx-fp32", 1), ("onnx-fp32", 8), ("executorch-int8", 1), ("executorch-int8", 8)
    ]  # fmt: skip
    assert [row["peak_memory_bytes"] for row in rows[:2]] == [12_000_000, None]
    line = "| onnx-fp32 | Cortex-A76 (aarch64), Linux 6.6 | onnxruntime 1.31 | 8 | 2 | 2.00\u00a0ms |"
    assert line in (folder / "report.md").read_text(encoding="utf-8")
    assert "Cortex-A76" in (folder / "report.html").read_text(encoding="utf-8")
    (project / "onnx-fp32.json").write_text(json.dumps(measured_file("0" * 64)), encoding="utf-8")
    said = refusal(distill("run", "recipe.yaml", BUNDLES, change))
    assert "onnx-fp32.json is of another bundle than this run's executorch-fp32, executorch-int8, onnx-fp32" in said


def test_a_missing_package_stops_a_run_before_it_starts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.bundles.missing_packages", lambda runtime: ["torchao"] * (runtime == "executorch"))
    said = refusal(distill("run", "recipe.yaml", BUNDLES, "name=other"))
    assert "'executorch-fp32' needs torchao" in said and "pip install 'multidistill[executorch]'" in said
    assert not list(Path("runs/other").glob("*/")), "no stage was begun"
    assert distill("train", "recipe.yaml", BUNDLES).code == 0, "what makes no bundle needs no exporter"
    assert distill("run", "recipe.yaml", BUNDLES, "report.examples=3").code == 0, "nor does what has them already"


@pytest.mark.parametrize("wrong", ["another runtime's numbers", "exchanged inputs"])
def test_a_wrong_model_of_another_runtime_is_refused(
    wrong: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(StandIn):
        def _row(self, values: list[Any]) -> list[Any]:
            if wrong == "exchanged inputs":  # in the order of names: image, image_present, text, ...
                values[1], values[4] = values[4], values[1]
                return super()._row(values)
            return [value + 0.2 for value in super()._row(values)]

    monkeypatch.setitem(RUNTIMES, "executorch", Wrong)
    answer = distill("quantize", "recipe.yaml", "export.bundles=[executorch-fp32]")  # the last to ask for the bundles
    assert answer.code == 1 and "executorch-fp32: " in answer.err
    assert ("alone: output" if wrong == "exchanged inputs" else "bundle and source differ by 0.2") in answer.err
