"""Bundles beside fp32 and static int8: what each precision keeps, stores and refuses, and how a recipe names them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from export_models import as_feeds, rows, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from distill import bundles
from distill.bundles import (
    BUNDLES,
    check_bundles,
    check_packages,
    fp32_settings,
    least_agreement,
    least_setting,
    stages_of,
)
from distill.config import ExportConfig, QuantizeConfig
from distill.contracts import UserError
from distill.export import conversion
from distill.export.conversion import EXPORTERS
from distill.export.onnx import describe, export_onnx
from distill.predict import open_graph
from distill.quantization import weights
from distill.quantization.dynamic import quantize_dynamic
from distill.quantization.half import convert_half
from distill.quantization.weights import quantize_convolutions, quantize_weights_int4, quantize_weights_int8
from distill.runtimes import RUNTIMES

MAKERS = {
    "half": (convert_half, 0.51, 0.995),
    "dynamic": (quantize_dynamic, 0.27, 0.98),
    "int8": (quantize_weights_int8, 0.27, 0.99),
    "int4": (quantize_weights_int4, 0.27, 0.95),
}
"""Maker, most bytes of fp32's, least agreement on the stand-in, whose table is int8 rows in all but fp16."""


@pytest.fixture(scope="module")
def float_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    export_onnx(trained(), rows(4, 6, seed=1), path)
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_a_precision_keeps_answers_and_interface(
    name: str, float_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, most, least = MAKERS[name]
    info = make(float_graph, tmp_path / "model.onnx", iter([]), QuantizeConfig())
    assert capsys.readouterr() == ("", "")
    assert info["bytes"] == (tmp_path / "model.onnx").stat().st_size
    assert info["ratio"] == info["bytes"] / float_graph.stat().st_size <= most
    before, after = (describe(onnx.load(path)) for path in (float_graph, tmp_path / "model.onnx"))
    assert (after["inputs"], after["outputs"]) == (before["inputs"], before["outputs"])
    feeds = as_feeds(rows(1000, 8, seed=7))
    expected, found = (open_graph(path).run(feeds) for path in (float_graph, tmp_path / "model.onnx"))
    for task in ("category", "subcategory"):
        assert (found[task].argmax(1) == expected[task].argmax(1)).mean() >= least
        assert not np.array_equal(found[task], expected[task]), "nothing was changed"


@pytest.mark.parametrize("name", MAKERS)
def test_named_parts_stay_in_float(name: str, float_graph: Path, tmp_path: Path) -> None:
    make = MAKERS[name][0]
    info = make(float_graph, tmp_path / "all.onnx", iter([]), QuantizeConfig())
    part = make(float_graph, tmp_path / "part.onnx", iter([]), QuantizeConfig(keep_float=["table", "fuse"]))
    assert part["bytes"] > 0.98 * float_graph.stat().st_size, "the table is nearly all"
    done, fewer = (found.get("converted", found.get("quantized")) for found in (info, part))
    assert sum(fewer.values()) < sum(done.values())
    with pytest.raises(UserError, match=r"no node's name has 'hedas'.*heads\.category"):
        make(float_graph, tmp_path / "none.onnx", iter([]), QuantizeConfig(keep_float=["hedas"]))
    assert not (tmp_path / "none.onnx").exists()


def test_weights_lie_as_integers(float_graph: Path, tmp_path: Path) -> None:
    for make, kinds in ((quantize_weights_int8, {TensorProto.INT8}), (quantize_weights_int4, {TensorProto.INT4})):
        info = make(float_graph, tmp_path / "model.onnx", iter([]), QuantizeConfig())
        assert info["quantized"] == {"Conv": 2, "Gather": 1, "MatMul": 2}
        assert info["kept_float"] == {"Conv": 3, "MatMul": 1}, "those of less than a thousand numbers"
        graph = onnx.load(tmp_path / "model.onnx").graph
        sizes = {tensor.name: (tensor.data_type, np.prod(tensor.dims)) for tensor in graph.initializer}
        assert kinds <= {kind for kind, _ in sizes.values()}
        assert not [name for name, (kind, size) in sizes.items() if kind == TensorProto.FLOAT and size >= 2048]


def convolution(weight: np.ndarray) -> onnx.ModelProto:
    """A graph of one convolution, with its weight as a further output after it was quantized."""
    shape = ["rows", weight.shape[1], *[7] * (weight.ndim - 2)]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", len(weight), "width"])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@settings(max_examples=30, deadline=None)
@given(
    hypothesis_numpy.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 3)),
        elements=st.floats(-100, 100, width=32),
    ),
    st.sampled_from([4, 8]),
)
def test_a_weight_is_within_half_a_step(weight: np.ndarray, bits: int) -> None:
    model = convolution(weight)
    before = weights.MIN_WEIGHTS
    weights.MIN_WEIGHTS = 1
    try:
        assert quantize_convolutions(model.graph, bits) == 1
    finally:
        weights.MIN_WEIGHTS = before
    model.graph.output.append(helper.make_tensor_value_info("w/float", TensorProto.FLOAT, weight.shape))
    onnx.checker.check_model(model, full_check=True)
    (found,) = onnx.reference.ReferenceEvaluator(model).run(
        ["w/float"], {"x": np.zeros((1, weight.shape[1], 7), np.float32)}
    )
    flat, close = weight.reshape(len(weight), -1), found.reshape(len(weight), -1)
    width = flat.shape[1] if bits == 8 else weights.BLOCK
    for start in range(0, flat.shape[1], width):
        block, error = flat[:, start : start + width], np.abs(flat - close)[:, start : start + width]
        step = np.abs(block).max(axis=1, keepdims=True) / weights.LARGEST[bits]
        assert (error <= 0.501 * step + 1e-6).all()


