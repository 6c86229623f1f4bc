"""SIGTERM and SIGINT in six stages of a run: it stops at once, and the same command ends as if nothing had been."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

from distill.pipeline import NAMES
from distill.runs import read_json, sha256_file

pytestmark = [pytest.mark.fault, pytest.mark.slow]

STOP_SECONDS = 10
STAGES = ("teacher", "cache", "student", "pruned", "quantize", "export")
RESULTS = ("*/*.safetensors", "export/**/*.onnx", "quantize/**/*.onnx", "*/token*", "*/metrics.jsonl", "data/*")


def results(folder: Path) -> dict[str, Any]:
    """Hashes of what a run made, and the qualities that its report tells."""
    run = folder / "runs/tiny"
    files = {path for pattern in RESULTS for path in run.glob(pattern) if path.name != "manifest.json"}
    found: dict[str, Any] = {str(path.relative_to(run)): sha256_file(path) for path in files if path.is_file()}
    report = read_json(run / "report/report.json")
    return found | {model["name"]: model["quality"] for model in report["models"]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_stops_a_run_and_the_same_command_ends_it(
    server: ForkServer, finished: Path, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    run = folder / "runs/tiny"
    for later in NAMES[NAMES.index(stage) :]:
        shutil.rmtree(run / later)
    seconds = read_json(finished / f"runs/tiny/{stage}/manifest.json")["info"]["cost"]["seconds"]
    delay = random.Random(f"{stage} {number}").random() * 0.6 * seconds

    child = server.start("distill", tmp_path / "first.txt", cwd=folder, arguments=["run", "recipe.yaml"])
    child.wait_for(f"{stage}: ")
    time.sleep(delay)
    child.send(number)
    assert child.wait(STOP_SECONDS) == 128 + number, child.text()
    assert not (run / stage / "manifest.json").exists(), "the signal came too late to hit the stage"
    last = child.text().splitlines()[-1]
    assert last.startswith(f"error: stopped by {number.name}; ") and "Traceback" not in child.text()

    again = server.start("distill", tmp_path / "again.txt", cwd=folder, arguments=["run", "recipe.yaml"])
    assert again.wait() == 0, again.text()
    assert results(folder) == results(finished)
