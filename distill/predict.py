"""A bundle on its runtime, without torch: for deployment, for evaluation of exported models, for the parity gate.

A bundle is the folder that ``distill export`` writes: ``model.onnx`` (or the files of another of
:data:`~distill.runtimes.RUNTIMES`), ``preprocess.json``, ``tokenizer.json`` (models with text), ``labels.json`` and
``bundle.json``, which holds the sha256 of the others.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.contracts import UserError
from distill.formats import TABULAR, TEXT, BadInput
from distill.formats.tabular import TabularFormat
from distill.onnx_file import check_one_file
from distill.preprocess import SPEC_FILE, TOKENIZER_FILE, Preprocessor, has_text
from distill.runs import read_json, sha256_file
from distill.runtimes import CPU, RUNTIMES, Runtime, open_model
from distill.runtimes.onnxruntime import OnnxRuntime
from distill.runtimes.onnxruntime import open_session as open_session
from distill.targets import CAPTIONING, CLASSIFICATION, REGRESSION, Task, tasks_from_json

BUNDLE_FILE, MODEL_FILE, LABELS_FILE = "bundle.json", "model.onnx", "labels.json"
CHECK_FILE = "check.safetensors"
INPUT, OUTPUT = "input.", "output."
"""Rows and what the source answers, in bundles that were not run where they were made; what begins their names."""

BUNDLE_FORMAT, BUNDLE_VERSION = "multidistill-bundle", 2
"""Version 2: the vocabulary is pruned, and earlier readers would feed the tokenizer's ids. Others are of version 1."""

RUNTIME = "onnxruntime"
LONGEST_NAME = 100
"""Characters of the name of a bundle's file."""
NOTHING = "nothing to classify; give a file, a text or a table with rows"
EMBEDDING = "embedding_"
"""Begins the name of an output that is no task's."""


def verify_bundle(folder: str | Path) -> dict[str, Any]:
    """Check a bundle's format, that its files are its own, and their sha256; return the content of ``bundle.json``.

    Raises:
        UserError: the folder is no bundle or comes from a newer version; a file is missing, a link, not listed or was
            changed; or the model's weights lie outside it. Nothing of it has been loaded then.
    """
    folder = Path(folder)
    _refuse_link(folder / BUNDLE_FILE)
    try:
        content = read_json(folder / BUNDLE_FILE)
        kind, version, runtime = content["format"], content["version"], str(content["runtime"])
        newer = type(version) is int and version > BUNDLE_VERSION
        if kind != BUNDLE_FORMAT or runtime not in RUNTIMES or newer:
            found = f"{kind} version {version} for {runtime}"
            expected = f"{BUNDLE_FORMAT} {BUNDLE_VERSION} for {', '.join(RUNTIMES)}"
            raise UserError(f"{folder} holds a {found}; this version reads {expected}: update it or export again")
        if type(version) is not int or version < 1:
            raise ValueError(f"version is {version!r}, not a whole number from 1 on")
        files = {str(name): str(entry["sha256"]) for name, entry in content["files"].items()}
        for name, value in {**content["inputs"], **content["outputs"]}.items():
            if not isinstance(value["dtype"], str) or not all(isinstance(size, int | str) for size in value["shape"]):
                raise ValueError(f"{name!r} has no type and shape")
    except FileNotFoundError:
        raise UserError(f"{folder} is not a bundle: it has no {BUNDLE_FILE}; make one with `distill export`") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{folder / BUNDLE_FILE} is malformed ({error!r}); export the bundle again") from error
    opened = RUNTIMES[runtime].files
    for name, digest in files.items():
        path, plain = folder / name, name == Path(name).name and "\\" not in name and len(name) <= LONGEST_NAME
        if not (plain or name in opened) or not path.is_file():
            raise UserError(f"bundle {folder} lacks its file {name!r}; copy or export the bundle again")
        for part in (path, *path.parents[: len(Path(name).parts) - 1]):
            _refuse_link(part)
        if sha256_file(path) != digest:
            raise UserError(f"{path} was changed after export (its sha256 differs); copy or export the bundle again")
    needed = {*opened, LABELS_FILE, SPEC_FILE}
    if not needed <= files.keys() or ((folder / TOKENIZER_FILE).exists() and TOKENIZER_FILE not in files):
        unlisted = sorted((needed | {TOKENIZER_FILE}) - files.keys())
        raise UserError(f"{folder / BUNDLE_FILE} does not list {' and '.join(unlisted)}; export the bundle again")
    if MODEL_FILE in opened:
        check_one_file(folder / MODEL_FILE)
    return dict(content)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a link, and a bundle holds its own files; copy what it leads to in its place")