def test_names_are_checked_with_the_nearest() -> None:
    check_bundles(ExportConfig(bundles=list(BUNDLES)))
    with pytest.raises(UserError, match=r"export\.bundles: there is no bundle 'onnx-int7'; did you mean 'onnx-int8'"):
        check_bundles(ExportConfig(bundles=["onnx-int7"]))
    with pytest.raises(UserError, match=r"'onnx-fp16' is no bundle of export\.bundles"):
        check_bundles(ExportConfig(min_agreement={"onnx-fp16": 0.9}))
    with pytest.raises(
        UserError, match=r"export\.embeddings is false, and retrieval compares embeddings; set it to true"
    ):
        check_bundles(ExportConfig(embeddings=False), retrieves=True)
    check_bundles(ExportConfig(embeddings=False))
    with pytest.raises(ValidationError):
        ExportConfig(min_agreement={"onnx-int8": 1.1})
    own = ExportConfig(min_agreement={"onnx-int8": 0.9})
    assert least_setting(own, "onnx-int8") == "export.min_agreement.onnx-int8"
    assert least_setting(own, "onnx-fp32") == "export.min_agreement_fp32"


@pytest.mark.parametrize("runtime", EXPORTERS)
def test_a_runtime_that_is_not_installed_is_told_with_its_extra(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, packages = ExportConfig(bundles=[f"{runtime}-fp32"]), EXPORTERS[runtime].packages
    monkeypatch.setattr(conversion.util, "find_spec", lambda name: None if name == packages[-1] else name)
    with pytest.raises(UserError) as refused:
        check_packages(config)
    assert str(refused.value) == (
        f"export.bundles: '{runtime}-fp32' needs {packages[-1]}, which this installation lacks; "
        f"pip install 'multidistill[{runtime}]', or leave it out"
    )
    check_bundles(config)
    monkeypatch.setattr(conversion.util, "find_spec", lambda name: name)
    check_packages(config)


def test_every_exporter_has_two_kinds_of_the_name_of_its_runtime() -> None:
    for runtime in EXPORTERS:
        for precision in ("fp32", "fp16" if runtime == "coreml" else "int8"):
            kind = BUNDLES[f"{runtime}-{precision}"]
            told = "int8, dynamic" if (runtime, precision) == ("litert", "int8") else precision
            assert (kind.runtime, kind.precision, kind.gate) == (
                runtime,
                told,
                "int8" if precision == "int8" else "fp32",
            )
            assert kind.file == RUNTIMES[runtime].files[0]


def test_fp32_is_always_made_and_first() -> None:
    config = ExportConfig(bundles=["onnx-int4-weights", "onnx-fp16", "onnx-int4-weights"])
    assert config.bundles == ["onnx-fp32", "onnx-int4-weights", "onnx-fp16"]
    stages = {"onnx-fp32": "export", "onnx-int4-weights": "quantize", "onnx-fp16": "quantize"}
    assert stages_of(config) == stages
    assert ExportConfig(bundles=[]).bundles == ["onnx-fp32"]


def test_each_bundle_has_its_own_gate() -> None:
    config = ExportConfig(bundles=list(BUNDLES), min_agreement_fp32=0.9, min_agreement_int8=0.8)
    families = {name: least_agreement(config, name) for name in BUNDLES}
    assert families == {name: 0.8 if "int" in name else 0.9 for name in BUNDLES}
    own = config.model_copy(update={"min_agreement": {"onnx-int4-weights": 0.5, "onnx-fp32": 0.7}})
    assert least_agreement(own, "onnx-int4-weights") == 0.5 and least_agreement(own, "onnx-int8") == 0.8
    assert fp32_settings(own) == {"opset": 20, "min_agreement_fp32": 0.7}


def test_recipes_without_younger_keys_keep_their_fingerprints() -> None:
    known = {"opset", "min_agreement_fp32", "min_agreement_int8", "quantize"}
    assert bundles.settings(ExportConfig()).keys() == known
    assert bundles.settings(ExportConfig())["quantize"].keys() == {
        "calibration_rows", "method", "per_channel", "keep_float"
    }  # fmt: skip
    changed = ExportConfig(bundles=["onnx-fp16"], min_agreement={"onnx-fp16": 0.9})
    assert bundles.settings(changed)["bundles"] == ["onnx-fp32", "onnx-fp16"]
    assert bundles.settings(changed).keys() == known | {"bundles", "min_agreement"}
