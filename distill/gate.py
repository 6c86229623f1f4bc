"""The gate of an exported model: it says what its torch source says, and reads what training read, or the run stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill import bench, evaluate
from distill.build import Model, input_spec
from distill.bundles import BUNDLES, not_run
from distill.contracts import AND, VALID, Batch
from distill.data.loader import InputSpec, Loader
from distill.data.raw import RawRows
from distill.data_config import DataConfig
from distill.dual import DualEncoder
from distill.export.bundle import ParityError, parity, write_bundle
from distill.export.onnx import extract_tower, graph_outputs
from distill.formats import TABULAR, TEXT, BadInput
from distill.multimodal import evaluating
from distill.predict import EMBEDDING, INPUT, OUTPUT, load, open_graph, verify_bundle
from distill.preprocess import Preprocessor
from distill.runtimes import RUNTIMES
from distill.workspace import PRUNED, STUDENT, Workspace

Graph = Mapping[str, Any]
"""``inputs`` and ``outputs`` of a model whose file does not say them."""
Part = Callable[[str, Path], tuple[Graph | None, Mapping[str, Any]]]
"""Writes the model of one modality's encoder to a path; returns its graph (None of an ONNX file), and what its bundle
tells of itself."""

SHIPPED = PRUNED
"""The model that is exported into bundles."""
READ_ROWS, READ_TEXTS = 16, 256
SAME = 1e-5
"""Difference of standardised numbers that rounding may make, relative to the largest."""
CLOSE = 1e-2
"""Difference of outputs that another runtime may make in fp32, relative to the largest; 1e-6 to 1e-4 is usual."""
PARTS_LEAST = 0.9
"""Least agreement on the one batch with parts of the modalities; one row of few that is undecided is no mistake."""
NEVER = float("-inf")
"""An agreement that no gate asks for."""


class Gate:
    """Writes bundles of the shipped model and compares them with it on the validation rows, on their own runtime.

    Of a model without fusion there are further bundles, one for each encoder, and these are compared: each has its
    part of the graph and runs alone.
    """

    def __init__(self, work: Workspace, stage: str = SHIPPED, model: Model | None = None) -> None:
        """Take the run's artifacts, and another model than the shipped one, of a stage; it answers when it is asked."""
        self._work, self._stage, self._model = work, stage, model or work.model(stage)
        self._spec = input_spec(self._model)
        self._loader = work.clean_loader(VALID, self._spec, STUDENT)
        self._batches = evaluate.clean_batches(self._loader, STUDENT)

    def write(
        self,
        bundle: Path,
        file: Path,
        info: Mapping[str, Any],
        least: float,
        *,
        graph: Graph | None = None,
        part: Part | None = None,
    ) -> dict[str, Any]:
        """Write a bundle, and compare what it reads and says.

        Files and texts of some validation rows have to become, by the bundle's own preprocessing, what training read
        of them. Bundles in fp32 are asked about parts of the modalities too: where all rows have all, nothing else
        would show that two ``..._present`` were exchanged.

        Args:
            bundle: its folder, of the name of its kind.
            file: the first of the model's files.
            info: what the bundle tells of itself.
            least: least agreement of every output.
            graph: of a model that is no ONNX file.
            part: makes the models of single encoders; by default they are taken out of the ONNX file.

        Returns:
            As :func:`~distill.export.bundle.parity`; ``not_run`` alone, a sentence, of a bundle that this system cannot
            run: it brings some rows and what the source says of them.

        Raises:
            ParityError: the bundle reads or says something else than its source.
        """
        kind, part = BUNDLES[bundle.name], part or partial(_taken_out, file)
        elsewhere = not_run(bundle.name)
        info = {**info, "not_run": elsewhere} if elsewhere else info
        self._write(bundle, file, self._spec, info, kind.runtime, graph, self._model)
        for modality, folder in towers(self._model, bundle).items():
            model: Any = self._model
            folder.mkdir(exist_ok=True)
            alone, made = part(modality, folder / kind.file)
            num_params = sum(map(bench.num_params, (model.encoders[modality], model.embedders[modality])))
            told = {"precision": kind.precision, **made, "num_params": num_params}
            told |= {"not_run": elsewhere} if elsewhere else {}
            spec = self._spec.only([modality])
            self._write(folder, folder / kind.file, spec, told, kind.runtime, alone, model.alone(modality))
        if elsewhere:
            return {"not_run": elsewhere}
        same = kind.precision == "fp32"
        found = self._compare(bundle_says(self._model, bundle, self._batches), least, CLOSE if same else None)
        if same:
            self._compare_parts(bundle, min(least, PARTS_LEAST))
        return found

    def _check_rows(self, model: Model, reads: InputSpec) -> dict[str, NDArray[Any]]:
        """Some validation rows as a model reads them, and its answers, as :func:`write_bundle` takes them."""
        rows = self._loader.row_positions[: self._work.recipe.export.check_rows]
        if not len(rows):
            return {}
        batch = self._loader.batch(rows, self._loader.clean_views(len(rows)))[STUDENT]
        kept = [name for name in batch.inputs if name.split("_")[0] in reads.modalities]
        batch = batch._replace(
            inputs={name: batch.inputs[name] for name in kept},
            present={name: batch.present[name] for name in reads.modalities},
            targets={},
        )
        with torch.no_grad(), evaluating(model):
            outputs = model(batch.to(next(model.parameters()).device))
        said = graph_outputs(outputs, embeddings=self._work.recipe.export.embeddings)
        arrays = {f"{INPUT}{name}": array for name, array in evaluate.feeds(batch).items()}
        return arrays | {f"{OUTPUT}{name}": value.float().cpu().numpy() for name, value in said.items()}

    def _compare_parts(self, bundle: Path, least: float) -> None:
        """Compare the answers to a batch of which just some modalities are present."""
        batch, predictor = next(iter(self._batches())), load(bundle)
        parts = () if towers(self._model, bundle) else evaluate.subsets_of(list(self._model.encoders))
        for part in parts:
            rows = [evaluate.only(batch, *part.split(AND))]
            said = evaluate.predict_torch(self._model, rows.__iter__)
            found = evaluate.predict_bundle(predictor, rows.__iter__)
            try:
                tasks, ids = self._work.tasks(), batch.ids.numpy()
                parity(said, found, min_agreement=least, tasks=tasks, ids=ids, close=CLOSE)
            except ParityError as error:
                raise ParityError(f"with {part} alone: {error}") from None

    @property
    def compared(self) -> list[str]:
        """Names of the graph's outputs that are compared."""
        return [f"{EMBEDDING}{name}" for name in towers(self._model, Path())] or list(self._work.tasks())

    def agreement(self, graph: Path) -> float:
        """The lowest agreement of any output of a model file that is no bundle yet; NEVER if one is not even finite."""
        wanted = list(towers(self._model, graph))
        try:
            found = evaluate.predict_bundle(open_graph(graph), self._batches, embeddings=wanted)
            return min(entry["agreement"] for entry in self._compare(found, NEVER).values())
        except ParityError:
            return NEVER

    def _compare(self, found: evaluate.Arrays, least: float, close: float | None = None) -> dict[str, Any]:
        ids = self._loader.data.ids[self._loader.row_positions]
        return parity(self._said, found, min_agreement=least, tasks=self._work.tasks(), ids=ids, close=close)

    @cached_property
    def _said(self) -> evaluate.Arrays:
        embeddings = list(towers(self._model, Path()))
        return evaluate.predict_torch(self._model, self._batches, embeddings=embeddings)

    def _write(
        self,
        folder: Path,
        file: Path,
        reads: InputSpec,
        info: Mapping[str, Any],
        runtime: str,
        graph: Graph | None,
        model: Model,
    ) -> None:
        work = self._work
        write_bundle(
            folder,
            model_path=file,
            preprocessor=work.preprocessor(reads),
            tasks=work.tasks() if work.recipe.student.fusion else {},
            name=f"{work.recipe.name} {folder.name}",
            source={"stage": self._stage, "fingerprint": work.done[self._stage].fingerprint},
            info=info,
            runtime=runtime,
            graph=graph,
            check=self._check_rows(model, reads) if "not_run" in info else None,
        )
        check_reading(Preprocessor.load(folder), self._loader, reads, work.recipe.data)


