"""Weight-only int8 and int4: small files, computed in float.

Matrices become ``MatMulNBits`` of onnxruntime: blocks of 32 numbers along the input, each with a scale, dequantized
while they are multiplied. For convolutions the runtime has no such operator: their weights lie as integers, int8 with a
scale an output channel, int4 with one for each 32 numbers of a channel, and a DequantizeLinear makes floats of them.
Tables are int8 rows (:mod:`distill.quantization.tables`) in both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_model import ONNXModel

from distill.config import QuantizeConfig
from distill.quantization.common import (
    STANDARD,
    WEIGHTED_OPERATORS,
    Feeds,
    as_product,
    constants_of,
    counted,
    finish,
    has_constant,
    named,
    prepared,
    quiet,
    sizes,
)
from distill.quantization.tables import quantize_tables

BLOCK = 32
"""Weights that share a scale, in matrices and in int4 convolutions."""
MIN_WEIGHTS = 1024
"""Smaller weights are left alone: the further operator would cost more than the bytes saved."""
INT4_OPSET = 21
"""The first version of ONNX's operators that knows int4 and blocks."""
LARGEST = {4: 7, 8: 127}


def quantize_weights(
    fp32_path: Path, out_path: Path, feeds: Iterable[Feeds], config: QuantizeConfig, *, bits: int
) -> dict[str, Any]:
    """Write a version of a float graph whose weights are integers.

    Args:
        fp32_path: an ONNX file, as :func:`distill.export.onnx.export_onnx` writes it.
        out_path: the file to write.
        feeds: not read.
        config: parts of node names whose operators stay in float.
        bits: 8 or 4.

    Returns:
        ``quantized`` and ``kept_float`` (operator type -> count of nodes), ``bytes`` and ``ratio``.

    Raises:
        UserError: a ``keep_float`` entry that matches no node.
    """
    model = prepared(fp32_path, config.keep_float)
    if bits == 4 and next(entry.version for entry in model.opset_import if entry.domain in STANDARD) < INT4_OPSET:
        model = version_converter.convert_version(model, INT4_OPSET)
    kept = named(model.graph, config.keep_float)
    tables = quantize_tables(model.graph, kept)
    convolutions = quantize_convolutions(model.graph, bits, kept)
    with quiet():
        products = _quantize_products(model, bits, kept)
        finish(products, out_path)
    nodes = products.graph.node
    done = ["MatMul" for node in nodes if node.op_type == "MatMulNBits"]
    constants = constants_of(products.graph)
    whole = [n.op_type for n in nodes if n.op_type in WEIGHTED_OPERATORS and has_constant(n, constants)]
    return {
        "quantized": counted([*done, *["Conv"] * convolutions, *["Gather"] * tables]),
        "kept_float": counted(whole),
        **sizes(fp32_path, out_path),
    }


def quantize_convolutions(graph: GraphProto, bits: int, keep_float: Collection[str] = ()) -> int:
    """Store the weights of convolutions as integers behind a DequantizeLinear, in place.

    Args:
        graph: any; with 4 bits of opset 21 or later.
        bits: 8 or 4.
        keep_float: names of nodes that are left alone.

    Returns:
        The number of convolutions whose weights are integers now.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    chosen = [
        node
        for node in graph.node
        if node.op_type == "Conv" and node.name not in keep_float and node.input[1] in weights
        if np.prod(weights[node.input[1]].dims) >= MIN_WEIGHTS
    ]
    new: list[NodeProto] = []
    for name in dict.fromkeys(node.input[1] for node in chosen):
        new += (_int4_weight if bits == 4 else _int8_weight)(graph, name, numpy_helper.to_array(weights[name]))
    for node in chosen:
        node.input[1] = f"{node.input[1]}/float"
    nodes = [*new, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in graph.node for name in node.input}
    for name in {node.input[1].removesuffix("/float") for node in chosen} - read:
        graph.initializer.remove(weights[name])
    return len(chosen)


def _int8_weight(graph: GraphProto, name: str, weight: NDArray[np.float32]) -> list[NodeProto]:
    """One scale an output channel."""
    scales = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / LARGEST[8]
    values = np.rint(weight / np.where(scales == 0, 1, scales)).astype(np.int8)
    _add(graph, {f"{name}/int8": values, f"{name}/scale": scales.ravel().astype(np.float32)})
    return [helper.make_node("DequantizeLinear", [f"{name}/int8", f"{name}/scale"], [f"{name}/float"], axis=0)]


def _int4_weight(graph: GraphProto, name: str, weight: NDArray[np.float32]) -> list[NodeProto]:
    """One scale for each block of an output channel's weights."""
    flat = weight.reshape(len(weight), -1)
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % BLOCK))).reshape(len(flat), -1, BLOCK)
    scales = np.abs(padded).max(axis=2, keepdims=True) / LARGEST[4]
    values = np.rint(padded / np.where(scales == 0, 1, scales)).reshape(len(flat), -1)[:, : flat.shape[1]]
    kind = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    arrays = {"int4": values.astype(kind), "scale": scales[..., 0].astype(np.float32), "shape": np.array(weight.shape)}
    _add(graph, {f"{name}/{part}": array for part, array in arrays.items()})
    flat_name = f"{name}/flat"
    return [
        helper.make_node("DequantizeLinear", [f"{name}/int4", f"{name}/scale"], [flat_name], axis=1, block_size=BLOCK),
        helper.make_node("Reshape", [flat_name, f"{name}/shape"], [f"{name}/float"]),
    ]


def _add(graph: GraphProto, arrays: Mapping[str, NDArray[Any]]) -> None:
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())


def _quantize_products(model: ModelProto, bits: int, keep_float: Collection[str]) -> ModelProto:
    """Make the products with large constant matrices, biased ones too, ``MatMulNBits``."""
    plain = ONNXModel(model)
    plain.replace_gemm_with_matmul()
    small = {tensor.name for tensor in model.graph.initializer if np.prod(tensor.dims) < MIN_WEIGHTS}
    left = {node.name for node in model.graph.node if node.op_type == "MatMul" and small.intersection(node.input)}
    left |= {as_product(name) for name in keep_float} | set(keep_float)
    quantizer = MatMulNBitsQuantizer(
        model, bits=bits, block_size=BLOCK, is_symmetric=True, nodes_to_exclude=sorted(left)
    )
    quantizer.process()
    return quantizer.model.model


quantize_weights_int8 = partial(quantize_weights, bits=8)
quantize_weights_int4 = partial(quantize_weights, bits=4)
