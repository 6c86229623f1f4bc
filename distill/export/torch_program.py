"""A model as a program of ``torch.export`` (``.pt2``): what exporters convert.

A bundle's model it is not: torch's reader (seen in 2.14) unpickles what a file asks it to, evaluates its expressions of
sizes, calls the functions that its nodes name, and writes the names of its inputs into Python that it runs. So read no
program but one that this machine has just written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from distill.contracts import Batch
from distill.export.onnx import ExportModule, exporting, graph_inputs, graph_outputs, two_rows
from distill.runs import atomic

GRAPH_FILE = "graph.json"
"""An extra file of the archive: the names, types and shapes of what goes in and comes out."""
DTYPES = {
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.int64: "int64",
    torch.float32: "float32",
}


def export_program(
    model: torch.nn.Module, example: Batch, path: Path, *, rows: int | None = None, embeddings: bool = True
) -> dict[str, Any]:
    """Write a model as a program.

    Args:
        model: a ``Batch -> Outputs`` model; exported in eval mode, its modes are restored.
        example: some rows with the inputs and modalities that the program is to have; the length of its texts is that
            of all that the program reads.
        path: the file to write.
        rows: 1 for runtimes that run one row at a time; None for any number.
        embeddings: the program gives them beside the logits.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape, the number of rows by name) and ``bytes``.

    Raises:
        UserError: the example lacks a modality's raw input.
    """
    batch = two_rows(example)
    inputs = graph_inputs(batch)
    if rows is not None:
        inputs = {name: value[:rows] for name, value in inputs.items()}
    dynamic = (tuple({0: torch.export.Dim("batch")} for _ in inputs),) if rows is None else None
    with exporting(model):
        with torch.no_grad():
            outputs = graph_outputs(model(batch), embeddings=embeddings)
        graph = {"inputs": _described(inputs), "outputs": _described(outputs)}
        module = ExportModule(model, list(inputs), embeddings=embeddings).eval()
        program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=dynamic)
        _strip_build_traces(program)
        with atomic(path) as temporary:
            named = temporary.with_suffix(path.suffix)  # torch refuses other endings
            torch.export.save(program, named, extra_files={GRAPH_FILE: json.dumps(graph)})
            named.replace(temporary)
    return {**graph, "bytes": path.stat().st_size}


def read_program(path: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    """Read a program that :func:`export_program` wrote on this machine: torch runs code that a file may hold.

    Returns:
        The program, and its ``inputs`` and ``outputs`` (name -> dtype and shape).
    """
    extra = {GRAPH_FILE: ""}
    program = torch.export.load(path, extra_files=extra)
    return program, json.loads(extra[GRAPH_FILE])


def in_plain_layout(program: ExportedProgram, graph: Mapping[str, Any]) -> ExportedProgram:
    """Return a program of one row without ``channels_last`` tensors: the runtimes choose layouts, and some refuse it.

    Args:
        program: as :func:`export_program` writes it.
        graph: its inputs and outputs.
    """
    module = program.module()
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, buffer)  # persistent: ExecuTorch refuses the others
    for node in module.graph.nodes:
        layouts = (torch.channels_last, torch.channels_last_3d)
        node.args = tuple(torch.contiguous_format if each in layouts else each for each in node.args)
        if node.kwargs.get("memory_format") in layouts:
            node.kwargs = {**node.kwargs, "memory_format": torch.contiguous_format}
    module.recompile()
    return torch.export.export(module, example_of(graph))


def example_of(graph: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return one row of zeros for each input of a program."""
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    return tuple(
        torch.zeros([1, *value["shape"][1:]], dtype=dtypes[value["dtype"]]) for value in graph["inputs"].values()
    )


def _strip_build_traces(program: ExportedProgram) -> None:
    """Drop the example, which would be pickled, and the Python stack of each node, which names the build machine."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _described(tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": DTYPES[value.dtype], "shape": ["batch", *value.shape[1:]]} for name, value in tensors.items()
    }