def _taken_out(file: Path, modality: str, target: Path) -> tuple[None, dict[str, Any]]:
    """The encoder of a modality out of an ONNX file of all."""
    extract_tower(file, modality, target)
    return None, {"bytes": target.stat().st_size}


def check_reading(preprocessor: Preprocessor, loader: Loader, spec: InputSpec, config: DataConfig) -> None:
    """Check that a bundle reads what training read: the same files, texts and records become the same numbers.

    Args:
        preprocessor: of the bundle.
        loader: of clean rows, as STUDENT reads them; up to 256 texts and 16 rows of each other modality are compared.
        spec: what the bundle reads.
        config: the recipe's ``data``.

    Raises:
        ParityError: it does not; modality, row and the largest difference are named.
    """
    raw = RawRows(loader.data, config)
    for modality in spec.modalities:
        rows = loader.row_positions[loader.data.present[modality][loader.row_positions]]
        most = READ_TEXTS if modality == TEXT else READ_ROWS
        if modality == TABULAR:
            rows = raw.first(rows, most)
        elif len(rows) > most:
            rows = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
        if not len(rows):
            continue
        expected = evaluate.feeds(loader.batch(rows, loader.clean_views(len(rows)))[STUDENT])
        try:
            found = preprocessor([{modality: value} for value in raw.values(modality, rows)])
        except BadInput as error:
            raise ParityError(f"the bundle cannot read {modality} of validation rows: {error}") from error
        for name in (key for key in expected if key.split("_")[0] == modality):
            _check_same(name, expected[name], found[name], loader.data.ids[rows])


def _check_same(name: str, expected: NDArray[Any], found: NDArray[Any], ids: NDArray[np.int64]) -> None:
    if expected.dtype != found.dtype or expected.shape != found.shape:
        shapes = f"{found.dtype} {list(found.shape)}, in training {expected.dtype} {list(expected.shape)}"
        raise ParityError(f"input {name!r} of the same {len(ids)} validation rows is {shapes}")
    difference = np.abs(found.astype(np.float64) - expected).reshape(len(ids), -1).max(axis=1)
    worst = int(np.argmax(difference))
    limit = SAME * max(1.0, float(np.abs(expected).max())) if expected.dtype.kind == "f" else 0
    if not difference[worst] <= limit:
        raise ParityError(
            f"input {name!r} of row {ids[worst]} is not what training read: preprocessing differs by up to "
            f"{difference[worst]:.4g}"
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


def unrun(bundles: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Bundles that were written and not run: for each ``why``, a sentence, and ``size_bytes`` of its model.

    Args:
        bundles: name -> folder.
    """
    found = {}
    for name, folder in bundles.items():
        info = verify_bundle(folder)
        size = sum(info["files"][file]["bytes"] for file in RUNTIMES[info["runtime"]].files)
        found[name] = {"why": info["info"].get("not_run", "it was not run here"), "size_bytes": size}
    return found
