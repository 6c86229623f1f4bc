"""What runtimes share: inputs are checked, graphs of one row take many, a missing package names its extra."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import bench_bundle
from distill.contracts import UserError
from distill.predict import load
from distill.runtimes import RUNTIMES, coreml
from distill.runtimes.base import RowByRow, checked

TENSORS = {
    "image": {"dtype": "uint8", "shape": ["batch", 3, 2, 2]},
    "text": {"dtype": "int64", "shape": ["batch", 5]},
    "text_mask": {"dtype": "bool", "shape": ["batch", 5]},
}


def some(count: int, length: int) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(count)
    return {
        "image": chance.integers(0, 256, (count, 3, 2, 2), np.uint8),
        "text": chance.integers(1, 9, (count, length)),
        "text_mask": chance.random((count, length)) < 0.5,
        "text_present": np.ones(count, bool),
    }


class Sums(RowByRow):
    """A graph of one row and five tokens."""

    def __init__(self) -> None:
        super().__init__({"inputs": TENSORS, "outputs": {"pixels": {}, "tokens": {}}}, 1)

    def _row(self, values: list[np.ndarray]) -> list[np.ndarray]:
        image, text, mask = values
        assert image.shape == (1, 3, 2, 2) and text.shape == mask.shape == (1, 5)
        return [image.sum((2, 3)), (text * mask).sum(1)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5))
def test_rows_are_run_one_by_one_and_texts_padded_under_their_mask(count: int, length: int) -> None:
    feeds = some(count, length)
    found = Sums().run(feeds)
    assert {value.dtype for value in found.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(found["pixels"], feeds["image"].sum((2, 3)))
    np.testing.assert_array_equal(found["tokens"], (feeds["text"] * feeds["text_mask"]).sum(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((2, 3, 2, 2), np.float32)}, r"'image' is float32 .* expected uint8 \[2, 3, 2, 2\]"),
        ({"image": np.zeros((2, 3, 2, 3), np.uint8)}, r"'image' is uint8 \[2, 3, 2, 3\], expected"),
        ({"text_mask": np.zeros((3, 4), bool)}, r"'text_mask' is bool \[3, 5\], expected bool \[2, 5\]"),
        ({"text": np.zeros((2, 6), np.int64)}, r"'text' is int64 \[2, 6\], expected int64 \[2, 5\]"),
        ({"text": np.zeros(2, np.int64)}, r"'text' is int64 \[2\]"),
    ],
)
def test_wrong_inputs_are_told(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(TENSORS, some(2, 4) | change)


@pytest.mark.parametrize("name", [name for name, runtime in RUNTIMES.items() if runtime.extra])
def test_a_missing_package_names_its_extra(name: str, tmp_path: Path, monkeypatch) -> None:
    loaded = ("executorch.kernels.quantized", "ai_edge_litert.interpreter")  # perhaps by another test
    for module in ("openvino", "executorch", "ai_edge_litert", "coremltools", *loaded):
        monkeypatch.setitem(sys.modules, module, None)
    if RUNTIMES[name].elsewhere():
        monkeypatch.setattr("distill.runtimes.coreml.sys.platform", "darwin")
    with pytest.raises(UserError, match=rf"pip install 'multidistill\[{RUNTIMES[name].extra}\]'"):
        RUNTIMES[name](tmp_path / "model", {"inputs": {}, "outputs": {}})


def test_a_bundle_of_an_unknown_runtime_is_refused(tmp_path: Path) -> None:
    content = {"format": "multidistill-bundle", "version": 1, "files": {}}
    for runtime in ("abacus", ["openvino"]):
        (tmp_path / "bundle.json").write_text(json.dumps({**content, "runtime": runtime}))
        with pytest.raises(
            UserError, match=r"for .*; this version reads .* for onnxruntime, openvino, executorch, litert, coreml"
        ):
            load(tmp_path)


@pytest.mark.parametrize("script", [False, True], ids=["the runtime", "the script for devices"])
def test_core_ml_gets_one_row_of_int32_and_float32(script: bool, tmp_path: Path, monkeypatch) -> None:
    """A stand-in of coremltools on macOS, which no machine of ours is."""
    opened, ran = [], []

    class Model:
        def __init__(self, path: str) -> None:
            opened.append(path)

        def predict(self, given: dict) -> dict:
            ran.append({name: (value.dtype.name, value.shape) for name, value in given.items()})
            return {"b": given["text"].sum(keepdims=True), "a": given["loud"] * 2}

    fake = type(sys)("coremltools")
    fake.models = type(sys)("coremltools.models")
    fake.models.MLModel = Model
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(metadata, "version", lambda name: "9.0")
    monkeypatch.setattr(coreml, "check_package", lambda package: None)
    inputs = {
        "text": {"dtype": "int64", "shape": ["batch", 4]},
        "there": {"dtype": "bool", "shape": ["batch"]},
        "loud": {"dtype": "float32", "shape": ["batch", 2]},
    }
    info = {"inputs": inputs, "outputs": {"a": {}, "b": {}}}
    feeds = {"text": np.ones((2, 4), np.int64), "there": np.ones(2, bool), "loud": np.ones((2, 2), np.float32)}
    first = tmp_path / RUNTIMES["coreml"].files[0]
    assert bench_bundle.RUNTIMES["coreml"].files == RUNTIMES["coreml"].files
    if script:
        run, version = bench_bundle.RUNTIMES["coreml"].open(first, info, 1)
        run(feeds)
        assert version == "9.0"
    else:
        found = RUNTIMES["coreml"](first, info).run(feeds)
        np.testing.assert_array_equal(found["a"], np.full((2, 2), 2, np.float32))
        assert [*found] == ["a", "b"] and found["b"].dtype == np.float32
    assert opened == [str(tmp_path / "model.mlpackage")]
    assert ran == [{"text": ("int32", (1, 4)), "there": ("int32", (1,)), "loud": ("float32", (1, 2))}] * 2
