"""One model before one row: its answer, and all that explains it, as numbers and as pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distill.contracts import Batch
from distill.explain import pictures
from distill.explain.attention import Paid, attention_layers, fusion_attention, received
from distill.explain.gradients import enlarged, grad_cam, integrated_gradients, last_map
from distill.explain.inside import condensed, drawn
from distill.explain.scores import contributions
from distill.explain.starts import NoStartError, Start, forward_from, starts_of
from distill.formats import TABULAR, TEXT
from distill.layouts import IMAGE, grid_of
from distill.multimodal import MultimodalModel

SCORE = "log-odds of the class that the model answers, log p - log(1 - p)"
ENCODERS = "encoders."


@dataclass(frozen=True)
class Panel:
    """A part of the page.

    Attributes:
        name: of its picture's file, such as ``image-grad-cam``.
        title: what it shows.
        note: a sentence on it.
        picture: if it is one.
        words: of a text, each with its share of the strongest one, in [-1, 1].
        read: the words' shares are of attention, which speaks neither for nor against an answer.
    """

    name: str
    title: str
    note: str = ""
    picture: Image.Image | None = None
    words: list[tuple[str, float]] = field(default_factory=list)
    read: bool = False


@dataclass(frozen=True)
class Explained:
    """What explains an answer: JSON values, and what is shown of them."""

    numbers: dict[str, Any]
    panels: list[Panel]


@dataclass(frozen=True)
class Subject:
    """A model before a row.

    Attributes:
        model: in eval mode, its parameters without gradients.
        batch: the row alone, with raw inputs: no kept outputs of frozen towers.
        task: which answer.
        words: of its text; none where it has none.
        word_of: int64 [L], the word of each token that the model reads, -1 for special ones.
        columns: names of the numbers and of the categories of a table.
    """

    model: MultimodalModel
    batch: Batch
    task: str
    words: list[str] = field(default_factory=list)
    word_of: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @cached_property
    def present(self) -> list[str]:
        """The modalities that the model reads and the row has."""
        return [name for name in self.model.encoders if bool(self.batch.present[name][0])]

    def answer(self, modalities: Collection[str]) -> Tensor:
        """Logits [C] with only some modalities present."""
        hidden = {name: mask & (name in modalities) for name, mask in self.batch.present.items()}
        with torch.no_grad():
            return self.model(self.batch._replace(present=hidden)).logits[self.task][0]


def explain_row(subject: Subject, classes: list[str]) -> Explained:
    """Explain a model's answer for a row.

    Args:
        subject: the model and the row.
        classes: names of the task's classes.

    Raises:
        UserError: captum is not installed.
    """
    found = contributions(subject.answer, subject.present, list(subject.model.encoders))
    label = found.pop("label")
    numbers: dict[str, Any] = {
        "answer": classes[label],
        "probability": found["probability"]["all"],
        "contributions": found,
        "inputs": {},
    }
    odds = found["log_odds"]
    note = f"log-odds: {odds['nothing']:+.2f} with nothing, {odds['all']:+.2f} with all; values add up to the change"
    panels = [Panel("contributions", "What each modality adds (Shapley values)", note, pictures.bars(odds["values"]))]
    for modality in subject.model.encoders:
        if modality in subject.present:
            one = _explain_input(subject, modality, label)
        else:
            one = Explained({"why_not": "the row lacks it, so that it adds exactly 0"}, [])
        numbers["inputs"][modality] = one.numbers
        panels += one.panels
    attention = _explain_attention(subject)
    numbers["attention"] = attention.numbers
    return Explained(numbers, [*panels, *attention.panels])


def _explain_input(subject: Subject, modality: str, label: int) -> Explained:
    """Integrated gradients of one modality's input, and Grad-CAM where an image's encoder ends in a map."""
    encoder: Any = subject.model.encoders[modality]
    inputs = subject.batch.inputs_of(modality)
    content = torch.from_numpy(subject.word_of >= 0) if modality == TEXT else None
    try:
        starts = starts_of(encoder, inputs, modality, content=content, numbers=len(subject.columns[0]))
    except NoStartError as error:
        return Explained({"why_not": str(error)}, [])
    forward = forward_from(subject.model, subject.batch, subject.task, label, [start.place for start in starts])
    found = integrated_gradients(forward, starts)
    values = condensed(modality, found.values, inputs, starts, subject.word_of, subject.words, subject.columns)
    numbers: dict[str, Any] = {
        "integrated_gradients": {
            "baseline": starts[0].about,
            "change": found.change,
            "error": found.error,
            "steps": found.steps,
            **values,
        }
    }
    note = f"against {starts[0].about}: {found.change:+.2f} log-odds; the sum misses that by {abs(found.error):.2g}"
    panel = _panel(modality, found.values, inputs, values, note, starts)
    panels = [panel]
    if modality == IMAGE:
        exchanging = subject.model.exchange is not None
        layer = None if exchanging else last_map(encoder, inputs)
        if layer is None:
            why = "the tokens of its encoder are not the positions of a feature map"
            other = (
                "its last feature map is changed by other modalities (exchange), so no module of it gives the tokens"
            )
            numbers["grad_cam"] = {"why_not": other if exchanging else why}
        else:
            heat = grad_cam(forward, layer, starts[0].value)
            numbers["grad_cam"] = {"map": heat.tolist()}
            pixels = inputs[IMAGE][0].numpy()
            over = pictures.over_image(pixels, enlarged(heat, pixels.shape[1:]).numpy())
            panels.insert(
                0, Panel("image-grad-cam", "Image: Grad-CAM", "where the last feature map speaks for it", over)
            )
    return Explained(numbers, panels)


def _panel(
    modality: str,
    values: list[Tensor],
    inputs: Mapping[str, Tensor],
    shown: Mapping[str, Any],
    note: str,
    starts: list[Start],
) -> Panel:
    title = f"{modality.capitalize()}: integrated gradients"
    if modality == TEXT:
        sums = np.array([word["value"] for word in shown["words"]])
        words = [word["word"] for word in shown["words"]]
        return Panel("text", title, note, words=list(zip(words, pictures.scaled(sums).tolist(), strict=True)))
    if modality == TABULAR:
        return Panel("tabular", title, note, pictures.bars(shown["columns"]))
    return Panel(f"{modality}-integrated-gradients", title, note, drawn(modality, values[0], inputs, starts[0]))


def _explain_attention(subject: Subject) -> Explained:
    """What the fusion's attention reads, and that of the last attention layer of each encoder."""
    paid = fusion_attention(subject.model, subject.batch)
    fusion = [
        {
            "layer": one.layer,
            "reader": one.reader,
            "shares": one.shares,
            "tokens": {name: weights.tolist() for name, weights in one.tokens.items()},
        }
        for one in paid
    ]
    panels = []
    if paid:
        read = list(dict.fromkeys(name for one in paid for name in one.shares))
        table = np.array([[one.shares.get(name, np.nan) for name in read] for one in paid])
        note = "rounds of the fusion: who reads (rows) whom (columns)"
        rows = [_round(one) for one in paid]
        panels.append(Panel("fusion-attention", "Fusion: attention", note, pictures.matrix(rows, read, table)))
    layers = {
        layer.path.split(".")[1]: layer
        for layer in attention_layers(subject.model, subject.batch)
        if layer.path.startswith(ENCODERS) and layer.path.split(".")[1] in subject.present
    }
    tokens = {f"{ENCODERS}{name}": (layer.path, received(layer)) for name, layer in layers.items()}
    tokens |= {f"fusion by {one.reader}: {name}": (one.layer, w) for one in paid for name, w in one.tokens.items()}
    for title, (path, weights) in tokens.items():
        modality = title.removeprefix(ENCODERS).rpartition(" ")[2]
        panel = _attention_panel(subject, modality, title, path, weights)
        if panel is not None and modality in subject.present:
            panels.append(panel)
    encoders = {name: {"layer": layer.path, "tokens": received(layer).tolist()} for name, layer in layers.items()}
    numbers: dict[str, Any] = {"fusion": fusion, "encoders": encoders}
    if not fusion and not encoders:
        numbers["why_not"] = "neither the fusion nor an encoder of what the row has calls torch's attention operator"
    return Explained(numbers, panels)


