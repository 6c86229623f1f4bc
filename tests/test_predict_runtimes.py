"""``distill predict`` on 209 files answers what the training pipeline does, on each runtime, without torch."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_project import distill, make_project, make_rows, run_python, start_distill

from distill import bench_bundle
from distill.bundles import BUNDLES
from distill.evaluate import read_arrays
from distill.export.conversion import EXPORTERS, missing_packages
from distill.predict import softmax
from distill.runs import read_json
from distill.runtimes import RUNTIMES

ROWS = 96 + 200
OTHERS = [name for name in EXPORTERS if f"{name}-int8" in BUNDLES]
NAMES = {"onnxruntime": ["onnx-fp32", "onnx-int8"], **{name: [f"{name}-fp32", f"{name}-int8"] for name in OTHERS}}
RUNTIME = pytest.mark.parametrize(
    "runtime", [pytest.param(name, marks=[pytest.mark.slow] if name in EXPORTERS else []) for name in NAMES]
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of 209 test rows whose models have answered them, and a table of their files and texts."""
    folder = tmp_path_factory.mktemp("predict")
    make_project(folder)
    make_rows(folder, ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        answer = distill("evaluate", "recipe.yaml")
    assert answer.code == 0, answer.err
    with open(folder / "files.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "text"])
        table.writerows((row["image"], row["caption"]) for row in rows_of(folder))
    return folder


@pytest.fixture(scope="module")
def with_all(project: Path) -> None:
    """The bundles of all runtimes that are installed."""
    names = [name for runtime, both in NAMES.items() if not missing_packages(runtime) for name in both]
    process = start_distill("evaluate", "recipe.yaml", f"export.bundles=[{','.join(names)}]", cwd=project)
    _, said = process.communicate(timeout=1200)
    assert process.returncode == 0, said


@pytest.fixture
def run(runtime: str, project: Path, request: pytest.FixtureRequest) -> Path:
    """The run that has the bundles of a runtime."""
    if missing_packages(runtime):
        pytest.skip(f"needs {' and '.join(missing_packages(runtime))}")
    if runtime in EXPORTERS:
        request.getfixturevalue("with_all")
    return project / "runs" / "tiny"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "rows.csv", newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["split"] == "test"]


def predict(bundle: Path, table: Path) -> tuple[list[dict[str, Any]], bool]:
    """What the command line says in a fresh process, and whether that imported torch."""
    arguments = ["predict", str(bundle), "--table", str(table), "--json"]
    code = f"import sys; from distill.cli import main\ntry: main({arguments!r})\nfinally: print('torch' in sys.modules)"
    said, imported = run_python(code).splitlines()[-2:]
    return json.loads(said), imported == "True"


def probabilities(row: Mapping[str, Any], task: str, classes: list[str]) -> NDArray[np.float64]:
    found = {entry["label"]: entry["probability"] for entry in row["predictions"][task]["top"]}
    return np.array([found[name] for name in classes])


@RUNTIME
def test_files_are_answered_as_in_training(runtime: str, run: Path, project: Path) -> None:
    rows = rows_of(project)
    assert len(rows) >= 200
    for name in NAMES[runtime]:
        (bundle,) = run.glob(f"*/{name}")
        said, imported = predict(bundle, project / "files.csv")
        assert imported == RUNTIMES[runtime].needs_torch and len(said) == len(rows)
        meant = read_arrays(run / "evaluate" / f"{'pruned' if name.endswith('fp32') else name}.safetensors")
        position = {row_id: number for number, row_id in enumerate(meant["ids"].tolist())}
        order = [position[int(row["id"])] for row in rows]
        for task in ("colour", "shape"):
            classes, expected = read_json(bundle / "labels.json")[task], softmax(meant[f"logits.{task}"][order])
            found = np.array([probabilities(row, task, classes) for row in said])
            assert np.abs(found - expected).max() < 1e-4
            assert [row["predictions"][task]["label"] for row in said] == [classes[c] for c in expected.argmax(axis=1)]


@RUNTIME
def test_the_script_for_devices_times_them(runtime: str, run: Path, tmp_path: Path) -> None:
    shutil.copy(bench_bundle.__file__, tmp_path / "bench_bundle.py")
    for name in NAMES[runtime]:
        (bundle,) = run.glob(f"*/{name}")
        command = ["bench_bundle.py", str(bundle), "--batches", "1,3", "--threads", "1,2", "--json", "measured.json"]
        done = subprocess.run(
            [sys.executable, "-I", *command, "--runs", "10"], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found = read_json(tmp_path / "measured.json")
        assert found["runtime"].startswith(f"{runtime} ") and len(found["results"]) == 4
        assert found["size_bytes"] == sum((bundle / file).stat().st_size for file in RUNTIMES[runtime].files)
        assert 0 < found["peak_memory_bytes"] < 200e6
