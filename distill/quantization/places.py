"""Where in a torch model the numbers are that its static int8 graph rounds: what training with rounding needs to know.

The graph is asked which values it rounds, and a model and its float graph are run on the same rows: a value belongs
where a module takes or gives the same numbers, in whatever shape and order, padded or not. So nothing is guessed from
the kinds of layers, and what a graph joins (a convolution and its BatchNorm) or drops (an identity) needs no rule.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import GraphProto, numpy_helper
from onnxruntime.quantization.quant_utils import QUANT_INPUT_SUFFIX
from torch import Tensor, nn

from distill.contracts import Batch
from distill.multimodal import evaluating
from distill.prints import SAME, Print, distance, fingerprint, graph_values
from distill.quantization.common import Feeds
from distill.quantization.static import StaticQuantizer
from distill.quantization.tables import lookups
from distill.rounding import HIGHEST, LOWEST, Place, Plan, Range

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weights have their output channels first, as :class:`distill.rounding.WeightRounding` takes them."""

Prints = tuple[Print, ...]
"""Of the same value in several passes."""


@dataclass
class Seen:
    """The numbers that the modules of a model took and gave, in the order of the calls."""

    inputs: list[tuple[str, Prints]] = field(default_factory=list)
    outputs: list[tuple[str, Prints]] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)


def find_places(model: nn.Module, passes: Sequence[tuple[Batch, Feeds]], quantizer: StaticQuantizer) -> Plan:
    """Find what a model has to round in training to be what its int8 graph will be.

    Args:
        model: a ``Batch -> Outputs`` model.
        passes: some rows, and the same as inputs of the graph: once with all modalities, and again with a part of them,
            which tells what stands in for a missing one from what it stands in for.
        quantizer: of the model's float graph, with the ranges that training starts from.
    """
    graph = quantizer.model.graph
    with tempfile.TemporaryDirectory() as folder:
        quantizer.write(Path(folder) / "int8.onnx")
        ranges = graph_ranges(onnx.load(Path(folder) / "int8.onnx").graph)
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    ranges = {name: limits for name, limits in ranges.items() if name in names}
    weights, tables, missed = _layers(model, quantizer)
    seen = _together([_watched(model, batch) for batch, _ in passes])
    computed = [graph_values(quantizer.model, feeds, list(ranges)) for _, feeds in passes]
    values = []
    for name in computed[0]:
        found = _placed(tuple(fingerprint(numbers[name]) for numbers in computed), seen)
        if found is None:
            missed.append(name)
        else:
            values.append(Place(name, *found, *ranges[name]))
    return Plan(weights, tables, values, missed)


def graph_ranges(graph: GraphProto) -> dict[str, Range]:
    """Name of a value that an int8 graph rounds -> the least and the largest number that is left."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            scale, zero = (float(constants[name]) for name in node.input[1:3])
            found[node.input[0].removesuffix(QUANT_INPUT_SUFFIX)] = ((LOWEST - zero) * scale, (HIGHEST - zero) * scale)
    return found


def _layers(model: nn.Module, quantizer: StaticQuantizer) -> tuple[list[str], list[str], list[str]]:
    """Paths of the layers and of the tables whose weights become int8, and nodes that belong to neither."""
    modules = dict(model.named_modules())
    read = {node.name for nodes in lookups(quantizer.model.graph).values() for node in nodes}
    weights, tables, missed = [], [], []
    for node in quantizer.layers:
        path = node.rpartition("/")[0]
        if node in read and isinstance(modules.get(path), nn.Embedding):
            tables.append(path)
        elif node not in read and isinstance(modules.get(path), LAYERS):
            weights.append(path)
        else:
            missed.append(node)
    return list(dict.fromkeys(weights)), list(dict.fromkeys(tables)), missed


def _watched(model: nn.Module, batch: Batch) -> Seen:
    """Run a model once, and note what its modules take first and give."""
    seen = Seen()

    def note(notes: list[tuple[str, Prints]], path: str, values: Any) -> None:
        if isinstance(values, Tensor) and values.is_floating_point():
            notes.append((path, (fingerprint(values.numpy(force=True)),)))

    def taken(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.calls[path] += 1
        note(seen.inputs, path, args[0] if args else None)

    def given(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        note(seen.outputs, path, output)

    modules = [(path, module) for path, module in model.named_modules() if path]
    handles = [module.register_forward_pre_hook(partial(taken, path)) for path, module in modules]
    handles += [module.register_forward_hook(partial(given, path)) for path, module in modules]
    try:
        with evaluating(model), torch.no_grad():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _together(passes: Sequence[Seen]) -> Seen:
    """The notes of several passes as those of one; modules are called in the same order in each."""

    def joined(notes: Sequence[list[tuple[str, Prints]]]) -> list[tuple[str, Prints]]:
        return [
            (calls[0][0], tuple(found for _, prints in calls for found in prints)) for calls in zip(*notes, strict=True)
        ]

    inputs, outputs = joined([seen.inputs for seen in passes]), joined([seen.outputs for seen in passes])
    return Seen(inputs, outputs, passes[0].calls)


def _placed(wanted: Prints, seen: Seen) -> tuple[str, list[str]] | None:
    """Where a value is: the module that gives what is nearest, the first of several, or else the outermost ones that
    take it. What fits in all passes goes before what fits the first alone, as modules do that read a part of the rows.
    """
    for number in dict.fromkeys((len(wanted), 1)):
        given, taken = (
            [
                (path, distance(found[:number], wanted[:number]))
                for path, found in notes
                if seen.calls[path] == 1 and _alike(found[:number], wanted[:number])
            ]
            for notes in (seen.outputs, seen.inputs)
        )
        if given:
            return "output", [min(given, key=lambda each: each[1])[0]]
        paths = [path for path, _ in taken]
        outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
        if outermost:
            return "input", outermost
    return None


def _alike(ours: Prints, theirs: Prints) -> bool:
    """Whether the numbers are the same but for zeros, which rounding leaves what they are: a layer may add some."""
    return all(one[0] > 0 for one in ours) and distance(ours, theirs) <= SAME
