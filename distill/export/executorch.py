"""A program of one row as an ExecuTorch program for XNNPACK, in float32 or int8.

int8 is torchao's post-training quantization of the traced program (PT2E), weights symmetric and per channel, embedding
tables too. Static int8 rounds activations (asymmetric) within ranges that are calibrated on training rows, for the
operators that XNNPACK has in int8. Dynamic int8 measures the inputs of linear layers while the program runs, and leaves
the rest in float: XNNPACK has no other layer that does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from distill.export.subprocesses import answer, read_feeds
from distill.export.torch_program import example_of, in_plain_layout, read_program
from distill.runtimes import RUNTIMES
from distill.runtimes.base import checked, missing


def convert(source: Path, out: Path, *, feeds: str | None = None, dynamic: bool = False) -> dict[str, Any]:
    """Write a program as ``out``.

    Args:
        source: a program of one row, as :func:`distill.export.torch_program.export_program` writes it.
        out: the file to write.
        feeds: for static int8 the calibration batches' file.
        dynamic: int8 without calibration; float32 without either.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape) and ``delegated``, how many parts run on XNNPACK.

    Raises:
        UserError: a package is missing.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
            XnnpackDynamicallyQuantizedPartitioner,
            XnnpackPartitioner,
        )
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes.quant_fusion_pass import QuantFusionPass
    except ImportError as error:
        raise missing(RUNTIMES["executorch"], error) from error
    program, graph = read_program(source)
    program = in_plain_layout(program, graph)
    if feeds is not None or dynamic:
        rows = _rows(graph, feeds) if feeds is not None else [example_of(graph)]
        program = _quantized(program, rows, dynamic)
    # together they would make parts that wait for each other (seen in 1.5.1)
    first = [XnnpackDynamicallyQuantizedPartitioner()] if dynamic else []
    edge = to_edge_transform_and_lower(program, partitioner=[*first, XnnpackPartitioner()])
    lowered = edge.to_executorch(ExecutorchBackendConfig(passes=[QuantFusionPass()]))
    out.write_bytes(lowered.buffer)
    plans = lowered.executorch_program.execution_plan
    return {**graph, "delegated": sum(len(plan.delegates) for plan in plans)}


def _rows(graph: dict[str, Any], feeds: str) -> list[tuple[Tensor, ...]]:
    """Calibration rows one by one."""
    return [
        tuple(torch.from_numpy(array[row : row + 1].copy()) for array in batch.values())
        for batch in (checked(graph["inputs"], each) for each in read_feeds(feeds))
        for row in range(len(next(iter(batch.values()))))
    ]


def _quantized(program: ExportedProgram, rows: Sequence[tuple[Tensor, ...]], dynamic: bool) -> ExportedProgram:
    try:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer
        from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
    except ImportError as error:
        raise missing(RUNTIMES["executorch"], error) from error

    class Quantizer(XNNPACKQuantizer):
        """Leaves masks alone, which models join and pad as they do activations."""

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            super().annotate(model)
            EmbeddingQuantizer().annotate(model)
            for node in model.graph.nodes:
                if getattr(node.meta.get("val"), "dtype", torch.float32) != torch.float32:
                    node.meta.pop(Q_ANNOTATION_KEY, None)
            return model

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    quantizer = Quantizer().set_global(config)
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for row in rows:
            prepared(*row)
    return torch.export.export(convert_pt2e(prepared), rows[0])


if __name__ == "__main__":
    answer(convert)
