"""A model as one ONNX file: named plain tensors in and out, dynamic rows and text length.

The graph takes what :class:`~distill.preprocess.Preprocessor` gives and returns the final logits and the
embeddings; ids, views, targets and taps stay behind. Node names start with the module path
(``encoders.image.stem/Conv``), so that ``keep_float`` of the quantizer can name a part of the model.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from distill.contracts import CLEAN_VIEW, Batch, Outputs, UserError
from distill.predict import EMBEDDING
from distill.runs import atomic

MAX_FILE_BYTES = 2**31 - 1
"""A protobuf message, and so an ONNX file with its weights inside, is smaller than this."""

NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")

SCOPES_KEY = "pkg.torch.onnx.name_scopes"


def graph_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the exported graph's inputs for a batch, in the graph's order.

    For each modality, alphabetically: its tensors (``text``, then ``text_mask``), then ``text_present``.
    """
    named: dict[str, Tensor] = {}
    for modality in sorted(batch.present):
        if modality not in batch.inputs:
            raise UserError(f"the example batch has no {modality!r} input; export needs raw inputs, not encoded ones")
        named |= batch.inputs_of(modality)
        named[f"{modality}_present"] = batch.present[modality]
    return named


def graph_outputs(outputs: Outputs, *, embeddings: bool = True) -> dict[str, Tensor]:
    """Return the exported graph's outputs: final logits by task, then ``embedding_NAME``, each ``[B, ...]``.

    Heads of single modalities (keys with a dot) help in training only and are left out; so are embeddings if asked for.
    """
    named = {task: logits for task, logits in outputs.logits.items() if "." not in task}
    spoken = sorted(outputs.embeddings.items()) if embeddings else []
    return named | {f"{EMBEDDING}{name}": value for name, value in spoken}


