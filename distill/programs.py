"""What bundles are made from: a model as files to convert, whole and by encoder, and the gate of its bundles.

Programs read one row, and texts of one length: ``max_length`` of the recipe's text encoder, which cuts longer ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from distill import aware
from distill.build import Model, example_batch, input_spec
from distill.bundles import QAT, Exported
from distill.config import FP32
from distill.export.onnx import extract_tower
from distill.export.torch_program import export_program
from distill.gate import SHIPPED, Gate
from distill.predict import MODEL_FILE
from distill.quantization.common import Feeds
from distill.rounding import Range
from distill.workspace import Workspace

GRAPH = ("inputs", "outputs", "operators")
WHOLE = "model"


@dataclass(frozen=True)
class Origin:
    """A model that bundles are made from.

    Attributes:
        gate: what its bundles are compared by.
        graph: the fp32 ONNX file.
        sources: its other files.
        ranges: of values of the graph, where they were learnt.
    """

    gate: Gate
    graph: Path
    sources: Sources
    ranges: Mapping[str, Range] | None = None


def origin(work: Workspace, stage: str, folder: Path) -> Origin:
    """The model that a stage trained; files are written below a folder, but for the shipped model's graph."""
    place = folder / stage
    place.mkdir()
    if stage != QAT:
        graph = work.path("export") / FP32 / MODEL_FILE
        return Origin(Gate(work), graph, Sources(work, work.model(SHIPPED), place))
    graph, (model, ranges) = place / "model.onnx", aware.plain(work)
    aware.export_graph(work, model, graph)
    return Origin(Gate(work, QAT, aware.trained(work)), graph, Sources(work, model, place), ranges)


class Sources:
    """Files to convert, each written when it is first asked for.

    Args:
        work: the run.
        model: the shipped one, or another of its kind.
        folder: where they are written.
    """

    def __init__(self, work: Workspace, model: Model, folder: Path) -> None:
        self._work, self._model, self._folder = work, model, folder

    def program(self, modality: str | None = None) -> Path:
        """The model, or one encoder of a model without fusion, as a program of one row."""
        path = self._folder / f"{modality or WHOLE}.pt2"
        if not path.is_file():
            whole: Any = self._model
            model = whole if modality is None else whole.alone(modality)
            spec = input_spec(model)
            example = example_batch(spec, self._work.recipe.data, length=spec.max_length)
            export_program(model, example, path, rows=1, embeddings=self._work.recipe.export.embeddings)
        return path

    def make_part(
        self, make: Callable[[Exported, Path], dict[str, Any]], exported: Exported, modality: str, path: Path
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Make the model of one encoder as that of all was made; return what :func:`graph_apart` does.

        Args:
            make: as of :class:`~distill.bundles.Kind`.
            exported: what the whole model was made from.
            modality: the encoder's.
            path: the file to write.
        """
        graph = self._folder / f"{modality}.onnx"
        if not graph.is_file():
            extract_tower(exported.graph, modality, graph)
        kept = [part for part in exported.config.keep_float if _names(graph, part)]
        alone = replace(
            exported,
            graph=graph,
            program=partial(self.program, modality),
            feeds=lambda: _only(exported.feeds(), modality),
            config=exported.config.model_copy(update={"keep_float": kept}),
        )
        return graph_apart(make(alone, path))


def graph_apart(made: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What a maker of a model file returns, as its inputs and outputs (None of an ONNX file) and the rest."""
    graph = {key: made[key] for key in GRAPH if key in made}
    return graph or None, {key: value for key, value in made.items() if key not in GRAPH}


def _names(graph: Path, part: str) -> bool:
    """Whether a node of an ONNX file has a text in its name."""
    return any(part in node.name for node in onnx.load(graph).graph.node)


def _only(feeds: Iterator[Feeds], modality: str) -> Iterator[Feeds]:
    for batch in feeds:
        yield {name: value for name, value in batch.items() if name.split("_")[0] == modality}
