"""Int8 graphs are a quarter of the bytes, agree with their float source, and are not slower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from export_models import as_feeds, rows, trained
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from onnx import TensorProto, helper, numpy_helper

from distill.config import QuantizeConfig
from distill.contracts import UserError
from distill.export.onnx import export_onnx
from distill.predict import open_session
from distill.quantization.static import quantize_static
from distill.quantization.tables import MIN_TABLE_ELEMENTS, quantize_rows, quantize_tables

TASKS = ["category", "subcategory"]


@pytest.fixture(scope="module")
def float_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    export_onnx(trained(), rows(4, 6, seed=1), path)
    return path


@pytest.fixture(scope="module")
def calibration() -> list[dict[str, np.ndarray]]:
    return [as_feeds(rows(count, length, seed=100 + length)) for count, length in ((16, 3), (20, 8), (16, 9), (5, 12))]


@pytest.fixture(scope="module")
def int8_graph(float_graph: Path, calibration: list, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    return path, quantize_static(float_graph, path, iter(calibration), QuantizeConfig())


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_session(path)
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))


def test_a_quarter_of_the_bytes(int8_graph: tuple[Path, dict], float_graph: Path) -> None:
    path, info = int8_graph
    assert info["ratio"] <= 0.27
    assert info["bytes"] == path.stat().st_size
    assert info["ratio"] == path.stat().st_size / float_graph.stat().st_size
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_agrees_with_the_float_graph(int8_graph: tuple[Path, dict], float_graph: Path) -> None:
    feeds = as_feeds(rows(1000, 8, seed=7))
    expected, found = outputs(float_graph, feeds), outputs(int8_graph[0], feeds)
    assert list(found) == list(expected)
    for task in TASKS:
        assert (found[task].argmax(1) == expected[task].argmax(1)).mean() >= 0.98
        assert len(np.unique(expected[task].argmax(1))) == expected[task].shape[1], "the comparison must not be trivial"
    for name in ("embedding_image", "embedding_text", "embedding_fused"):
        dot = (found[name] * expected[name]).sum(1)
        cosine = dot / np.linalg.norm(found[name], axis=1) / np.linalg.norm(expected[name], axis=1)
        assert np.median(cosine) > 0.999


def test_every_weight_is_integer(int8_graph: tuple[Path, dict]) -> None:
    path, info = int8_graph
    assert info["quantized"] == {"Conv": 5, "Gather": 1, "Gemm": 5 - 2}
    assert info["kept_float"] == {}
    model = onnx.load(path)
    assert [entry.domain for entry in model.opset_import] == [""], "standard operators only"
    graph = model.graph
    large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) > 1000]
    assert large
    assert {tensor.data_type for tensor in large} <= {TensorProto.INT8, TensorProto.FLOAT16}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    activations = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {kinds[node.input[2]] for node in activations} == {TensorProto.UINT8}, "signed activations are slow on x86"
    assert sum(node.op_type == "Relu" for node in graph.node) <= 1, "they belong inside the convolutions"
    assert not graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


def test_rows_do_not_depend_on_their_batch(int8_graph: tuple[Path, dict]) -> None:
    feeds = as_feeds(rows(8, 6, seed=8))
    together = outputs(int8_graph[0], feeds)["subcategory"]
    alone = outputs(int8_graph[0], {name: value[3:4] for name, value in feeds.items()})["subcategory"]
    np.testing.assert_allclose(alone[0], together[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_other_methods_take_batches_of_any_length(
    float_graph: Path, calibration: list, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    info = quantize_static(float_graph, tmp_path / "model.onnx", calibration, QuantizeConfig(method=method))
    assert info["method"] == method
    assert capsys.readouterr() == ("", "")
    feeds = as_feeds(rows(500, 8, seed=9))
    expected, found = outputs(float_graph, feeds), outputs(tmp_path / "model.onnx", feeds)
    assert (found["subcategory"].argmax(1) == expected["subcategory"].argmax(1)).mean() >= 0.97


def test_parts_stay_in_float(float_graph: Path, calibration: list, tmp_path: Path) -> None:
    config = QuantizeConfig(keep_float=["heads.", "table", "image.0"], per_channel=False)
    info = quantize_static(float_graph, tmp_path / "model.onnx", calibration, config)
    assert info["quantized"] == {"Conv": 4, "Gemm": 1}
    assert info["kept_float"] == {"Conv": 1, "Gemm": 2}
    assert info["ratio"] > 0.9


def test_unknown_parts_and_no_rows_are_refused(float_graph: Path, calibration: list, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no node's name has 'hedas'.*heads\.category"):
        quantize_static(float_graph, tmp_path / "a.onnx", calibration, QuantizeConfig(keep_float=["hedas"]))
    with pytest.raises(UserError, match="no calibration rows"):
        quantize_static(float_graph, tmp_path / "a.onnx", [], QuantizeConfig())
    assert not list(tmp_path.iterdir())


def test_looked_up_rows_that_are_activations_too(tmp_path: Path) -> None:
    """The quantizer names new tensors after the lookup's output: ours must not clash with them."""
    chance = np.random.default_rng(0)
    weights = {
        "table": chance.normal(size=(2048, 16)).astype(np.float32),
        "matrix": chance.normal(size=(16, 8)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "lookup"),
        helper.make_node("MatMul", ["rows", "matrix"], ["scores"], "product"),
        helper.make_node("MatMul", ["scores", "across"], ["gram"], "gram"),
        helper.make_node("Transpose", ["scores"], ["across"], "across", perm=[0, 2, 1]),
    ]
    graph = helper.make_graph(
        [nodes[0], nodes[1], nodes[3], nodes[2]],
        "tokens",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("gram", TensorProto.FLOAT, ["batch", "length", "length"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "float.onnx"
    )
    batches = [{"ids": chance.integers(0, 2048, (4, length))} for length in (3, 7, 5)]
    info = quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", batches, QuantizeConfig(method="percentile")
    )
    assert info["quantized"] == {"Gather": 1, "MatMul": 1}
    assert info["kept_float"] == {"MatMul": 1}
    for feeds in batches:
        expected, found = (outputs(tmp_path / name, feeds)["gram"] for name in ("float.onnx", "int8.onnx"))
        assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.99


@settings(max_examples=60, deadline=None)
@example(np.array([[1e-45]], np.float32))
@given(
    hypothesis_numpy.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.floats(-1000, 1000, width=32)
    )
)
def test_rows_are_within_half_a_step(table: np.ndarray) -> None:
    values, scales = quantize_rows(table)
    assert values.dtype == np.int8
    assert scales.dtype == np.float16
    assert values.min() >= -127
    error = np.abs(values * scales.astype(np.float32) - table)
    assert (error <= 0.5001 * scales.astype(np.float32)).all()
    exact = np.abs(table).max(axis=1, keepdims=True) / 127
    assert (scales.astype(np.float32) <= exact * 1.001 + 6e-8).all(), "the step is hardly coarser than float32's"


def test_a_table_that_is_also_a_matrix_is_left_alone() -> None:
    table = numpy_helper.from_array(np.ones((MIN_TABLE_ELEMENTS // 8, 8), dtype=np.float32), "table")
    gather = helper.make_node("Gather", ["table", "ids"], ["rows"], "lookup")
    product = helper.make_node("MatMul", ["rows", "table"], ["scores"], "tied")
    untied = helper.make_graph([gather], "untied", [], [], [table])
    tied = helper.make_graph([gather, product], "tied", [], [], [table])
    assert quantize_tables(tied) == 0
    assert len(tied.node) == 2
    assert quantize_tables(untied, keep_float=["lookup"]) == 0
    assert quantize_tables(untied) == 1
    assert [node.op_type for node in untied.node] == ["Gather", "Cast", "Gather", "Cast", "Mul"]
    assert [tensor.name for tensor in untied.initializer] == ["table/int8", "table/scale"]