class ExportModule(nn.Module):
    """A ``Batch -> Outputs`` model as a function of plain tensors.

    Args:
        model: the model.
        names: names of the tensors that :meth:`forward` takes, as :func:`graph_inputs` orders them.
        embeddings: return them too.
    """

    def __init__(self, model: nn.Module, names: list[str], *, embeddings: bool = True) -> None:
        """Wrap a model; its mode is left as it is."""
        super().__init__()
        self.model, self.names, self.embeddings = model, names, embeddings

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the values of :func:`graph_outputs`, in its order."""
        named = dict(zip(self.names, tensors, strict=True))
        present = {name.removesuffix("_present"): named.pop(name) for name in self.names if name.endswith("_present")}
        rows = tensors[0].shape[0]
        ids = torch.zeros(rows, dtype=torch.int64, device=tensors[0].device)
        outputs = self.model(Batch(ids, torch.full_like(ids, CLEAN_VIEW), named, present, {}))
        return tuple(graph_outputs(outputs, embeddings=self.embeddings).values())


def export_onnx(
    model: nn.Module, example: Batch, path: Path, *, opset: int = 20, embeddings: bool = True
) -> dict[str, Any]:
    """Write a model as one ONNX file and check it.

    Args:
        model: a ``Batch -> Outputs`` model; exported in eval mode, its modes are restored.
        example: one or more rows with the inputs and modalities that the graph is to have.
        path: the file to write; weights are inside.
        opset: version of the ONNX operators.
        embeddings: the graph gives them beside the logits.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape, dynamic dimensions by name), ``operators``
        (type -> count), ``opset`` and ``bytes``.

    Raises:
        UserError: the weights do not fit one file, or the example lacks a modality's raw input.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if size > MAX_FILE_BYTES:
        raise UserError(f"the model holds {size / 1e9:.2f} GB, one ONNX file at most 2.14 GB; export a smaller model")
    inputs = graph_inputs(_traceable(example))
    with exporting(model):
        with torch.no_grad():
            outputs = graph_outputs(model(_traceable(example)), embeddings=embeddings)
        program = torch.onnx.export(
            ExportModule(model, list(inputs), embeddings=embeddings).eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(tuple(_dynamic(name) for name in inputs),),
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _name_nodes(proto.graph)
    strip_build_traces(proto)
    onnx.checker.check_model(proto, full_check=True)
    with atomic(path) as temporary:
        onnx.save(proto, temporary)
    return describe(proto) | {"bytes": path.stat().st_size}


def extract_tower(path: Path, modality: str, target: Path) -> None:
    """Write the part of a graph that leads from one modality to its embedding, with the same nodes and weights.

    Args:
        path: the graph of a model without fusion.
        modality: which encoder.
        target: the file to write.
    """
    proto = onnx.load(path)
    output = f"{EMBEDDING}{modality}"
    inputs = [value.name for value in proto.graph.input if value.name.split("_")[0] == modality]
    part = onnx.utils.Extractor(proto).extract_model(inputs, [output])
    with atomic(target) as temporary:
        onnx.save(part, temporary)


def describe(proto: onnx.ModelProto) -> dict[str, Any]:
    """Return a graph's inputs, outputs (dtype and shape), operator counts and opset, as JSON values."""
    return {
        "inputs": {value.name: _dtype_and_shape(value) for value in proto.graph.input},
        "outputs": {value.name: _dtype_and_shape(value) for value in proto.graph.output},
        "operators": dict(sorted(Counter(node.op_type for node in proto.graph.node).items())),
        "opset": next(entry.version for entry in proto.opset_import if entry.domain == ""),
    }


def strip_build_traces(proto: onnx.ModelProto) -> None:
    """Drop what names the machine that built a graph, and what only takes space, in place.

    The exporter stores each node's Python stack, with file paths and source lines, as metadata; shapes of
    intermediate values are inferred again by every runtime.
    """
    _clear_texts(proto)
    del proto.graph.value_info[:]


def _clear_texts(message: Any) -> None:
    """Clear documentation and metadata of a protobuf message and of all messages inside it."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type:
            for part in [value] if hasattr(value, "ListFields") else value:
                _clear_texts(part)


def _dtype_and_shape(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return {"dtype": dtype, "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]}


def _dynamic(name: str) -> dict[int, str]:
    return {0: "batch", 1: "length"} if name in ("text", "text_mask") else {0: "batch"}


def two_rows(example: Batch) -> Batch:
    """Bring the example to 2 rows: the tracer fixes sizes of 0 and 1."""

    def rows(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor])[:2]

    inputs = {name: rows(tensor) for name, tensor in example.inputs.items()}
    present = {modality: rows(flags) for modality, flags in example.present.items()}
    return Batch(rows(example.ids), rows(example.views), inputs, present, {})


def _traceable(example: Batch) -> Batch:
    """Bring the example to 2 rows and 3 or more tokens: the tracer may join equal sizes, too."""
    batch = two_rows(example)
    inputs = dict(batch.inputs)
    for name in ("text", "text_mask"):
        if name in inputs and inputs[name].shape[1] < 3:
            inputs[name] = nn.functional.pad(inputs[name], (0, 3 - inputs[name].shape[1]))
    return batch._replace(inputs=inputs)


@contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while, without the exporters' warnings."""
    with _evaluating(model), _quiet():
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, then each module's own mode again (a frozen tower stays in eval)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's warnings and progress; its errors are exceptions and pass."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Name each node ``module.path/Operator``, numbered where a module has several."""
    used: Counter[str] = Counter()
    for node in graph.node:
        name = f"{_module_path(node)}/{node.op_type}".removeprefix("/")
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"


def _module_path(node: onnx.NodeProto) -> str:
    """The module that a node came from: its weight's owner (of Conv + BatchNorm the Conv), or the exporter's scope."""
    for name in node.input:
        if name.startswith("model.") and name.endswith(".weight"):
            return name.removeprefix("model.").removesuffix(".weight")
    entry = next((entry.value for entry in node.metadata_props if entry.key == SCOPES_KEY), "[]")
    *scopes, _operator = ast.literal_eval(entry) or [""]
    owner = str(scopes[-1]) if scopes else ""
    return owner.removeprefix("model.") if owner.startswith("model.") else ""
