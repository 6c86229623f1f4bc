"""A bundle that this system cannot run: it is written, said to be unmeasured, and can be checked where it runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_in_runtime
from stand_in_runtime import StandIn
from tiny_project import distill, make_project, refusal

from distill.bundles import check_bundles, settings
from distill.config import ExportConfig
from distill.evaluate import read_arrays
from distill.predict import CHECK_FILE, verify_bundle
from distill.runs import read_json
from distill.runtimes import RUNTIMES
from distill.verification import VerificationError, verify_answers

NAME, PLACE = "executorch-fp32", "runs/tiny/quantize/executorch-fp32"
WHY = "it runs on the moon alone: not run here, so neither compared with its source nor measured"


class Elsewhere(StandIn):
    """The stand-in on a system that it does not run on."""

    def __init__(self, *arguments: Any) -> None:
        raise AssertionError("nothing here may open it")

    @classmethod
    def elsewhere(cls) -> str | None:
        return "it runs on the moon alone"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run, and what it said."""
    folder = tmp_path_factory.mktemp("elsewhere")
    make_project(folder)
    with stand_in_runtime.installed() as patch:
        patch.chdir(folder)
        patch.setitem(RUNTIMES, "executorch", Elsewhere)
        answer = distill("run", "recipe.yaml", f"export.bundles=[{NAME}]")
        assert answer.code == 0, answer.err
        (folder / "said.txt").write_text(answer.out)
        yield folder


def test_all_places_say_in_one_sentence_that_it_was_not_run(project: Path) -> None:
    report = read_json(project / "runs/tiny/report/report.json")
    size = (project / PLACE / "model.pte").stat().st_size
    assert report["not_run"] == {NAME: {"why": WHY, "size_bytes": size}}
    assert f"{NAME}: {WHY}" in (project / "said.txt").read_text().splitlines()
    for file in ("report.md", "report.html"):
        text = (project / "runs/tiny/report" / file).read_text()
        assert re.search(rf"{NAME} \([\d.]+\s[kM]B\): {re.escape(WHY)}\.", text), file
    assert verify_bundle(project / PLACE)["info"]["not_run"] == WHY
    assert f"- not_run: {WHY}" in (project / PLACE / "README.md").read_text()


def test_nothing_is_made_up_about_it(project: Path) -> None:
    report = read_json(project / "runs/tiny/report/report.json")
    assert NAME not in report["parity"] and "onnx-fp32" in report["parity"]
    assert NAME not in [model["name"] for model in report["models"]] and report["shipped"] == "onnx-fp32"
    assert NAME not in {c["model"] for c in report["comparisons"]}
    assert not (project / f"runs/tiny/evaluate/{NAME}.safetensors").exists()
    assert NAME not in read_json(project / "runs/tiny/bench/manifest.json")["info"]["models"]


def test_it_brings_rows_and_their_answers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_arrays(project / PLACE / CHECK_FILE)
    info = verify_bundle(project / PLACE)
    assert {*rows} == {f"input.{name}" for name in info["inputs"]} | {f"output.{name}" for name in info["outputs"]}
    assert {len(value) for value in rows.values()} == {8}
    assert CHECK_FILE not in verify_bundle(project / "runs/tiny/export/onnx-fp32")["files"], "it was compared here"
    monkeypatch.setitem(RUNTIMES, "executorch", StandIn)  # the moon
    found = verify_answers(project / PLACE)
    assert found["rows"] == 8 and found["outputs"].keys() == info["outputs"].keys()
    assert all(entry["relative"] < 1e-4 and entry["agreement"] == 1 for entry in found["outputs"].values())
    answer = distill("verify", PLACE)
    assert answer.code == 0 and "says what its source said of 8 rows:" in answer.out
    assert json.loads(distill("verify", PLACE, "--json").out) == found


def test_a_bundle_that_says_something_else_there_is_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(StandIn):
        off = 0.5

        def _row(self, values: list[Any]) -> list[Any]:
            return [value + self.off for value in super()._row(values)]

    monkeypatch.setitem(RUNTIMES, "executorch", Wrong)
    with pytest.raises(VerificationError, match=r"output '\w+' differs from the source's by 0\.5"):
        verify_answers(project / PLACE)
    answer = distill("verify", PLACE)
    assert answer.code == 1 and "\nerror: output" in f"\n{answer.err}" and "0.01 is allowed" in answer.err
    monkeypatch.setattr(Wrong, "off", np.float32("nan"))
    with pytest.raises(VerificationError, match="by nan"):
        verify_answers(project / PLACE)


def test_rows_of_another_model_and_damaged_ones(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "executorch", StandIn)
    shutil.copytree(project / PLACE, tmp_path / "bundle")
    (tmp_path / "bundle" / CHECK_FILE).write_bytes(b"junk")
    assert "was changed after export" in refusal(distill("verify", tmp_path / "bundle"))


def test_a_bundle_that_was_compared_brings_none(project: Path) -> None:
    answer = distill("verify", project / "runs/tiny/export/onnx-fp32")
    assert answer.code == 0 and "it brings no rows to compare, as it was compared when written" in answer.out
    assert "distill export" in refusal(distill("verify", project / "runs"))


def test_no_row_leaves_where_the_recipe_says_so(project: Path) -> None:
    changes = (f"export.bundles=[{NAME}]", "export.check_rows=0")
    answer = distill("quantize", "recipe.yaml", *changes)
    assert answer.code == 0 and f"{NAME}: {WHY}" in answer.out.splitlines()
    assert CHECK_FILE not in verify_bundle(project / PLACE)["files"] and not (project / PLACE / CHECK_FILE).exists()


def test_search_for_a_budget_needs_what_runs_here(project: Path) -> None:
    from distill.fit.space import check_target

    with pytest.raises(Exception, match="--target: latency cannot be measured here: it runs on the moon alone"):
        check_target("executorch")


def test_the_new_key_changes_no_fingerprint() -> None:
    config = ExportConfig(bundles=["coreml-fp16"])
    check_bundles(config)
    assert "check_rows" not in settings(config) and settings(ExportConfig(check_rows=3))["check_rows"] == 3
