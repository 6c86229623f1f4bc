"""A program of one row as an ExecuTorch program for XNNPACK, in float32 or int8.

int8 is torchao's post-training quantization of the traced program (PT2E), weights symmetric and per channel, embedding
tables too. Static int8 rounds activations (asymmetric) within ranges that are calibrated on training rows, for the
operators that XNNPACK has in int8. Dynamic int8 measures the inputs of linear layers while the program runs, and leaves
the rest in float: XNNPACK has no other layer that does so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from distill.export.subprocesses import Feeds, answer, read_feeds
from distill.export.torch_program import example_of, in_plain_layout, read_program
from distill.prints import LearntRanges, Seen, ranges_of, told_by
from distill.runtimes import RUNTIMES
from distill.runtimes.base import checked, missing

FINEST = 2**-18
"""The least step of what is rounded. A smaller one can make the whole number of a bias too large for its 32 bits."""


def convert(
    source: Path,
    out: Path,
    *,
    feeds: str | None = None,
    dynamic: bool = False,
    learnt: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a program as ``out``.

    Args:
        source: a program of one row, as :func:`distill.export.torch_program.export_program` writes it.
        out: the file to write.
        feeds: for static int8 the calibration batches' file.
        dynamic: int8 without calibration; float32 without either.
        learnt: ``graph`` and ``ranges`` of :class:`~distill.prints.LearntRanges`, which go before what is
            calibrated.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape) and ``delegated``, how many parts run on XNNPACK; with
        ``learnt`` also ``ranges``, how many of them are ``learnt`` and how many ``calibrated``.

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
    program, told = in_plain_layout(program, graph), dict[str, Any]()
    if feeds is not None or dynamic:
        batches = [checked(graph["inputs"], each) for each in read_feeds(feeds)] if feeds is not None else []
        program, told = _quantized(program, batches, learnt, [example_of(graph)])
    # together they would make parts that wait for each other (seen in 1.5.1)
    first = [XnnpackDynamicallyQuantizedPartitioner()] if dynamic else []
    edge = to_edge_transform_and_lower(program, partitioner=[*first, XnnpackPartitioner()])
    lowered = edge.to_executorch(ExecutorchBackendConfig(passes=[QuantFusionPass()]))
    out.write_bytes(lowered.buffer)
    plans = lowered.executorch_program.execution_plan
    return {**graph, **told, "delegated": sum(len(plan.delegates) for plan in plans)}


def _quantized(
    program: ExportedProgram,
    batches: Sequence[Feeds],
    learnt: Mapping[str, Any] | None,
    example: Sequence[tuple[Tensor, ...]],
) -> tuple[ExportedProgram, dict[str, Any]]:
    """The program in int8, static if there are calibration batches, and what is told of its ranges."""
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

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=not batches)
    prepared = prepare_pt2e(program.module(), Quantizer().set_global(config))
    for part in prepared.modules():
        if "eps" in dict(part.named_buffers(recurse=False)):
            part.eps.fill_(FINEST)  # torchao's 2**-12 is more than the steps of small weights
    rows, told = [row for batch in batches for row in _rows(batch)] or list(example), dict[str, Any]()
    with torch.no_grad():
        for row in rows:
            prepared(*row)
    if learnt is not None:
        some = told_by(batches[0])
        told = {"ranges": _carry(prepared, _rows(some), ranges_of(learnt, some))}
    return torch.export.export(convert_pt2e(prepared), rows[0]), told


def _rows(batch: Feeds) -> list[tuple[Tensor, ...]]:
    """The rows of a batch one by one."""
    count = len(next(iter(batch.values())))
    return [tuple(torch.from_numpy(array[row : row + 1].copy()) for array in batch.values()) for row in range(count)]


def _carry(prepared: torch.fx.GraphModule, rows: Sequence[tuple[Tensor, ...]], ranges: LearntRanges) -> dict[str, int]:
    """Replace observers of values whose ranges were learnt; return how many observers have which ranges."""
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver

    observers = {
        name: part
        for name, part in prepared.named_modules(remove_duplicate=False)  # values that share a range have one observer
        if isinstance(part, HistogramObserver)
    }
    seen: dict[int, dict[str, Seen]] = defaultdict(lambda: defaultdict(Seen))

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if n.op == "call_module" and n.target in observers:
                (value,), _ = self.fetch_args_kwargs_from_env(n)
                seen[id(observers[str(n.target)])][n.name].add(value.numpy(force=True))
                return value
            return super().run_node(n)

    with torch.no_grad():
        for row in rows:
            Watch(prepared).run(*row)
    limits = {key: ranges.of([*values.values()]) for key, values in seen.items()}
    for name, observer in observers.items():
        found = limits.get(id(observer))
        if found is not None:
            fixed = MinMaxObserver(
                dtype=observer.dtype,
                qscheme=observer.qscheme,
                quant_min=observer.quant_min,
                quant_max=observer.quant_max,
            )
            fixed.min_val, fixed.max_val = (torch.tensor(limit) for limit in found)
            prepared.set_submodule(name, fixed)
    carried = sum(found is not None for found in limits.values())
    return {"learnt": carried, "calibrated": len(limits) - carried}


if __name__ == "__main__":
    answer(convert)