class Graph:
    """A model file on its runtime.

    Attributes:
        runtime: the runtime, with the model loaded.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.inputs, self.outputs = runtime, runtime.inputs, runtime.outputs

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
            return self.runtime.run(feeds)
        except Exception as error:  # the runtimes' exceptions share no base class of their own
            raise UserError(f"the model refused its inputs: {_line(error)}") from error


def open_graph(path: str | Path, threads: int = 1) -> Graph:
    """Load an ONNX file; see :func:`~distill.runtimes.onnxruntime.open_session`."""
    return Graph(OnnxRuntime(Path(path), {}, threads))


class Predictor(Graph):
    """A loaded bundle.

    Attributes:
        info: the content of ``bundle.json``.
        tasks: what the outputs say, in their order.
        preprocessor: turns rows into the graph's inputs.
    """

    def __init__(self, folder: str | Path, *, threads: int = 1, provider: str = CPU) -> None:
        """Verify and load a bundle; see :func:`load`."""
        folder = Path(folder)
        self.info = verify_bundle(folder)
        self.tasks = _read_tasks(folder / LABELS_FILE)
        self.preprocessor = Preprocessor.load(folder)
        runtime = str(self.info["runtime"])
        super().__init__(open_model(runtime, folder / RUNTIMES[runtime].files[0], self.info, threads, provider))
        _check_tasks(folder / LABELS_FILE, self.tasks, self.outputs, self.info["outputs"])
        _check_inputs(folder / SPEC_FILE, self.preprocessor, self.info["inputs"])

    def predict(
        self, rows: Sequence[Mapping[str, Any]], *, top_k: int = 3, batch_size: int = 64
    ) -> list[dict[str, dict[str, Any]]]:
        """Answer the tasks for rows.

        Args:
            rows: mappings of modalities to values, as :class:`~distill.preprocess.Preprocessor` takes them; any may be
                absent.
            top_k: number of classes or labels listed, the most probable first.
            batch_size: rows a run of the graph.

        Returns:
            For each row: task -> ``label``, ``probability`` (0 to 1) and ``top``, a list of such pairs; where several
            labels may hold, ``labels`` (those above one half) and ``top``; where numbers are asked for, ``values``
            (column -> number, in its own unit); where a caption is, ``text``.

        Raises:
            UserError: a row has no modality that the model reads, or an unreadable one; the row is named. Or the model
                gives embeddings and no classes.
        """
        results: list[dict[str, dict[str, Any]]] = []
        for start in range(0, len(rows), batch_size):
            results += self.answers(self.run(self.feeds(rows[start : start + batch_size], start)), top_k)
        return results

    def answers(self, outputs: Mapping[str, NDArray[np.float32]], top_k: int) -> list[dict[str, dict[str, Any]]]:
        """Return what the graph's outputs say of the tasks, as :meth:`predict` does.

        Raises:
            UserError: the model gives embeddings and no classes.
        """
        if not self.tasks:
            raise UserError(
                f"{self.info['name']} gives embeddings and has no classes to predict; use Predictor.embed and compare "
                "images with texts"
            )
        return [
            {name: answer(task, outputs[name][row], top_k) for name, task in self.tasks.items()}
            for row in range(len(next(iter(outputs.values()))))
        ]

    def embed(self, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 64) -> dict[str, NDArray[np.float32]]:
        """Return embeddings: "image", "text" or "fused" -> [N, E]; of models without classes they have length 1.

        Args:
            rows: as those of :meth:`predict`.
            batch_size: rows a run of the graph.

        Raises:
            UserError: as :meth:`predict`; or the model was exported without embeddings.
        """
        parts: dict[str, list[NDArray[np.float32]]] = {}
        for start in range(0, len(rows), batch_size):
            for name, values in self.embeddings(self.run(self.feeds(rows[start : start + batch_size], start))).items():
                parts.setdefault(name, []).append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}

    def embeddings(self, outputs: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Return the embeddings among the graph's outputs, as :meth:`embed` does."""
        found = {name.removeprefix(EMBEDDING): each for name, each in outputs.items() if name.startswith(EMBEDDING)}
        if not found:
            raise UserError(f"{self.info['name']} gives no embeddings; export it with export.embeddings=true")
        return found

    def feeds(self, rows: Sequence[Mapping[str, Any]], start: int = 0) -> dict[str, NDArray[Any]]:
        """Return the graph's inputs for rows; ``start`` is the number of the first one, for messages.

        Raises:
            UserError: as :meth:`predict`.
        """
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


