"""The gate of an exported model: it says what its torch source says, and reads what training read, or the run stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill import bench, evaluate
from distill.build import Model, input_spec
from distill.contracts import VALID, Batch
from distill.data.loader import InputSpec
from distill.dual import DualEncoder
from distill.export.bundle import ParityError, parity, write_bundle
from distill.export.onnx import extract_tower
from distill.predict import EMBEDDING, MODEL_FILE, Graph, load
from distill.workspace import PRUNED, STUDENT, Workspace

SHIPPED = PRUNED
"""The model that is exported into bundles."""
NEVER = float("-inf")
"""An agreement that no gate asks for."""


class Gate:
    """Writes bundles of the shipped model and compares them with it on the validation rows, on their own runtime.

    Of a model without fusion there are further bundles, one for each encoder, and these are compared: each has its
    part of the graph and runs alone.
    """

    def __init__(self, work: Workspace) -> None:
        """Take the run's artifacts; the model answers when it is first asked."""
        self._work, self._model = work, work.model(SHIPPED)
        self._spec = input_spec(self._model)
        self._loader = work.clean_loader(VALID, self._spec, STUDENT)
        self._batches = evaluate.clean_batches(self._loader, STUDENT)

    def write(self, bundle: Path, graph: Path, info: Mapping[str, Any], least: float) -> dict[str, Any]:
        """Write a bundle and compare it.

        Args:
            bundle: its folder.
            graph: the model file.
            info: what the bundle tells of itself.
            least: least agreement of every output.

        Returns:
            As :func:`~distill.export.bundle.parity`.

        Raises:
            ParityError: the bundle says something else than its source.
        """
        self._write(bundle, graph, self._spec, info)
        for modality, folder in towers(self._model, bundle).items():
            model: Any = self._model
            folder.mkdir(exist_ok=True)
            extract_tower(graph, modality, folder / MODEL_FILE)
            num_params = sum(map(bench.num_params, (model.encoders[modality], model.embedders[modality])))
            part = self._spec.only([modality])
            self._write(folder, folder / MODEL_FILE, part, {**info, "num_params": num_params})
        return self._compare(bundle_says(self._model, bundle, self._batches), least)

    @property
    def compared(self) -> list[str]:
        """Names of the graph's outputs that are compared."""
        return [f"{EMBEDDING}{name}" for name in towers(self._model, Path())] or list(self._work.tasks())

    def agreement(self, graph: Path) -> float:
        """The lowest agreement of any output of a model file that is no bundle yet; NEVER if one is not even finite."""
        wanted = list(towers(self._model, graph))
        try:
            found = evaluate.predict_bundle(Graph(graph), self._batches, embeddings=wanted)
            return min(entry["agreement"] for entry in self._compare(found, NEVER).values())
        except ParityError:
            return NEVER

    def _compare(self, found: evaluate.Arrays, least: float) -> dict[str, Any]:
        ids = self._loader.data.ids[self._loader.row_positions]
        return parity(self._said, found, min_agreement=least, tasks=self._work.tasks(), ids=ids)

    @cached_property
    def _said(self) -> evaluate.Arrays:
        embeddings = list(towers(self._model, Path()))
        return evaluate.predict_torch(self._model, self._batches, embeddings=embeddings)

    def _write(self, folder: Path, graph: Path, reads: InputSpec, info: Mapping[str, Any]) -> None:
        work = self._work
        write_bundle(
            folder,
            model_path=graph,
            preprocessor=work.preprocessor(reads),
            tasks=work.tasks() if work.recipe.student.fusion else {},
            name=f"{work.recipe.name} {folder.name}",
            source={"stage": SHIPPED, "fingerprint": work.done[SHIPPED].fingerprint},
            info=info,
        )


def towers(model: Model, bundle: Path) -> dict[str, Path]:
    """Modality -> the bundle of its encoder alone, beside that of both; none of a model with fusion."""
    names = model.encoders if isinstance(model, DualEncoder) else ()
    return {name: bundle.parent / f"{bundle.name}-{name}" for name in names}


def bundle_says(
    model: Model, bundle: Path, batches: Callable[[], Iterator[Batch]], embeddings: Sequence[str] = ()
) -> dict[str, NDArray[np.float32]]:
    """What a bundle answers, or those of its encoders together."""
    alone = towers(model, bundle)
    if not alone:
        return evaluate.predict_bundle(load(bundle), batches, embeddings=embeddings)
    parts = [evaluate.predict_bundle(load(path), batches, embeddings=[name]) for name, path in alone.items()]
    return {name: array for part in parts for name, array in part.items()}
