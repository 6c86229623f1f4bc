"""Static int8: post-training, calibrated on training rows.

Activations become uint8 (asymmetric, one scale a tensor), weights int8 (symmetric, one scale an output channel;
Jacob et al. 2018, arXiv 1712.05877), written as QuantizeLinear / DequantizeLinear pairs that runtimes fuse into
integer kernels. Embedding tables become int8 rows (:mod:`distill.quantization.tables`).

On x86 processors without VNNI instructions, sums of uint8 x int8 products can saturate: check the agreement there.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto
from onnxruntime import quantization as ort_quantization
from onnxruntime.quantization.calibrate import TensorData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

from distill.config import QuantizeConfig
from distill.contracts import UserError
from distill.quantization.common import (
    WEIGHTED_OPERATORS,
    Feeds,
    constants_of,
    counted,
    finish,
    has_constant,
    named,
    prepared,
    quiet,
    sizes,
)
from distill.quantization.tables import lookups, quantize_tables

QUANTIZED_OPERATORS = [*WEIGHTED_OPERATORS, "Relu", "Clip"]
"""Operators between which values stay integer.

Relu and Clip vanish into the convolution before them; left out, each costs a trip through float. Add, Softmax,
Concat and the like are left in float: measured, they gain nothing at batch 1 and lose agreement.
"""

FLOAT_OUTPUT_OPERATORS = ["Gemm", "MatMul"]
"""Operators whose results stay float: logits and embeddings lose nothing to an output scale."""

METHODS = {
    "minmax": ort_quantization.CalibrationMethod.MinMax,
    "entropy": ort_quantization.CalibrationMethod.Entropy,
    "percentile": ort_quantization.CalibrationMethod.Percentile,
}


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
    return StaticQuantizer(fp32_path, feeds, config).write(out_path)


class StaticQuantizer:
    """A float graph and the ranges of its activations: int8 versions of it are written without measuring again.

    Attributes:
        model: the float graph with its constants folded.
        batches: the calibration rows.
        layers: node -> operator type, of those whose weights become int8, in the graph's order.
    """

    def __init__(
        self,
        fp32_path: Path,
        feeds: Iterable[Feeds],
        config: QuantizeConfig,
        ranges: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """Measure the ranges, but for those of values that are given by name; see :func:`quantize_static`."""
        self.batches, self._config, self._source = list(feeds), config, fp32_path
        if not self.batches:
            raise UserError("quantization got no calibration rows; give it some of the training split")
        self.model = prepared(fp32_path, config.keep_float)
        graph = self.model.graph
        constants, kept = constants_of(graph), named(graph, config.keep_float)
        read = {node.name for nodes in lookups(graph, kept).values() for node in nodes}
        self.layers = {
            node.name: node.op_type
            for node in graph.node
            if (node.op_type in WEIGHTED_OPERATORS and has_constant(node, constants) and node.name not in kept)
            or node.name in read
        }
        # of products of two activations int8 costs more time than it saves
        self._kept = kept | {n.name for n in graph.node if n.op_type == "MatMul" and not has_constant(n, constants)}
        with tempfile.TemporaryDirectory() as folder, quiet():
            self._ranges = self._calibrate(Path(folder))
        for name, limits in (ranges or {}).items():
            low, high = (np.array(limit, dtype=np.float32) for limit in limits)
            if name in self._ranges:  # an encoder that was taken out has not all values of the whole model
                self._ranges[name] = TensorData(lowest=low, highest=high)

    def write(self, out_path: Path, float_nodes: Collection[str] = ()) -> dict[str, Any]:
        """Write an int8 graph in which these nodes of :attr:`layers`, too, stay in float.

        Returns:
            As :func:`quantize_static`.
        """
        with tempfile.TemporaryDirectory() as folder, quiet():
            model, tables = self._with_tables(Path(folder), self._kept.union(float_nodes))
            quantizer = QDQQuantizer(
                model,
                self._config.per_channel,
                False,
                ort_quantization.QuantType.QInt8,
                ort_quantization.QuantType.QUInt8,
                copy.deepcopy(self._ranges),
                [],
                sorted(self._kept.union(float_nodes)),
                QUANTIZED_OPERATORS,
                {"OpTypesToExcludeOutputQuantization": FLOAT_OUTPUT_OPERATORS},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            made = quantizer.model.model
            finish(made, out_path)
        return {
            **_weight_counts(made.graph, tables),
            "calibration_batches": len(self.batches),
            "method": self._config.method,
            **sizes(self._source, out_path),
        }

    def _with_tables(self, folder: Path, kept: Collection[str]) -> tuple[ModelProto, int]:
        """The graph with integer tables and inferred shapes, and the number of lookups in them."""
        model = ModelProto()
        model.CopyFrom(self.model)
        tables = quantize_tables(model.graph, kept)
        onnx.save(model, folder / "tables.onnx")
        return load_model_with_shape_infer(folder / "tables.onnx"), tables

    def _calibrate(self, folder: Path) -> Any:
        self._with_tables(folder, self._kept)
        calibrator = create_calibrator(
            folder / "tables.onnx",
            QUANTIZED_OPERATORS,
            augmented_model_path=str(folder / "augmented.onnx"),
            calibrate_method=METHODS[self._config.method],
        )
        for batch in self.batches:  # ranges merge after each, so their lengths may differ and memory stays small
            calibrator.collect_data(_Reader([batch]))
        return calibrator.compute_data()


class _Reader(ort_quantization.CalibrationDataReader):
    """Batches one at a time."""

    def __init__(self, batches: list[Feeds]) -> None:
        self.current: Iterator[Feeds] = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        batch = next(self.current, None)
        return None if batch is None else dict(batch)


def _weight_counts(graph: GraphProto, tables: int) -> dict[str, dict[str, int]]:
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    weighted = [node for node in graph.node if node.op_type in WEIGHTED_OPERATORS]
    whole = [node.op_type for node in weighted if dequantized.intersection(node.input)]
    kept = [node.op_type for node in weighted if not dequantized.intersection(node.input)]
    return {"quantized": counted([*whole, *["Gather"] * tables]), "kept_float": counted(kept)}
