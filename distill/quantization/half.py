"""fp16: weights and values of 16 bits, with float32 inputs and outputs.

Half the bytes. A CPU without fp16 kernels computes in float32 between casts, which costs time: it is for devices that
have them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onnx import TensorProto
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import convert_float_to_float16

from distill.config import QuantizeConfig
from distill.quantization.common import WEIGHTED_OPERATORS, Feeds, counted, finish, named, prepared, quiet, sizes


def convert_half(fp32_path: Path, out_path: Path, feeds: Iterable[Feeds], config: QuantizeConfig) -> dict[str, Any]:
    """Write the fp16 version of a float graph.

    Args:
        fp32_path: an ONNX file, as :func:`distill.export.onnx.export_onnx` writes it.
        out_path: the file to write.
        feeds: not read.
        config: parts of node names whose operators stay in float.

    Returns:
        ``converted`` and ``kept_float`` (operator type -> count of nodes with weights), ``bytes`` and ``ratio``.

    Raises:
        UserError: a ``keep_float`` entry that matches no node.
    """
    source = prepared(fp32_path, config.keep_float)
    kept = named(source.graph, config.keep_float)
    with quiet():
        model = convert_float_to_float16(source, keep_io_types=True, node_block_list=sorted(kept))
        ONNXModel(model).topological_sort()
        finish(model, out_path)
    halves = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    weighted = [node for node in model.graph.node if node.op_type in WEIGHTED_OPERATORS]
    converted = [node.op_type for node in weighted if halves.intersection(node.input)]
    whole = [node.op_type for node in weighted if node.name in kept]
    return {"converted": counted(converted), "kept_float": counted(whole), **sizes(fp32_path, out_path)}