def load(bundle: str | Path, *, threads: int = 1, provider: str = CPU) -> Predictor:
    """Load a bundle after checking its hashes.

    Args:
        bundle: the folder that ``distill export`` wrote.
        threads: threads inside an operator.
        provider: of onnxruntime: ``cpu``, ``cuda`` or ``tensorrt``; one that is not there or fails to load is refused.

    Raises:
        UserError: as :func:`verify_bundle`, or the model does not answer what ``labels.json`` names.
    """
    return Predictor(bundle, threads=threads, provider=provider)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities [B, C] of logits [B, C]."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def predict_rows(
    bundle: str | Path,
    given: Mapping[str, Sequence[str | Path]] | None = None,
    table: str | Path | None = None,
    *,
    top_k: int = 3,
    threads: int = 1,
    provider: str = CPU,
) -> list[dict[str, Any]]:
    """What ``distill predict`` does: classify files and texts, rows of several of them, or those of a table.

    Args:
        bundle: the bundle's folder.
        given: modality -> files, or texts; those of several modalities are as many, and the n-th ones are a row.
        table: a CSV file with columns named like modalities (files are relative to the table's folder), or like those
            of the records that the model learnt from; one is enough.
        top_k: number of classes listed.
        threads: threads inside an operator.
        provider: as of :func:`load`.

    Returns:
        For each row its value of each modality that the model reads (None where absent) and ``predictions``, as
        :meth:`Predictor.predict`.

    Raises:
        UserError: nothing to classify, counts that do not match, or an unreadable table, file or bundle.
    """
    filled = {name: values for name, values in (given or {}).items() if values}
    if table is None and not filled:
        raise UserError(NOTHING)
    predictor = load(bundle, threads=threads, provider=provider)
    reads = [*predictor.preprocessor.formats, *([TEXT] if predictor.preprocessor.tokenizer else [])]
    for name in filled:
        if name not in reads:
            raise UserError(f"{predictor.info['name']} reads no {name}; it reads {', '.join(reads)}")
    if table is not None and filled:
        raise UserError("give either a table or files and texts, not both")
    if table is not None:
        rows = list(_read_table(Path(table), predictor.preprocessor, reads))
    else:
        rows = [{name: row.get(name) for name in reads} for row in _together(filled)]
    if not rows:
        raise UserError(NOTHING)
    predictions = predictor.predict(rows, top_k=top_k)
    return [{**row, "predictions": found} for row, found in zip(rows, predictions, strict=True)]


def _together(given: Mapping[str, Sequence[str | Path]]) -> Iterator[dict[str, str]]:
    """Rows of the n-th values."""
    counts = {name: len(values) for name, values in given.items()}
    if len(set(counts.values())) > 1:
        found = " and ".join(f"{count} of {name}" for name, count in counts.items())
        raise UserError(f"{found}; give as many of each, or only one kind")
    for values in zip(*given.values(), strict=True):
        yield {name: str(value) for name, value in zip(given, values, strict=True)}


