"""The benchmark of compressed models: cells are made once, holes keep their reason, tables say what was measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compress
from benchmarks.compress import Cell, cells, folder_of, known, lowest_cosine, make, markdown, parse, time_cells
from benchmarks.compress_models import CLASSES, LENGTH, MODELS, build, rows
from distill.export.conversion import missing_packages
from distill.runs import write_json


def test_every_cell_is_there_once():
    found = list(cells(list(MODELS), ["onnxruntime", "litert"]))
    assert len(found) == len(set(found)) == len(MODELS) * 2 * len(compress.DENSITIES) * len(compress.PRECISIONS)
    assert len({folder_of(Path(), cell) for cell in found}) == len(found)


def test_a_cell_that_cannot_be_has_its_reason(tmp_path):
    cell = Cell("gru", "dense", "int8 QAT", "onnxruntime")
    assert "graph of int8 static" in known(tmp_path, cell)["reason"]
    cell = Cell("gru", "dense", "fp32", "onnxruntime")
    assert known(tmp_path, cell) is None
    write_json(folder_of(tmp_path, cell) / "cell.json", {"version": compress.VERSION, "found": {"reason": "too late"}})
    assert known(tmp_path, cell) == {"reason": "too late"}
    write_json(folder_of(tmp_path, cell) / "cell.json", {"version": 0, "found": {"reason": "an older one"}})
    assert known(tmp_path, cell) is None


def test_the_lowest_cosine_counts():
    ours, theirs = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [1.0, 0.0]])
    assert lowest_cosine(ours, theirs) == pytest.approx(np.sqrt(0.5))


def test_models_are_the_same_each_time_and_smaller_where_pruned(tmp_path):
    whole, again = (build("quickstart", tmp_path) for _ in range(2))
    pruned = [build("quickstart", tmp_path, pruned=tmp_path / "plan.json") for _ in range(2)]
    batch = rows("quickstart", 2, seed=4)
    assert batch.inputs["text"].shape == (2, LENGTH) and batch.inputs["image"].dtype == torch.uint8
    for first, second in ((whole, again), pruned):
        with torch.no_grad():
            logits = [model(batch).logits["kind"] for model in (first, second)]
        assert logits[0].shape == (2, CLASSES) and torch.equal(*logits)
    sizes = [sum(each.numel() for each in model.parameters()) for model in (whole, pruned[0])]
    assert sizes[1] < sizes[0]


def test_a_model_is_made_and_timed(tmp_path):
    for precision in ("fp32", "int8 dynamic"):
        cell = Cell("quickstart", "dense", precision, "onnxruntime")
        found = make(tmp_path, cell)
        assert found["cosine"] > 0.99 and found["bytes"] > 0
        write_json(folder_of(tmp_path, cell) / "cell.json", {"version": compress.VERSION, "found": found})
    timed = time_cells(tmp_path, "quickstart", "onnxruntime", 1)
    assert timed.keys() == {"eager", "dense fp32", "dense int8 dynamic"}
    assert all(0 < each["spread_ms"][0] <= each["p50_ms"] <= each["spread_ms"][1] for each in timed.values())


@pytest.mark.parametrize(
    "runtime", ["openvino", *(pytest.param(name, marks=pytest.mark.slow) for name in ("executorch", "litert"))]
)
def test_all_precisions_are_made_of_other_runtimes(runtime, tmp_path):
    if missing_packages(runtime):
        pytest.skip(f"needs {' and '.join(missing_packages(runtime))}")
    for precision in ("int8 dynamic", "int8 QAT"):
        found = make(tmp_path, Cell("quickstart", "dense", precision, runtime))
        assert found["cosine"] > 0.99 and 2e6 < found["bytes"] < 4e6, "9e6 in float"
    if runtime != "openvino":  # which gets the graph that has the ranges
        assert found["graph"]["ranges"]["learnt"] > 10


def test_tables_show_figures_and_holes(tmp_path):
    options = parse(["--models", "fused", "--runtimes", "onnxruntime", "--output", str(tmp_path)])
    made = {"bytes": 3 * 2**20, "cosine": 0.9987, "graph": {}}
    for cell in cells(["fused"], ["onnxruntime"]):
        found = made if cell.precision == "fp32" else {"reason": "out of luck"}
        write_json(folder_of(tmp_path, cell) / "cell.json", {"version": compress.VERSION, "found": found})
    times = {"eager": 8.0, "dense fp32": 4.0, "pruned fp32": 2.0}
    content = {name: {"p50_ms": value, "spread_ms": [value, value + 1]} for name, value in times.items()}
    write_json(compress.times_file(tmp_path, "fused", "onnxruntime"), content)
    text = markdown(options, "a command")
    assert "| onnxruntime | pruned | fp32 | 3.00 | 2.00 | 2.00–3.00 | 4.00 | 2.00 | 0.9987 |" in text
    assert "- int8 static on onnxruntime: out of luck" in text, "a line for both densities"
    lines = compress.floors(options)
    assert "- fused, pruned fp32 on onnxruntime: 2.00 times as fast as dense fp32, expected at least 1.7" in lines
    assert "- fused, dense int8 static on onnxruntime: not measured, expected at least 1.4" in lines
    assert "- fused, pruned int8 static on onnxruntime: not measured, expected at most 0.167" in lines


def test_a_process_that_fails_gives_its_last_line(monkeypatch):
    assert "invalid choice" in compress.in_own_process(["--models", "none"])["reason"]
    monkeypatch.setattr(compress, "SECONDS", 0.01)
    assert "not done after" in compress.in_own_process(["--help"])["reason"]
    assert isinstance(parse([]), argparse.Namespace)
