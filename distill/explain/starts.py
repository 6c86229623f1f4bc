"""Where gradients can begin in an encoder: a float tensor behind what cannot be differentiated, and its baseline.

Bytes, samples and token ids have no gradient. Encoders turn them into floats themselves, so a float tensor may take
the place of an input, or of what the module gives that makes one: a table of embeddings, a spectrogram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.contracts import Batch
from distill.explain.scores import log_odds
from distill.formats import TABULAR, TEXT

GREY = 127.5
"""Baseline of pixels: neither black nor white parts of a picture are overlooked."""
Forward = Callable[..., Tensor]


class NoStartError(Exception):
    """An encoder has no tensor from which gradients could begin; the text says why."""


@dataclass(frozen=True)
class Start:
    """A float tensor that takes another one's place.

    Attributes:
        place: the name of an input, or the module whose output it replaces.
        value: what lies there for a row, [1, ...].
        baseline: what lies there where there is nothing to see, hear or read, of the same shape.
        about: what the baseline is, in words.
    """

    place: str | nn.Module
    value: Tensor
    baseline: Tensor
    about: str


@dataclass(frozen=True)
class Call:
    """What a module was given and what it gave, a tensor or the first of several."""

    module: nn.Module
    given: Any
    gave: Tensor


def calls(encoder: nn.Module, inputs: dict[str, Tensor], modules: Sequence[nn.Module]) -> list[Call]:
    """Run an encoder, and return the calls of some modules that gave floats, in order of their ends."""
    found: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.is_floating_point():
            found.append(Call(module, args[0] if args else None, first.detach().clone()))

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.no_grad():
            encoder(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def starts_of(
    encoder: nn.Module, inputs: dict[str, Tensor], modality: str, *, content: Tensor | None = None, numbers: int = 0
) -> list[Start]:
    """Find where the gradients of a modality begin.

    Args:
        encoder: the modality's.
        inputs: of one row that has the modality.
        modality: its name.
        content: bool [L], the tokens of a text that its words have; others stay in the baseline as they are.
        numbers: N of a table, as in :data:`~distill.contracts.INPUTS`.

    Raises:
        NoStartError: there is none.
    """
    if modality == TEXT:
        assert content is not None
        return [_embedded_text(encoder, inputs, content)]
    if modality == "audio":
        return [_spectrogram(encoder, inputs)]
    if modality == TABULAR:
        return _columns(encoder, inputs, numbers)
    value = inputs[modality].float()
    if modality == "series":
        return [Start(modality, value, torch.zeros_like(value), "the mean of the training rows")]
    return [Start(modality, value, torch.full_like(value, GREY), "mid-grey")]


def forward_from(
    model: nn.Module, batch: Batch, task: str, label: int, places: Sequence[str | nn.Module]
) -> Callable[..., Tensor]:
    """A function of the tensors at some places, [B, ...] each, to the log-odds [B] of a class for one row's batch."""

    def forward(*values: Tensor) -> Tensor:
        rows = len(values[0])
        copies = _repeated(batch, rows)
        own = {place: value for place, value in zip(places, values, strict=True) if isinstance(place, str)}
        inner = {place: value for place, value in zip(places, values, strict=True) if isinstance(place, nn.Module)}
        with _replaced(inner):
            logits = model(copies._replace(inputs={**copies.inputs, **own})).logits[task]
        return log_odds(logits, label)

    return forward


def _embedded_text(encoder: nn.Module, inputs: dict[str, Tensor], content: Tensor) -> Start:
    text, mask = inputs["text"], inputs["text_mask"]
    for call in calls(encoder, inputs, [module for module in encoder.modules() if isinstance(module, nn.Embedding)]):
        ids = call.given
        if ids.ndim == 2 and ids.shape[1] >= text.shape[1] and bool((ids[:, : text.shape[1]] == text)[mask].all()):
            baseline = call.gave.clone()
            baseline[0, : len(content)][content] = 0
            return Start(call.module, call.gave, baseline, "zeros in place of the embeddings of words")
    raise NoStartError("its encoder looks tokens up in no torch.nn.Embedding")


def _spectrogram(encoder: nn.Module, inputs: dict[str, Tensor]) -> Start:
    children = list(encoder.children())
    found = calls(encoder, inputs, children)
    if not found:
        raise NoStartError("its encoder has no module that makes floats of samples")
    silence = {**inputs, "audio": torch.zeros_like(inputs["audio"])}
    quiet = next(call.gave for call in calls(encoder, silence, children) if call.module is found[0].module)
    return Start(found[0].module, found[0].gave, quiet, "silence of the same length")


def _columns(encoder: nn.Module, inputs: dict[str, Tensor], numbers: int) -> list[Start]:
    table = inputs[TABULAR]
    plain, unknown = table.clone(), table.clone()
    plain[:, : 2 * numbers] = 0
    unknown[:, 2 * numbers :] = 0
    starts = [Start(TABULAR, table, plain, "the mean of the training rows, and categories that are unknown")]
    if table.shape[1] == 2 * numbers:
        return starts
    tables = [module for module in encoder.modules() if isinstance(module, nn.Embedding)]
    found = calls(encoder, inputs, tables)
    if not found or found[0].gave.shape[:2] != (1, table.shape[1] - 2 * numbers):
        raise NoStartError("its encoder looks categories up in no torch.nn.Embedding")
    baseline = calls(encoder, {**inputs, TABULAR: unknown}, tables)[0].gave
    return [*starts, Start(found[0].module, found[0].gave, baseline, starts[0].about)]


def _repeated(batch: Batch, rows: int) -> Batch:
    def each(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _copies(tensor, rows) for name, tensor in tensors.items()}

    return Batch(_copies(batch.ids, rows), _copies(batch.views, rows), each(batch.inputs), each(batch.present), {})


def _copies(tensor: Tensor, rows: int) -> Tensor:
    return tensor.expand(rows, *tensor.shape[1:]).contiguous()


@contextmanager
def _replaced(values: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Let modules give other tensors, in the place of what they give or of the first part of it."""

    def giving(value: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda module, args, output: (value, *output[1:]) if isinstance(output, tuple) else value

    hooks = [module.register_forward_hook(giving(value)) for module, value in values.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
