"""From a model's config to the model: checked at plan time, built when a stage needs it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill.builders import build_part, check_part
from distill.config import ModelConfig, TeacherConfig, nearest
from distill.contracts import CLEAN_VIEW, Batch, UserError
from distill.data.loader import InputSpec
from distill.data_config import DataConfig, Part
from distill.decision import FUSED
from distill.dual import DualEncoder
from distill.exchange import build_exchange, check_exchange
from distill.formats import TABULAR, TEXT, formats_of
from distill.fusion import FUSIONS
from distill.multimodal import Encoder, MultimodalModel, Reader
from distill.targets import CAPTIONING, KINDS, LAST, Task
from distill.tasks import HEADS
from distill.token_rows import TokenRows

DEFAULT_HEADS = {kind: "decoder" if kind == CAPTIONING else "linear" for kind in KINDS}
Registry = Mapping[str, Callable[..., Encoder]]
Given = Mapping[str, Mapping[str, Any]]
AReader = TypeVar("AReader", bound=Reader)
Model = MultimodalModel | DualEncoder


def told_by_data(config: ModelConfig, registry: Registry, data: DataConfig) -> dict[str, dict[str, Any]]:
    """Modality -> the parameters that its encoder asks for and the data's formats know, such as a sampling rate."""
    formats, found = formats_of(data), {}
    for name, part in config.encoders.items():
        if name in formats and part.type in registry:
            accepted = inspect.signature(registry[part.type]).parameters
            found[name] = {key: value for key, value in formats[name].parameters.items() if key in accepted}
    return found


def check_model(config: ModelConfig, registry: Registry, where: str, tasks: list[str], given: Given) -> None:
    """Check every part of a model against its builder's signature, without building.

    Args:
        config: the model.
        registry: encoder type -> class.
        where: dotted path of the model in the recipe.
        tasks: the tasks of the data.
        given: modality -> encoder parameters that the pipeline adds.

    Raises:
        UserError: an unknown type, parameter or task.
    """
    for name, part in config.encoders.items():
        reads = getattr(registry.get(part.type), "reads", name)
        if reads != name:
            able = [kind for kind, builder in registry.items() if getattr(builder, "reads", None) == name]
            raise UserError(
                f"{where}.encoders.{name}: {part.type} reads {reads}; for {name} {nearest(part.type, able)}"
            )
        check_part(registry, part, f"{where}.encoders.{name}", given.get(name, {}))
    if config.fusion is None:
        _check_unfused(config, where)
        return
    check_exchange(config, registry, where)
    check_part(FUSIONS, config.fusion, f"{where}.fusion", ("modalities",))
    plain = FUSIONS[config.fusion.type].plain
    if plain and len(config.encoders) > 1:
        raise UserError(
            f"{where}.fusion: {config.fusion.type} is for models of one modality, and {where} reads "
            f"{', '.join(config.encoders)}; use concat"
        )
    for name, part in config.encoders.items():
        if part.params.get("classifier") and not plain:
            raise UserError(
                f"{where}.encoders.{name}.classifier reads the encoder's own vector, which {config.fusion.type} "
                f"changes; set {where}.fusion to {{type: pooled}}"
            )
    for field in ("head_weights", "decision"):
        if not config.unimodal_heads and getattr(config, field) != ModelConfig.model_fields[field].default:
            raise UserError(f"{where}.{field}: there is one head a task; set {where}.unimodal_heads or leave it out")
    for name, weight in config.head_weights.items():
        if name not in (*config.encoders, FUSED):
            raise UserError(f"{where}.head_weights: no head {name!r}; {nearest(name, [*config.encoders, FUSED])}")
        if name != FUSED and not weight and not config.head_weights.get(FUSED, 1.0):
            raise UserError(
                f"{where}.head_weights.{name} is 0, and rows that have {name} alone would get no answer; give it a "
                "weight above 0"
            )
    for task, part in config.heads.items():
        if task not in tasks:
            raise UserError(f"{where}.heads: the data has no task {task!r}; {nearest(task, tasks)}")
        check_part(HEADS, part, f"{where}.heads.{task}", ("in_dim", "num_outputs", "length"))


def _check_unfused(config: ModelConfig, where: str) -> None:
    """Encoders of one embedding space have nothing behind them that answers tasks."""
    for name in (
        "exchange",
        "heads",
        "decision",
        "head_weights",
        "modality_dropout",
        "dropout",
        "members",
        "pretrain",
        "class_names",
    ):
        field = type(config).model_fields.get(name)
        if field is not None and getattr(config, name) != field.default:
            raise UserError(f"{where}.{name} is for models with fusion, and {where}.fusion is null; leave it out")
    if len(config.encoders) != 2:
        raise UserError(
            f"{where}.encoders: without fusion a model has two encoders of one embedding space, got "
            f"{len(config.encoders)}; add or remove some, or give {where}.fusion"
        )


