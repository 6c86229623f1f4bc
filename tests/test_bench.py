"""Measurements: what they contain, that they tell a large model from a small one, and known operation counts."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from export_models import StandIn, rows, write_tiny_graph
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

from distill import bench
from distill.bench import Timed, bench_models, flops, num_params, peak_memory
from distill.contracts import Batch, Outputs, UserError
from distill.runtimes import RUNTIMES, Runtime
from distill.runtimes.base import Tensors

FEEDS = {
    "image": np.zeros((1, 3, 8, 8), dtype=np.uint8),
    "image_present": np.array([True]),
    "text": np.zeros((1, 4), dtype=np.int64),
    "text_mask": np.ones((1, 4), dtype=bool),
    "text_present": np.array([True]),
}


def matrix_graph(path: Path, width: int) -> Path:
    """A model of one square matrix."""
    weight = numpy_helper.from_array(np.ones((width, width), dtype=np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "matrix",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_all_measures_of_two_models(tmp_path: Path) -> None:
    tiny = write_tiny_graph(tmp_path / "tiny.onnx")
    large = matrix_graph(tmp_path / "large.onnx", 2048)
    models = {"tiny": Timed(tiny, FEEDS), "large": Timed(large, {"x": np.ones((2, 2048), dtype=np.float32)})}
    result = bench_models(models, repeats=25, threads=1)
    assert list(result) == ["tiny", "large"]
    for name, model in models.items():
        entry = result[name]
        latency = entry["latency_ms"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        assert latency["p50_spread"][0] <= latency["p50"] <= latency["p50_spread"][1]
        assert entry["load_ms"] > 0
        assert entry["size_bytes"] == model.path.stat().st_size
        assert entry["threads"] == 1
        assert entry["runs"] == 30
        assert entry["runtime"].startswith("onnxruntime ")
    assert (result["tiny"]["batch"], result["large"]["batch"]) == (1, 2)
    assert result["large"]["latency_ms"]["p50"] > result["tiny"]["latency_ms"]["p50"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_models_own(tmp_path: Path) -> None:
    ballast = np.ones(200_000_000, dtype=np.uint8)  # the parent's memory must not be counted
    small = peak_memory(Timed(matrix_graph(tmp_path / "small.onnx", 64), {"x": np.ones((1, 64), dtype=np.float32)}))
    large = peak_memory(Timed(matrix_graph(tmp_path / "large.onnx", 2048), {"x": np.ones((1, 2048), dtype=np.float32)}))
    assert ballast.all()
    assert small is not None
    assert large is not None
    assert 0 < small < 30e6
    assert large - small > 0.9 * 2048 * 2048 * 4


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model file .*none\.onnx"):
        bench_models({"none": Timed(tmp_path / "none.onnx", FEEDS)}, repeats=10)


class Sleeper(Runtime):
    """A runtime that takes 2 ms a run and notes when it runs."""

    files, extra, package, modules = ("model.zz", "model.top"), None, "numpy", ("numpy",)
    ran: ClassVar[list[str]] = []

    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1) -> None:
        self.name, self.threads, self.version = path.stem, threads, "3"
        assert graph["inputs"] == {"x": {}}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        Sleeper.ran.append(self.name)
        time.sleep(0.002)
        return {}


def test_runtimes_follow_one_another_each_beside_the_neighbour(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(RUNTIMES, "sleeper", Sleeper)
    monkeypatch.setattr(bench, "peak_memory", lambda model, threads: 7)
    for file in ("a.zz", "b.zz", "a.top", "b.top"):
        (tmp_path / file).write_bytes(b"12345")
    feeds, graph = {"x": np.ones((3, 1), np.float32)}, {"inputs": {"x": {}}}
    models = {name: Timed(tmp_path / f"{name}.zz", feeds, "sleeper", graph) for name in ("a", "b")}
    models = {"a": models["a"], "fast": Timed(write_tiny_graph(tmp_path / "tiny.onnx"), FEEDS), "b": models["b"]}
    result = bench_models(models, repeats=20, threads=2, neighbour="fast")
    assert list(result) == ["a", "fast", "b"]
    for name in ("a", "b"):
        entry = result[name]
        assert (entry["runtime"], entry["batch"], entry["threads"], entry["size_bytes"]) == ("sleeper 3", 3, 2, 10)
        assert entry["peak_memory_bytes"] == 7 and entry["runs"] == 20
        assert entry["latency_ms"]["p50"] >= 2 > entry["neighbour_p50_ms"] > 0
    assert "neighbour_p50_ms" not in result["fast"]
    turns = [name for name, _ in itertools.groupby(Sleeper.ran[2 * bench.WARM_UP_RUNS :])]
    assert turns == ["a", "b", "a"] and Sleeper.ran.count("b") == bench.WARM_UP_RUNS + 20, "a b, b a: the order changes"


class Attention(nn.Module):
    """Attention of the text positions over themselves, after one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.shared = self.linear

    def forward(self, batch: Batch) -> Outputs:
        tokens = self.linear(functional.one_hot(batch.inputs["text"] % 8, 8).float())[:, None]
        mixed = functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return Outputs({"category": mixed.mean((1, 2))}, {}, {})


def test_flops_count_a_multiply_add_as_two_and_include_attention() -> None:
    count, length = 2, 5
    expected = count * (2 * length * 8 * 8 + 2 * (2 * length * length * 8))
    assert flops(Attention(), rows(count, length, seed=0)) == expected


def test_flops_leave_the_modes_as_they_were() -> None:
    model = StandIn(width=8).train()
    model.image.eval()
    one, two = (flops(model, rows(count, 4, seed=0)) for count in (1, 2))
    assert two == 2 * one > 0
    assert model.fuse.training
    assert not model.image.training


def test_parameters_are_counted_once() -> None:
    assert num_params(Attention()) == 8 * 8 + 8
    with torch.no_grad():
        assert num_params(nn.BatchNorm2d(4)) == 8


def test_torch_is_not_needed_to_measure() -> None:
    code = "import sys, distill.bench; assert 'torch' not in sys.modules"
    root = str(Path(__file__).resolve().parent.parent)
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}, check=True)
