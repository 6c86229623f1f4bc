"""Dynamic int8: int8 weights of matrix products, activations quantized anew for each run by their own range.

Nothing is calibrated. Best for transformers and texts; convolutions stay in float, as onnxruntime's dynamic ones are
slower than those (measured: 0.4 to 0.7 times the speed).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from onnxruntime import quantization as ort_quantization

from distill.config import QuantizeConfig
from distill.quantization.common import (
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

INTEGER_PRODUCT = "MatMulInteger"


def quantize_dynamic(fp32_path: Path, out_path: Path, feeds: Iterable[Feeds], config: QuantizeConfig) -> dict[str, Any]:
    """Write the dynamic int8 version of a float graph.

    Args:
        fp32_path: an ONNX file, as :func:`distill.export.onnx.export_onnx` writes it.
        out_path: the file to write.
        feeds: not read.
        config: granularity, and parts of node names whose operators stay in float.

    Returns:
        ``quantized`` and ``kept_float`` (operator type -> count of nodes), ``bytes`` and ``ratio``.

    Raises:
        UserError: a ``keep_float`` entry that matches no node.
    """
    model = prepared(fp32_path, config.keep_float)
    kept = named(model.graph, config.keep_float)
    tables = quantize_tables(model.graph, kept)
    del model.graph.value_info[:]  # the exporter's shapes contradict those that are inferred
    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = (Path(folder) / name for name in ("float.onnx", "dynamic.onnx"))
        onnx.save(model, source)
        ort_quantization.quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=["MatMul"],  # products with a bias become these first, and lookups are integer
            per_channel=config.per_channel,
            weight_type=ort_quantization.QuantType.QInt8,
            nodes_to_exclude=sorted(kept | {as_product(name) for name in kept}),
        )
        made = onnx.load(target)
        finish(made, out_path)
    products = ["MatMul" for node in made.graph.node if node.op_type == INTEGER_PRODUCT]
    constants = constants_of(made.graph)
    whole = [n.op_type for n in made.graph.node if n.op_type in WEIGHTED_OPERATORS and has_constant(n, constants)]
    return {
        "quantized": counted([*products, *["Gather"] * tables]),
        "kept_float": counted(whole),
        **sizes(fp32_path, out_path),
    }
