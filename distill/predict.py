"""A bundle on its runtime, without torch: for deployment, for evaluation of exported models, for the parity gate.

A bundle is the folder that ``distill export`` writes: ``model.onnx``, ``preprocess.json``, ``tokenizer.json``
(models with text), ``labels.json`` and ``bundle.json``, which holds the sha256 of the others.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from distill.contracts import UserError
from distill.formats.base import BadInput
from distill.preprocess import Preprocessor, has_text
from distill.runs import read_json, sha256_file

BUNDLE_FILE, MODEL_FILE, LABELS_FILE = "bundle.json", "model.onnx", "labels.json"

BUNDLE_FORMAT, BUNDLE_VERSION = "multidistill-bundle", 1

RUNTIME = "onnxruntime"
EMBEDDING = "embedding_"
"""Begins the name of an output that is no task's."""


def open_session(path: str | Path, threads: int = 1) -> ort.InferenceSession:
    """Load an ONNX file on the CPU; prediction and benchmarks share these settings.

    Args:
        path: the file.
        threads: threads inside an operator; operators run one after the other.

    Raises:
        UserError: the file is missing or the runtime cannot load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors; the runtime warns about every constant that it folds
    if not Path(path).is_file():
        raise UserError(f"no model file {path}; give an ONNX file or a bundle made by `distill export`")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class of their own
        raise UserError(f"{path}: {RUNTIME} {ort.__version__} cannot load it: {_line(error)}") from error


def verify_bundle(folder: str | Path) -> dict[str, Any]:
    """Check a bundle's format and the sha256 of its files, and return the content of ``bundle.json``.

    Raises:
        UserError: the folder is no bundle, comes from a newer version, or a file is missing or was changed.
    """
    folder = Path(folder)
    try:
        content = read_json(folder / BUNDLE_FILE)
        files = {str(name): str(entry["sha256"]) for name, entry in content["files"].items()}
        kind, version, runtime = content["format"], int(content["version"]), content["runtime"]
    except FileNotFoundError:
        raise UserError(f"{folder} is not a bundle: it has no {BUNDLE_FILE}; make one with `distill export`") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{folder / BUNDLE_FILE} is malformed ({error!r}); export the bundle again") from error
    if (kind, runtime) != (BUNDLE_FORMAT, RUNTIME) or version > BUNDLE_VERSION:
        found = f"{kind} version {version} for {runtime}"
        raise UserError(f"{folder} holds a {found}; this version reads {BUNDLE_FORMAT} {BUNDLE_VERSION} for {RUNTIME}")
    for name, expected in files.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise UserError(f"bundle {folder} lacks its file {name!r}; copy or export the bundle again")
        if sha256_file(path) != expected:
            raise UserError(f"{path} was changed after export (its sha256 differs); copy or export the bundle again")
    if not {MODEL_FILE, LABELS_FILE} <= files.keys():
        raise UserError(f"{folder / BUNDLE_FILE} does not list {MODEL_FILE} and {LABELS_FILE}; export the bundle again")
    return dict(content)


class Predictor:
    """A loaded bundle.

    Attributes:
        info: the content of ``bundle.json``.
        labels: task -> class names, in the order of the logits.
        preprocessor: turns rows into the graph's inputs.
        session: the runtime's session.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
    """

    def __init__(self, folder: str | Path, *, threads: int = 1) -> None:
        """Verify and load a bundle; see :func:`load`."""
        folder = Path(folder)
        self.info = verify_bundle(folder)
        self.labels: dict[str, list[str]] = read_json(folder / LABELS_FILE)
        self.preprocessor = Preprocessor.load(folder)
        self.session = open_session(folder / MODEL_FILE, threads)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Run the graph once.

        Args:
            feeds: the graph's inputs, B rows each; other keys are ignored.

        Returns:
            output name -> float32 [B, ...]: logits by task, and ``embedding_NAME``.

        Raises:
            UserError: an input is missing, or has the wrong type or shape.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise UserError(f"the model's input {missing[0]!r} is missing; it takes {', '.join(self.inputs)}")
        try:
            values = self.session.run(None, {name: feeds[name] for name in self.inputs})
        except Exception as error:  # the runtime's exceptions share no base class of their own
            raise UserError(f"the model refused its inputs: {_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

    def predict(
        self, rows: Sequence[Mapping[str, Any]], *, top_k: int = 3, batch_size: int = 64
    ) -> list[dict[str, dict[str, Any]]]:
        """Classify rows.

        Args:
            rows: mappings with ``image`` (a path, file bytes or a decoded array) and ``text``; either may be absent.
            top_k: number of classes listed, the most probable first.
            batch_size: rows a run of the graph.

        Returns:
            For each row: task -> ``label``, ``probability`` (0 to 1) and ``top``, a list of such pairs.

        Raises:
            UserError: a row has no modality that the model reads, or an unreadable one; the row is named. Or the model
                gives embeddings and no classes.
        """
        if not self.labels:
            raise UserError(
                f"{self.info['name']} gives embeddings and has no classes to predict; use Predictor.embed and compare "
                "images with texts"
            )
        results: list[dict[str, dict[str, Any]]] = []
        for start in range(0, len(rows), batch_size):
            outputs = self.run(self._feeds(rows[start : start + batch_size], start))
            tasks = {task: softmax(outputs[task]) for task in self.labels}
            for row in range(len(rows[start : start + batch_size])):
                results.append({task: _ranked(p[row], self.labels[task], top_k) for task, p in tasks.items()})
        return results

    def embed(self, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 64) -> dict[str, NDArray[np.float32]]:
        """Return embeddings: "image", "text" or "fused" -> [N, E]; of models without classes they have length 1.

        Args:
            rows: as those of :meth:`predict`.
            batch_size: rows a run of the graph.

        Raises:
            UserError: as :meth:`predict`; models with classes give embeddings as well.
        """
        parts: dict[str, list[NDArray[np.float32]]] = {}
        for start in range(0, len(rows), batch_size):
            for name, values in self.run(self._feeds(rows[start : start + batch_size], start)).items():
                if name.startswith(EMBEDDING):
                    parts.setdefault(name.removeprefix(EMBEDDING), []).append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _feeds(self, rows: Sequence[Mapping[str, Any]], start: int) -> dict[str, NDArray[Any]]:
        try:
            feeds = self.preprocessor(rows)
        except BadInput as error:
            where = f"in the batch that begins with row {start}, " if start else ""
            raise UserError(f"{where}{error}") from error
        flags = {name.removesuffix("_present"): flag for name, flag in feeds.items() if name.endswith("_present")}
        empty = np.flatnonzero(~np.any(list(flags.values()), axis=0))
        if empty.size:
            raise UserError(f"row {start + empty[0]} has no {' or '.join(flags)}; give it at least one")
        return feeds


def load(bundle: str | Path, *, threads: int = 1) -> Predictor:
    """Load a bundle after checking its hashes.

    Args:
        bundle: the folder that ``distill export`` wrote.
        threads: threads inside an operator.

    Raises:
        UserError: the folder is no bundle, or one of its files is missing or was changed.
    """
    return Predictor(bundle, threads=threads)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities [B, C] of logits [B, C]."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def predict_rows(
    bundle: str | Path,
    images: Sequence[str | Path] = (),
    texts: Sequence[str] = (),
    table: str | Path | None = None,
    *,
    top_k: int = 3,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """What ``distill predict`` does: classify images, texts, pairs of them, or the rows of a table.

    Args:
        bundle: the bundle's folder.
        images: image files.
        texts: texts; with images, as many as images, the n-th belonging to the n-th image.
        table: a CSV file with the columns ``image`` (relative to the table's folder) and ``text``, or one of them.
        top_k: number of classes listed.
        threads: threads inside an operator.

    Returns:
        For each row ``image``, ``text`` (None where absent) and ``predictions``, as :meth:`Predictor.predict`.

    Raises:
        UserError: nothing to classify, counts that do not match, or an unreadable table, image or bundle.
    """
    rows = list(_paired(images, texts) if table is None else _read_table(Path(table)))
    if table is not None and (images or texts):
        raise UserError("give either a table or images and texts, not both")
    if not rows:
        raise UserError("nothing to classify; give an image, a text or a table with rows")
    predictions = load(bundle, threads=threads).predict(rows, top_k=top_k)
    return [{**row, "predictions": found} for row, found in zip(rows, predictions, strict=True)]


def _paired(images: Sequence[str | Path], texts: Sequence[str]) -> Iterator[dict[str, str | None]]:
    if images and texts and len(images) != len(texts):
        raise UserError(f"{len(images)} images and {len(texts)} texts; give as many of each, or only one kind")
    for number in range(max(len(images), len(texts))):
        yield {"image": str(images[number]) if images else None, "text": texts[number] if texts else None}


def _read_table(path: Path) -> Iterator[dict[str, str | None]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = {"image", "text"}.intersection(reader.fieldnames or ())
            if not columns:
                raise UserError(f"{path} has neither a column 'image' nor 'text'; name one so in its first line")
            for row in reader:
                image, text = row.get("image"), row.get("text")
                yield {"image": str(path.parent / image) if image else None, "text": text if has_text(text) else None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a readable CSV file: {_line(error)}") from error


def _ranked(probabilities: NDArray[np.float32], names: Sequence[str], top_k: int) -> dict[str, Any]:
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    top = [{"label": names[index], "probability": float(probabilities[index])} for index in order]
    return {**top[0], "top": top}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
