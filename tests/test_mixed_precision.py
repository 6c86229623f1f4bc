"""Which layers int8 harms, by how much, and how few of them the search leaves in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from export_models import as_feeds, rows, trained
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from distill.bundles import best_found
from distill.config import QuantizeConfig
from distill.export.onnx import export_onnx
from distill.predict import open_graph
from distill.quantization import search
from distill.quantization.errors import MOST_DB, ROWS, TOGETHER, decibels, few_rows, layer_errors
from distill.quantization.search import search_floats
from distill.quantization.static import StaticQuantizer

TASKS = ("category", "subcategory")
SPOILT = "fuse.0/Gemm"


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory: pytest.TempPathFactory) -> StaticQuantizer:
    """Of the stand-in with one unit whose weights are so large that one scale makes zeros of the others.

    Its bias keeps the unit itself at zero behind the Relu.
    """
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    export_onnx(trained(), rows(4, 6, seed=1), path)
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if node.name == SPOILT)
    for name, value in zip(node.input[1:], (60.0, -1e5), strict=True):
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[0] = value
        tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, path)
    calibration = [as_feeds(rows(count, length, seed=100 + length)) for count, length in ((16, 3), (20, 8), (16, 9))]
    return StaticQuantizer(path, calibration, QuantizeConfig(per_channel=False))


def test_the_scan_finds_the_layer_that_was_spoilt(quantizer: StaticQuantizer, tmp_path: Path) -> None:
    def agreement(path: Path) -> float:
        return float(not integer(path, SPOILT))

    seen: list[tuple[int, int]] = []
    found = search_floats(
        quantizer, agreement, 1.0, outputs=TASKS, report=lambda done, total, *_: seen.append((done, total))
    )
    assert found["kept"] == [SPOILT] == [found["scan"][0]["node"]]
    assert found["scan"][0]["sqnr_db"] < found["scan"][1]["sqnr_db"] - 10
    assert {layer["node"] for layer in found["scan"]} == set(quantizer.layers) and len(quantizer.layers) == 9
    assert found["tried"] == [{"num_float": 0, "agreement": 0.0}, {"num_float": 1, "agreement": 1.0}]
    assert seen == [(number, 9) for number in range(1, 10)]
    quantizer.write(tmp_path / "mixed.onnx", found["kept"])
    assert not integer(tmp_path / "mixed.onnx", SPOILT) and integer(tmp_path / "mixed.onnx", "heads.category/Gemm")


def integer(path: Path, name: str) -> bool:
    graph = onnx.load(path).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return any(dequantized.intersection(node.input) for node in graph.node if node.name == name)


def test_nothing_is_scanned_where_the_gate_holds(quantizer: StaticQuantizer) -> None:
    found = search_floats(quantizer, lambda path: 0.99, 0.98, outputs=TASKS)
    assert found == {"kept": [], "scan": [], "tried": [{"num_float": 0, "agreement": 0.99}]}


class Counting:
    """A quantizer whose files say how many layers are float."""

    def __init__(self, num_layers: int) -> None:
        self.layers = {f"layer {number}": "Conv" for number in range(num_layers)}

    def write(self, path: Path, float_nodes: list[str]) -> None:
        path.write_text(str(len(float_nodes)))


@given(st.integers(1, 70), st.integers(0, 80))
def test_the_fewest_that_hold_are_found_in_few_tries(num_layers: int, needed: int) -> None:
    scan = [{"node": f"layer {number}", "operator": "Conv", "sqnr_db": float(number)} for number in range(num_layers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_scan", lambda *_: scan)
        quantizer: StaticQuantizer = Counting(num_layers)  # type: ignore[assignment]
        found = search_floats(quantizer, lambda path: int(path.read_text()) / 100, needed / 100, outputs=())
    assert len(found["tried"]) <= 2 + 2 * np.log2(num_layers + 1)
    if needed < num_layers:
        assert found["kept"] == [layer["node"] for layer in scan[:needed]]
    else:  # the best of those with an int8 layer
        assert len(found["kept"]) == num_layers - 1


def test_a_refusal_tells_the_best_try() -> None:
    tried = [
        {"num_float": 0, "agreement": None},
        {"num_float": 2, "agreement": 0.91},
        {"num_float": 3, "agreement": 0.9},
    ]
    counts = {"quantized": {"Conv": 2, "Gather": 1}, "kept_float": {"Gemm": 1}}
    said = best_found({"search": {"kept": [], "scan": [], "tried": tried}, **counts}, "export.min_agreement_int8")
    assert "0.9100 at best, with 2 of 4 layers in float" in said
    assert best_found({"quantized": {}}, "") == ""


def test_layer_errors(quantizer: StaticQuantizer, tmp_path: Path) -> None:
    quantizer.write(tmp_path / "int8.onnx")
    found = {layer["node"]: layer for layer in layer_errors(quantizer.model, tmp_path / "int8.onnx", quantizer.batches)}
    assert found.keys() == {name for name, operator in quantizer.layers.items() if operator != "Gather"}
    image = found["image.0/Conv"]
    assert image["min"] == pytest.approx(-1, abs=0.01) and image["max"] == pytest.approx(1, abs=0.01)
    assert min(found.values(), key=lambda layer: layer["sqnr_db"])["node"] != "image.0/Conv"
    for layer in found.values():
        assert 0 <= layer["clipped"] < 0.01 and -10 < layer["sqnr_db"] < 100, layer


def test_clipped_is_what_lies_beyond_the_range_of_calibration(quantizer: StaticQuantizer, tmp_path: Path) -> None:
    narrow = [{**batch, "image": np.clip(batch["image"], 96, 160)} for batch in quantizer.batches]
    other = StaticQuantizer(quantizer._source, narrow, QuantizeConfig())
    other.write(tmp_path / "int8.onnx")
    (first, *_) = layer_errors(other.model, tmp_path / "int8.onnx", quantizer.batches)
    outside = [(batch["image"] < 96) | (batch["image"] > 160) for batch in few_rows(quantizer.batches)]
    assert (
        first["clipped"] == pytest.approx(np.mean([flags.mean() for flags in outside]), abs=0.02)
        and first["clipped"] > 0.2
    )
    assert first["sqnr_db"] < 20


def test_few_rows_are_the_first_ones() -> None:
    batches = [{"x": np.arange(30) + 30 * number} for number in range(4)]
    parts = list(few_rows(batches))
    assert max(len(part["x"]) for part in parts) == TOGETHER
    assert np.array_equal(np.concatenate([part["x"] for part in parts]), np.arange(ROWS))


def test_decibels() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 0.0) == MOST_DB and decibels(1.0, float("nan")) == -MOST_DB


def test_layers_stay_comparable(quantizer: StaticQuantizer, tmp_path: Path) -> None:
    """A mixed graph answers between the float and the int8 one: the spoilt layer in float mends it."""
    quantizer.write(tmp_path / "int8.onnx")
    quantizer.write(tmp_path / "mixed.onnx", [SPOILT])
    onnx.save(quantizer.model, tmp_path / "float.onnx")
    feeds = as_feeds(rows(300, 8, seed=7))
    exact, rough, mixed = (open_graph(tmp_path / f"{name}.onnx").run(feeds) for name in ("float", "int8", "mixed"))
    for task in TASKS:
        bad, good = (np.abs(each[task] - exact[task]).mean() for each in (rough, mixed))
        assert good < 0.5 * bad