def _read_table(path: Path, preprocessor: Preprocessor, reads: Sequence[str]) -> Iterator[dict[str, Any]]:
    records = preprocessor.formats.get(TABULAR)
    fields = (*records.numbers, *records.categories) if isinstance(records, TabularFormat) else ()
    known = [name for name in reads if name != TABULAR]
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            if not {*known, *fields}.intersection(columns):
                raise UserError(f"{path} has no column {' or '.join([*known, *fields])}; name one so in its first line")
            for row in reader:
                found: dict[str, Any] = {name: _cell(path, name, row.get(name)) for name in known}
                if fields:
                    record = {name: row.get(name) for name in fields}
                    found[TABULAR] = record if any(has_text(value) for value in record.values()) else None
                yield {name: found[name] for name in reads}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a readable CSV file: {_line(error)}") from error


def _cell(table: Path, modality: str, value: str | None) -> str | None:
    if not has_text(value):
        return None
    return value if modality == TEXT else str(table.parent / str(value))


def answer(task: Task, outputs: NDArray[np.float32], top_k: int) -> dict[str, Any]:
    """Return what a row's outputs [K] say of a task, as :meth:`Predictor.predict` gives it."""
    if task.kind == CAPTIONING:
        return {"text": task.text(outputs)}
    if task.kind == REGRESSION:
        return {"values": dict(zip(task.names, task.numbers(outputs).tolist(), strict=True))}
    probabilities = softmax(outputs) if task.kind == CLASSIFICATION else 1 / (1 + np.exp(-outputs.astype(np.float64)))
    order = np.argsort(-probabilities, kind="stable")
    ranked = [{"label": task.names[index], "probability": float(probabilities[index])} for index in order]
    if task.kind == CLASSIFICATION:
        return {**ranked[0], "top": ranked[:top_k]}
    return {"labels": [entry["label"] for entry in ranked if entry["probability"] > 0.5], "top": ranked[:top_k]}


def in_words(said: Mapping[str, Any]) -> str:
    """Return what :func:`answer` gave as a line: a caption, numbers, or classes and labels with probabilities."""
    if "text" in said:
        return str(said["text"])
    if "values" in said:
        return ", ".join(f"{name} {value:.6g}" for name, value in said["values"].items())
    listed = ", ".join(f"{entry['label']} {entry['probability']:.1%}" for entry in said["top"])
    return f"{', '.join(said['labels']) or 'none'} ({listed})" if "labels" in said else listed


def _check_tasks(path: Path, tasks: Mapping[str, Task], answered: Sequence[str], told: Mapping[str, Any]) -> None:
    """Refuse labels that are not those of the model's outputs."""
    for name, task in tasks.items():
        if name not in answered:
            raise UserError(f"{path} names {name!r}, which the model does not answer; export the bundle again")
        widths = told.get(name, {}).get("shape", ())[1:]
        if task.kind != CAPTIONING and list(widths) != [len(task.names)]:
            raise UserError(
                f"{path} has {len(task.names)} names for {name!r}, and the model answers {list(widths)} numbers a row; "
                "export the bundle again"
            )
        if not all(isinstance(label, str) for label in task.names):
            raise UserError(f"{path}: a name of {name!r} is no text; export the bundle again")


def _check_inputs(path: Path, preprocessor: Preprocessor, told: Mapping[str, Any]) -> None:
    """Refuse preprocessing that makes other arrays than the model reads."""
    for item in preprocessor.formats.values():
        for name, (dtype, shape) in item.arrays.items():
            if name in told and (told[name]["dtype"], list(told[name]["shape"][1:])) != (dtype, list(shape)):
                raise UserError(
                    f"{path} makes {name!r} {dtype} {list(shape)}, and the model reads {told[name]['dtype']} "
                    f"{told[name]['shape'][1:]}; export the bundle again"
                )


def _read_tasks(path: Path) -> dict[str, Task]:
    try:
        return tasks_from_json(read_json(path))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} does not say what the model's outputs are: {_line(error)}; export it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