def _attention_panel(subject: Subject, modality: str, title: str, path: str, weights: Tensor) -> Panel | None:
    """The weight of each token over a text's words or an image; None where tokens are neither."""
    name = title.removeprefix(ENCODERS).replace(": ", "-").replace(" ", "-") + "-attention"
    title = f"{title.removeprefix(ENCODERS).capitalize()}: attention"
    if modality == TEXT and len(weights) >= len(subject.word_of):
        sums = np.zeros(len(subject.words))
        inner = subject.word_of >= 0
        np.add.at(sums, subject.word_of[inner], weights.numpy()[: len(inner)][inner])
        shown = list(zip(subject.words, pictures.scaled(sums).tolist(), strict=True))
        return Panel(name, title, f"{path}; words get {sums.sum():.0%} of the attention", words=shown, read=True)
    grid = grid_of(weights[None, :, None], modality)
    if modality != IMAGE or grid is None or grid.height * grid.width == 1:
        return None
    heat = weights[grid.before :].reshape(grid.height, grid.width)
    pixels = subject.batch.inputs[IMAGE][0].numpy()
    note = f"{path}; the most read place gets {float(heat.max() / heat.mean().clamp(min=1e-12)):.1f} times the mean"
    over = pictures.over_image(pixels, enlarged(heat, pixels.shape[1:]).numpy(), positive=pictures.READ)
    return Panel(name, title, note, over)


def _round(paid: Paid) -> str:
    """A layer and its reader in a few words; members of an ensemble are told apart."""
    steps = paid.layer.split(".")
    member = f"member {int(steps[1]) + 2}, " if steps[0] == "others" else ""
    return f"{member}round {int(steps[steps.index('blocks') + 1]) + 1}: {paid.reader}"
