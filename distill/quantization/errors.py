"""What int8 does to each layer: the range that its input is cut to, and how far its output is from the float one.

Both graphs run unoptimized, with all values kept, on a few training rows at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper
from onnxruntime.quantization.qdq_loss_debug import (
    collect_activations,
    create_activation_matching,
    modify_model_output_intermediate_tensors,
)
from onnxruntime.quantization.quant_utils import QUANT_INPUT_SUFFIX

from distill.quantization.common import WEIGHTED_OPERATORS, Feeds, quiet

KEPT = [*WEIGHTED_OPERATORS, "Relu", "Clip", "DequantizeLinear"]
"""Operators whose inputs and outputs are read."""
ROWS = 64
"""Training rows that layers are compared on, at most."""
TOGETHER = 8
"""Rows whose values are in memory together."""
MOST_DB = 200.0
"""What is told where nothing differs."""


def layer_errors(model: ModelProto, int8_path: Path, batches: Sequence[Feeds]) -> list[dict[str, Any]]:
    """Compare a static int8 graph with the float graph that it was made from, layer by layer.

    Args:
        model: the float graph, as the quantizer read it.
        int8_path: the int8 graph.
        batches: the calibration rows; the first 64 are read.

    Returns:
        For each node with int8 weights and activations, in the graph's order: ``node``, ``operator``, ``min`` and
        ``max`` (what its input is cut to), ``clipped`` (share of the float input's numbers beyond that) and ``sqnr_db``
        (10 log10 of the power of the float output by that of the difference).
    """
    graph = onnx.load(int8_path).graph
    layers = [(node, *found) for node in graph.node if (found := _activation(node, graph)) is not None]
    signal, noise, clipped, total = (dict.fromkeys((n.name for n, *_ in layers), 0.0) for _ in range(4))
    with tempfile.TemporaryDirectory() as folder, quiet():
        paths = [Path(folder) / name for name in ("float.onnx", "kept_float.onnx", "kept_int8.onnx")]
        onnx.save(model, paths[0])
        for source, target in ((paths[0], paths[1]), (int8_path, paths[2])):
            modify_model_output_intermediate_tensors(str(source), str(target), KEPT)
        for feeds in few_rows(batches):
            exact, rough = (collect_activations(str(path), iter([feeds])) for path in paths[1:])
            integers = create_activation_matching(rough)
            for node, name, low, high in layers:
                output = node.output[0].removesuffix(QUANT_INPUT_SUFFIX)
                expected, read = exact[output][0], exact[name][0]
                # where integers go on, a Relu may be no more than the end of their range
                found = (integers[output]["post_qdq"] if output in integers else rough[node.output[0]])[0]
                signal[node.name] += float(np.square(expected, dtype=np.float64).sum())
                noise[node.name] += float(np.square(expected - found, dtype=np.float64).sum())
                step = (high - low) / 255  # what is rounded to the ends is not cut off
                clipped[node.name] += int(((read < low - step / 2) | (read > high + step / 2)).sum())
                total[node.name] += read.size
    return [
        {
            "node": node.name,
            "operator": node.op_type,
            "min": low,
            "max": high,
            "clipped": clipped[node.name] / total[node.name],
            "sqnr_db": decibels(signal[node.name], noise[node.name]),
        }
        for node, _, low, high in layers
    ]


def few_rows(batches: Sequence[Feeds]) -> Iterator[dict[str, NDArray[Any]]]:
    """The first rows of some batches, a few at a time."""
    left = ROWS
    for batch in batches:
        rows = min(left, len(next(iter(batch.values()))))
        for start in range(0, rows, TOGETHER):
            yield {name: values[start : min(start + TOGETHER, rows)] for name, values in batch.items()}
        left -= rows


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers, dB; at most MOST_DB."""
    if not np.isfinite(noise):
        return -MOST_DB
    return float(min(MOST_DB, 10 * np.log10(max(signal, 1e-30) / max(noise, 1e-30))))


def _activation(node: NodeProto, graph: GraphProto) -> tuple[str, float, float] | None:
    """The float tensor whose integers a layer reads, and the range that these can say; None of a float layer."""
    if node.op_type not in WEIGHTED_OPERATORS:
        return None
    makers = {name: other for other in graph.node for name in other.output}
    reads = [makers.get(name) for name in node.input[:2]]
    if not all(maker is not None and maker.op_type == "DequantizeLinear" for maker in reads):
        return None
    quantized = makers.get(reads[0].input[0]) if reads[0] is not None else None
    if quantized is None:
        return None
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scale, zero = (float(constants[name].item()) for name in quantized.input[1:3])
    return quantized.input[0].removesuffix(QUANT_INPUT_SUFFIX), scale * (0 - zero), scale * (255 - zero)
