"""A program of one row as a Core ML package, in float32 or float16.

Core ML takes float32 and int32 tensors: whole numbers and flags come in as int32, and the program makes of them what
the model reads. The package's files are those of :class:`~distill.runtimes.coreml.CoreMl`; they hold neither dates nor
drawn identifiers, so the same model gives the same bytes. What coremltools (9.0) cannot read of a program is written in
other operators first: recurrent layers step by step, and with whole numbers where it would make
floats of them.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import uuid
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram, default_decompositions

from distill.export.subprocesses import answer
from distill.export.torch_program import DTYPES, example_of, in_plain_layout, read_program
from distill.runtimes import RUNTIMES
from distill.runtimes.base import missing
from distill.runtimes.coreml import MANIFEST, MODEL, PACKAGE, ROOT, WEIGHTS_FOLDER, operations

ATEN = torch.ops.aten
WHOLE = (ATEN.linear.default, ATEN.scaled_dot_product_attention.default, ATEN.layer_norm.default)
"""Operators that coremltools knows as one, which a program in core operators would have in parts."""
SPELLED = {
    ATEN.__and__.Tensor: ATEN.logical_and.default,
    ATEN.bitwise_and.Tensor: ATEN.logical_and.default,
    ATEN.bitwise_not.default: ATEN.logical_not.default,
    ATEN.__or__.Tensor: ATEN.logical_or.default,
    ATEN.bitwise_or.Tensor: ATEN.logical_or.default,
}
"""Operators on flags -> the same under a name that coremltools has."""
CLOSE = 1e-5
"""Difference that other operators for the same computation may make, relative to the largest number."""


class _Cast(torch.nn.Module):
    """A program that takes float32 and int32 alone."""

    def __init__(self, inner: torch.nn.Module, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        self.inner, self.dtypes = inner, dtypes

    def forward(self, *values: Tensor) -> Any:
        return self.inner(*(_as(value, dtype) for value, dtype in zip(values, self.dtypes, strict=True)))


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return value
    return value != 0 if dtype == torch.bool else value.to(dtype)


def convert(source: Path, out: Path, *, precision: str = "fp32") -> dict[str, Any]:
    """Write a program as a package; nothing is run by Core ML.

    Args:
        source: a program of one row, as :func:`distill.export.torch_program.export_program` writes it.
        out: the package's first file; its folder, which ends in ``.mlpackage``, is made.
        precision: ``fp32``, or ``fp16`` for weights and values of 16 bits; inputs and outputs are float32 in both.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape, as the program has them) and ``operators`` (type -> count).

    Raises:
        UserError: a package is missing.
        ValueError: written in other operators the program says something else.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # each import looks for libraries of macOS
    try:
        import coremltools
    except ImportError as error:
        raise missing(RUNTIMES["coreml"], error) from error
    program, graph = read_program(source)
    program = in_plain_layout(program, graph)
    ready = prepared(program, graph)
    chosen = coremltools.precision.FLOAT16 if precision == "fp16" else coremltools.precision.FLOAT32
    inputs = [
        coremltools.TensorType(name=name, shape=tuple(value.shape), dtype=_numpy(value))
        for name, value in zip(graph["inputs"], _narrow(example_of(graph)), strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # -1e30 in masks becomes -inf in fp16, as it should
        model = coremltools.convert(
            ready,
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.iOS16,
            compute_precision=chosen,
            inputs=inputs,
            outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in graph["outputs"]],
            skip_model_load=True,
        )
    package = out.parent
    _save(model, package)
    return {**graph, "operators": dict(sorted(Counter(kind for kind, _ in operations(package)).items()))}


def prepared(program: ExportedProgram, graph: Mapping[str, Any]) -> ExportedProgram:
    """Return a program with the inputs and operators that coremltools reads.

    Args:
        program: of one row.
        graph: its inputs and outputs.

    Raises:
        ValueError: it says something else than the program, of a row of made-up numbers.
    """
    kinds = {name: dtype for dtype, name in DTYPES.items()}
    inner = program.module()
    wrapped = _Cast(inner, [kinds[value["dtype"]] for value in graph["inputs"].values()])
    table = default_decompositions()
    for operator in WHOLE:
        table.pop(operator, None)
    ready = torch.export.export(wrapped, _narrow(example_of(graph))).run_decompositions(table)
    _spell(ready.graph_module)
    row = _narrow(_made_up(graph))
    with torch.no_grad():
        pairs = zip(ready.module()(*row), wrapped(*row), strict=True)
        for name, (found, expected) in zip(graph["outputs"], pairs, strict=True):
            limit = CLOSE * max(1.0, float(expected.abs().max()))
            if not float((found - expected).abs().max()) <= limit:
                raise ValueError(f"output {name!r} differs by more than {limit:.1g} in operators for Core ML")
    return ready


def _spell(module: torch.fx.GraphModule) -> None:
    """Rename operators on flags, and keep whole numbers whole: coremltools makes floats of sums of flags and of clamped
    numbers, and refuses them as indices.
    """
    for node in list(module.graph.nodes):
        read = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None
        flags = read is not None and getattr(read.meta.get("val"), "dtype", None) == torch.bool
        if flags and node.target in SPELLED:
            node.target = SPELLED[node.target]
        if read is not None and flags and node.target in (ATEN.sum.dim_IntList, ATEN.sum.default):
            _cast(module, node, read)
        if node.target is ATEN.gather.default:
            _cast(module, node, node.args[2])
    module.recompile()


def _cast(module: torch.fx.GraphModule, node: torch.fx.Node, read: torch.fx.Node) -> None:
    """Let an operator read one of its inputs as whole numbers."""
    with module.graph.inserting_before(node):
        whole = module.graph.call_function(ATEN._to_copy.default, (read,), {"dtype": torch.int64})
    whole.meta = {**read.meta, "val": read.meta["val"].to(torch.int64)}
    node.replace_input_with(read, whole)


def _narrow(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value if value.dtype == torch.float32 else value.to(torch.int32) for value in values)


def _made_up(graph: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """A row in which all modalities are present and of half their length."""
    torch.manual_seed(0)
    values = []
    for name, zeros in zip(graph["inputs"], example_of(graph), strict=True):
        if name == "text_mask":
            values.append((torch.arange(zeros.shape[1]) < (zeros.shape[1] + 1) // 2)[None])
        elif zeros.dtype == torch.bool:
            values.append(torch.ones_like(zeros))
        elif name.endswith("_length"):
            longest = graph["inputs"][name.removesuffix("_length")]["shape"][1]
            values.append(torch.full_like(zeros, (longest + 1) // 2))
        elif zeros.dtype == torch.float32:
            values.append(torch.randn_like(zeros))
        else:
            values.append(torch.randint(0, 2 if zeros.dtype == torch.int64 else 128, zeros.shape).to(zeros.dtype))
    return tuple(values)


def _numpy(value: Tensor) -> type:
    return np.float32 if value.dtype == torch.float32 else np.int32


def _save(model: Any, package: Path) -> None:
    """Write the package's files alone, with identifiers that do not change."""
    spec = model.get_spec()
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / PACKAGE
        model.save(str(whole))
        shutil.rmtree(package, ignore_errors=True)
        for file in RUNTIMES["coreml"].files:
            place = package.parent / file
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole.parent / file, place)
    (package.parent / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    (package.parent / MANIFEST).write_text(json.dumps(_manifest(), indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _manifest() -> dict[str, Any]:
    """As coremltools writes it again whenever it opens a package: else that would change a bundle's file."""
    items = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, path)): {
            "author": "com.apple.CoreML",
            "description": f"CoreML Model {what}",
            "name": Path(path).name,
            "path": path,
        }
        for what, path in (("Specification", ROOT), ("Weights", WEIGHTS_FOLDER))
    }
    return {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": next(iter(items))}


if __name__ == "__main__":
    answer(convert)
