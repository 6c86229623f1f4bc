"""Static int8 quantization of an exported graph: post-training, calibrated on training rows.

Activations become uint8 (asymmetric, one scale a tensor), weights int8 (symmetric, one scale an output channel;
Jacob et al. 2018, arXiv 1712.05877), written as QuantizeLinear / DequantizeLinear pairs that runtimes fuse into
integer kernels. Embedding tables are most of a small text model's bytes; they become int8 rows with a float16
scale each, and only the rows that a text looks up are ever dequantized.

On x86 processors without VNNI instructions, sums of uint8 x int8 products can saturate: check the agreement there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime import quantization as ort_quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from distill.config import QuantizeConfig
from distill.contracts import UserError
from distill.runs import atomic

WEIGHTED_OPERATORS = ("Conv", "Gemm", "MatMul")

QUANTIZED_OPERATORS = [*WEIGHTED_OPERATORS, "Relu", "Clip"]
"""Operators between which values stay integer.

Relu and Clip vanish into the convolution before them; left out, each costs a trip through float. Add, Softmax,
Concat and the like are left in float: measured, they gain nothing at batch 1 and lose agreement.
"""

FLOAT_OUTPUT_OPERATORS = ["Gemm", "MatMul"]
"""Operators whose results stay float: logits and embeddings lose nothing to an output scale."""

MIN_TABLE_ELEMENTS = 2**14
"""Smaller tables are left alone: the extra operators would cost more than the bytes saved."""

PARTS = ("int8", "scale")
"""What a quantized table consists of."""

METHODS = {
    "minmax": ort_quantization.CalibrationMethod.MinMax,
    "entropy": ort_quantization.CalibrationMethod.Entropy,
    "percentile": ort_quantization.CalibrationMethod.Percentile,
}

Feeds = Mapping[str, NDArray[Any]]


def quantize_static(fp32_path: Path, out_path: Path, feeds: Iterable[Feeds], config: QuantizeConfig) -> dict[str, Any]:
    """Write the int8 version of a float graph.

    Args:
        fp32_path: an ONNX file, as :func:`distill.export.onnx.export_onnx` writes it.
        out_path: the file to write.
        feeds: the graph's inputs for some batches of *training* rows; all are held in memory.
        config: calibration method, granularity, and parts of node names (such as ``encoders.image.stages.0``)
            whose operators stay in float.

    Returns:
        ``quantized`` and ``kept_float`` (operator type -> count of nodes with int8 and with float weights),
        ``calibration_batches``, ``method``, ``bytes``, and ``ratio`` of bytes to those of the float graph.

    Raises:
        UserError: no feeds, or a ``keep_float`` entry that matches no node.
    """
    batches = list(feeds)
    if not batches:
        raise UserError("quantization got no calibration rows; give it some of the training split")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(fp32_path), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
        _check_names(config.keep_float, model.graph)
        tables = quantize_tables(model.graph, config.keep_float)
        onnx.save(model, prepared)
        with atomic(out_path) as temporary:
            _quantize_operators(prepared, temporary, batches, config, _float_nodes(model.graph, config.keep_float))
            quantized = onnx.load(temporary)
            _compact(quantized)
            onnx.checker.check_model(quantized, full_check=True)
            onnx.save(quantized, temporary)
    size = out_path.stat().st_size
    return {
        **_weight_counts(quantized.graph, tables),
        "calibration_batches": len(batches),
        "method": config.method,
        "bytes": size,
        "ratio": size / fp32_path.stat().st_size,
    }


def quantize_tables(graph: GraphProto, keep_float: Iterable[str] = ()) -> int:
    """Replace float embedding tables [V, D] by int8 rows and one float16 scale a row, in place.

    ``Gather(table, ids)`` becomes ``Cast(Gather(int8 table, ids)) * Cast(Gather(scales, ids))``: rows are
    dequantized after the lookup. A table that anything else than a lookup reads, too, is left as it is.

    Returns:
        The number of lookups that were replaced.
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in set(node.input) & initializers.keys():
            readers.setdefault(name, []).append(node)
    replacements: dict[str, list[NodeProto]] = {}
    for name, nodes in readers.items():
        if _is_table(initializers[name]) and all(_is_lookup(node, name, keep_float) for node in nodes):
            arrays = quantize_rows(numpy_helper.to_array(initializers[name]))
            graph.initializer.remove(initializers[name])
            graph.initializer.extend(
                numpy_helper.from_array(array, f"{name}/{part}") for array, part in zip(arrays, PARTS, strict=True)
            )
            replacements.update({node.output[0]: _lookup(node, name) for node in nodes})
    nodes = [new for node in graph.node for new in replacements.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(replacements)


def quantize_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Return int8 values [V, D] and float16 scales [V, 1] whose product is near the table [V, D].

    The scale is rounded to float16 first, upwards, so that its rounding adds no error and nothing is clipped.
    """
    exact = np.abs(table).max(axis=1, keepdims=True).astype(np.float64) / 127  # of the smallest floats this is above 0
    scales = exact.astype(np.float16)
    scales = np.where(scales < exact, np.nextafter(scales, np.float16(np.inf)), scales)
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    return np.rint(table / divisor).astype(np.int8), scales


def _is_table(tensor: TensorProto) -> bool:
    return (
        tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and tensor.dims[0] * tensor.dims[1] >= MIN_TABLE_ELEMENTS
    )


def _is_lookup(node: NodeProto, table: str, keep_float: Iterable[str]) -> bool:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == table and axis == 0 and not _matches(node, keep_float)


def _lookup(node: NodeProto, table: str) -> list[NodeProto]:
    """The nodes that replace a Gather of a float table."""
    indices, output = node.input[1], node.output[0]
    nodes: list[NodeProto] = []
    for part in PARTS:  # a slash keeps clear of the quantizer's own names, such as OUTPUT_scale
        gathered, real = f"{output}/{part}", f"{output}/{part}_float"
        nodes.append(helper.make_node("Gather", [f"{table}/{part}", indices], [gathered], f"{node.name}_{part}"))
        nodes.append(helper.make_node("Cast", [gathered], [real], f"{node.name}_{part}_cast", to=TensorProto.FLOAT))
    factors = [f"{output}/{part}_float" for part in PARTS]
    return [*nodes, helper.make_node("Mul", factors, [output], f"{node.name}_dequantize")]


class _Reader(ort_quantization.CalibrationDataReader):
    """Batches one at a time: ranges merge after each, so their lengths may differ and memory stays small."""

    def __init__(self, batches: list[Feeds]) -> None:
        self.batches = batches
        self.current: Iterator[Feeds] = iter(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.current = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self.current, None)
        return None if batch is None else dict(batch)


def _quantize_operators(
    source: Path, target: Path, batches: list[Feeds], config: QuantizeConfig, float_nodes: list[str]
) -> None:
    ort_quantization.quantize_static(
        str(source),
        str(target),
        _Reader(batches),
        op_types_to_quantize=QUANTIZED_OPERATORS,
        per_channel=config.per_channel,
        activation_type=ort_quantization.QuantType.QUInt8,
        weight_type=ort_quantization.QuantType.QInt8,
        calibrate_method=METHODS[config.method],
        nodes_to_exclude=float_nodes,
        extra_options={
            "CalibStridedMinMax": 1,
            "OpTypesToExcludeOutputQuantization": FLOAT_OUTPUT_OPERATORS,
        },
    )


def _float_nodes(graph: GraphProto, keep_float: list[str]) -> list[str]:
    """The named nodes, and products of two activations: there int8 costs more time than it saves."""
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if _matches(node, keep_float) or (node.op_type == "MatMul" and not constants.intersection(node.input))
    ]


def _matches(node: NodeProto, parts: Iterable[str]) -> bool:
    return any(part in node.name for part in parts)


def _check_names(keep_float: list[str], graph: GraphProto) -> None:
    for part in keep_float:
        if not any(part in node.name for node in graph.node):
            known = sorted({node.name.rpartition("/")[0] for node in graph.node if node.op_type in WEIGHTED_OPERATORS})
            raise UserError(f"export.quantize.keep_float: no node's name has {part!r} in it; names: {', '.join(known)}")


def _compact(model: ModelProto) -> None:
    """Drop what the quantizer leaves behind and no runtime reads."""
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    del model.graph.value_info[:]
    used = {node.domain for node in model.graph.node}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)


def _weight_counts(graph: GraphProto, tables: int) -> dict[str, dict[str, int]]:
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    quantized, kept = Counter({"Gather": tables} if tables else {}), Counter[str]()
    for node in graph.node:
        if node.op_type in WEIGHTED_OPERATORS:
            (quantized if dequantized.intersection(node.input) else kept)[node.op_type] += 1
    return {"quantized": dict(sorted(quantized.items())), "kept_float": dict(sorted(kept.items()))}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's prints and hints off the screen; its errors are exceptions and pass."""
    root, level = logging.getLogger(), logging.getLogger().level
    try:
        root.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
