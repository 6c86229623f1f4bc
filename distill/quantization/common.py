"""What all precisions share: the prepared float graph, names of operators that stay as they are, and clean files."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto
from onnxruntime.quantization.shape_inference import quant_pre_process

from distill.contracts import UserError
from distill.runs import atomic

WEIGHTED_OPERATORS = ("Conv", "Gemm", "MatMul")
STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""

Feeds = Mapping[str, NDArray[Any]]


def prepared(fp32_path: Path, keep_float: list[str]) -> ModelProto:
    """Return the float graph with its constants folded, as quantizers want it.

    Raises:
        UserError: a ``keep_float`` entry that matches no node.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "prepared.onnx"
        quant_pre_process(str(fp32_path), str(path), skip_symbolic_shape=True)
        model = onnx.load(path)
    for part in keep_float:
        if not any(part in node.name for node in model.graph.node):
            known = {node.name.rpartition("/")[0] for node in model.graph.node if node.op_type in WEIGHTED_OPERATORS}
            names = ", ".join(sorted(known))
            raise UserError(f"export.quantize.keep_float: no node's name has {part!r} in it; names: {names}")
    return model


def named(graph: GraphProto, parts: Iterable[str]) -> set[str]:
    """Names of the nodes that have one of these parts in their name."""
    wanted = list(parts)
    return {node.name for node in graph.node if any(part in node.name for part in wanted)}


def as_product(name: str) -> str:
    """The name that onnxruntime gives a Gemm's matrix product when it splits it from its bias."""
    return f"{name}_MatMul"


def has_constant(node: NodeProto, constants: Collection[str]) -> bool:
    """Whether a node multiplies with a weight: a product of two activations has none."""
    return any(name in constants for name in node.input[:2])


def constants_of(graph: GraphProto) -> set[str]:
    """Names of the graph's weights."""
    return {tensor.name for tensor in graph.initializer}


def finish(model: ModelProto, out_path: Path) -> None:
    """Check a graph and write it without what quantizers leave behind and no runtime reads."""
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    del model.graph.value_info[:]
    used = {node.domain for node in model.graph.node}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    onnx.checker.check_model(model, full_check=used <= set(STANDARD))
    with atomic(out_path) as temporary:
        onnx.save(model, temporary)


def sizes(fp32_path: Path, out_path: Path) -> dict[str, Any]:
    """``bytes`` of a graph that was written, and ``ratio`` of them to those of the float graph."""
    size = out_path.stat().st_size
    return {"bytes": size, "ratio": size / fp32_path.stat().st_size}


def counted(nodes: Iterable[str]) -> dict[str, int]:
    """How often each type of operator occurs, by name."""
    return dict(sorted(Counter(nodes).items()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the quantizers' prints and hints off the screen; their errors are exceptions and pass."""
    root, level = logging.getLogger(), logging.getLogger().level
    try:
        root.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