def build_model(
    config: ModelConfig, registry: Registry, tasks: Mapping[str, Task], where: str, given: Given | None = None
) -> Model:
    """Build a model with its initial weights.

    Args:
        config: the model.
        registry: encoder type -> class.
        tasks: those of the data.
        where: dotted path of the model in the recipe, for messages.
        given: modality -> encoder parameters that the caller adds.

    Raises:
        UserError: as :func:`check_model`, or a builder refuses a value.
    """
    added = given or {}
    encoders = {
        name: build_part(registry, part, f"{where}.encoders.{name}", **added.get(name, {}))
        for name, part in config.encoders.items()
    }
    if config.fusion is None:
        return DualEncoder(encoders, config.embedding_dim)
    widths = {name: encoder.out_dim for name, encoder in encoders.items()}
    members = config.members if isinstance(config, TeacherConfig) else 1
    build = partial(_build_reader, config=config, tasks=tasks, widths=widths, where=where)
    others = [build(partial(Reader, widths)) for _ in range(members - 1)]
    exchange = build_exchange(config, encoders, where)
    model = build(partial(MultimodalModel, encoders, others=others, exchange=exchange))
    for name, encoder in encoders.items():
        if getattr(encoder, "own_classifier", None) is not None:
            _take_classifier(encoder, model, f"{where}.encoders.{name}.classifier")
    return model


def _take_classifier(encoder: Any, model: MultimodalModel, where: str) -> None:
    """Give the only task's head what the encoder's weights were trained with."""
    heads: dict[str, Any] = dict(model.heads)
    theirs = len(encoder.own_classifier["weight"])
    for task, head in heads.items():
        if len(heads) > 1 or head.linear.out_features != theirs:
            raise UserError(
                f"{where}: it tells {theirs} classes of one task, and the data has {head.linear.out_features} of task "
                f"{task!r}, one of {len(heads)}; name other data, or set it to false"
            )
        head.linear.load_state_dict(encoder.own_classifier)
    encoder.own_classifier = None


def _build_reader(
    make: Callable[..., AReader],
    config: ModelConfig,
    tasks: Mapping[str, Task],
    widths: Mapping[str, int],
    where: str,
) -> AReader:
    """Build what reads encoders, itself with them or not."""
    assert config.fusion is not None
    modalities = list(config.encoders)
    fusion = build_part(FUSIONS, config.fusion, f"{where}.fusion", modalities=modalities)
    dim = widths[modalities[0]] if fusion.plain else int(config.fusion.params["dim"])
    parts = config.heads or {name: Part(type=DEFAULT_HEADS[task.kind]) for name, task in tasks.items()}

    def head(task: str, part: Part) -> Any:
        given: dict[str, int] = {"in_dim": dim, "num_outputs": len(tasks[task].names)}
        given |= {"length": tasks[task].length} if tasks[task].kind == CAPTIONING else {}
        return build_part(HEADS, part, f"{where}.heads.{task}", **given)

    answering = {task: part for task, part in parts.items() if tasks[task].kind != CAPTIONING}
    unimodal = {task: {name: head(task, part) for name in modalities} for task, part in answering.items()}
    return make(
        fusion,
        {task: head(task, part) for task, part in parts.items()},
        unimodal if config.unimodal_heads else {},
        dim=dim,
        embedding_dim=config.embedding_dim,
        head_weights=config.head_weights,
        decision=config.decision,
        modality_dropout=config.modality_dropout,
        dropout=config.dropout,
    )


def input_spec(model: Model) -> InputSpec:
    """What a model reads: its modalities, and the tokenizer of its text encoder."""
    media = tuple(name for name in model.encoders if name != TEXT)
    if TEXT not in model.encoders:
        return InputSpec(media)
    text: Any = model.encoders[TEXT]
    rows = TokenRows(text.token_rows) if text.token_rows else None
    return InputSpec(media, text.tokenizer_file, text.max_length, text.pad_id, rows)


def example_batch(
    spec: InputSpec, data: DataConfig, *, rows: int = 3, length: int = 5, tasks: Mapping[str, Task] | None = None
) -> Batch:
    """A small synthetic batch of the right shapes, for tracing and for finding the shapes of outputs.

    Args:
        spec: what the model reads.
        data: the recipe's, which says how large images are, and the like.
        rows: B, at least 2 for tracing.
        length: tokens a text.
        tasks: those with captions have targets, so that a head is told what to write and all it gives has a gradient.
    """
    inputs: dict[str, Tensor] = {}
    present: dict[str, Tensor] = {}
    formats = formats_of(data)
    for modality in spec.media:
        for name, (dtype, shape) in formats[modality].arrays.items():
            values = torch.arange(rows * math.prod(shape)).remainder(251).view(rows, *shape)
            if name.endswith("_length"):
                values = torch.full((rows,), formats[modality].arrays[modality][1][0])
            elif modality == TABULAR:
                values = values.remainder(2)  # flags and codes among them
            inputs[name] = values.to(getattr(torch, dtype))
        present[modality] = torch.ones(rows, dtype=torch.bool)
    if spec.tokenizer is not None:
        inputs["text"] = torch.arange(rows * length).view(rows, length) % 7 + 1
        inputs["text_mask"] = torch.ones(rows, length, dtype=torch.bool)
        present["text"] = torch.ones(rows, dtype=torch.bool)
    written = {name: task.length for name, task in (tasks or {}).items() if task.kind == CAPTIONING}
    targets = {name: torch.full((rows, most), LAST) for name, most in written.items()}
    return Batch(torch.arange(rows), torch.full((rows,), CLEAN_VIEW), inputs, present, targets)
