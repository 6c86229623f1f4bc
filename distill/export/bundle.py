"""The folder that leaves the workshop: model, preprocessing, labels, hashes and a model card; and its parity gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import save_file

from distill.contracts import UserError
from distill.export.card import model_card
from distill.export.onnx import describe
from distill.measures import agreement
from distill.predict import (
    BUNDLE_FILE,
    BUNDLE_FORMAT,
    BUNDLE_VERSION,
    CHECK_FILE,
    LABELS_FILE,
    RUNTIME,
    verify_bundle,
)
from distill.preprocess import SPEC_FILE, TOKENIZER_FILE, Preprocessor
from distill.runs import atomic, read_json, sha256_file, write_json
from distill.runtimes import RUNTIMES
from distill.targets import CAPTIONING, CLASSIFICATION, KINDS, MULTILABEL, REGRESSION, Task, tasks_to_json

__all__ = ["CARD_FILE", "ParityError", "parity", "verify_bundle", "write_bundle"]

CARD_FILE = "README.md"
Check = Mapping[str, NDArray[Any]]
EMBEDDINGS, LOGITS = "embedding.", "logits."
"""Begin the names of outputs."""
AGREES = {
    EMBEDDINGS: ("have a mean cosine of", "{:.4f}"),
    CLASSIFICATION: ("name the same class on", "{:.2%}"),
    MULTILABEL: ("give the same labels, counted one by one, on", "{:.2%}"),
    REGRESSION: ("have an R² of", "{:.4f}"),
    CAPTIONING: ("write the same caption on", "{:.2%}"),
}
"""Kind of output -> how its agreement is told."""


class ParityError(RuntimeError):
    """An exported model does not say what its source says."""


def write_bundle(
    folder: Path,
    *,
    model_path: Path,
    preprocessor: Preprocessor,
    tasks: Mapping[str, Task],
    name: str,
    source: Mapping[str, Any],
    info: Mapping[str, Any],
    runtime: str = RUNTIME,
    graph: Mapping[str, Any] | None = None,
    check: Check | None = None,
) -> dict[str, Any]:
    """Write a bundle and verify it.

    Args:
        folder: where to; made if absent, files of an older bundle are replaced.
        model_path: the model's first file, beside the others that the runtime needs; copied unless it lies there.
        preprocessor: how rows become the graph's inputs.
        tasks: what the outputs say, in their order.
        name: the model's name, for people.
        source: where the model comes from (such as ``fingerprint`` of its training run), JSON values.
        info: what else is known (such as ``precision`` or measured quality), JSON values; the model card lists them.
        runtime: which of :data:`~distill.runtimes.RUNTIMES` the files are for.
        graph: ``inputs`` and ``outputs`` as :func:`distill.export.conversion.convert` gives them; an ONNX file says its
            own.
        check: some rows, ``input.NAME`` [N, ...], and what the source answers, ``output.NAME``: whoever runs the bundle
            first can compare.

    Returns:
        The content of ``bundle.json``: format, version, runtime, inputs, outputs, file hashes, source and info.

    Raises:
        UserError: the tasks do not fit the graph's outputs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = RUNTIMES[runtime]
    graph = describe(onnx.load(model_path)) if graph is None else graph
    _check_tasks(tasks, graph["outputs"])
    (folder / BUNDLE_FILE).unlink(missing_ok=True)  # written last: a folder without it is no bundle
    for file, path in chosen.beside(model_path).items():
        if path.resolve() != (folder / file).resolve():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / file)
    preprocessor.save(folder)
    if preprocessor.tokenizer:
        _settle_tokenizer(folder / TOKENIZER_FILE, preprocessor.tokenizer.max_length)
    write_json(folder / LABELS_FILE, tasks_to_json(tasks))
    content = {
        "format": BUNDLE_FORMAT,
        "version": BUNDLE_VERSION if preprocessor.tokenizer and preprocessor.tokenizer.rows else 1,
        "name": name,
        "runtime": runtime,
        "runtime_version": metadata.version(chosen.package),
        **{key: graph[key] for key in ("opset", "inputs", "outputs") if key in graph},
        "source": dict(source),
        "info": dict(info),
    }
    with atomic(folder / CARD_FILE) as temporary:
        temporary.write_text(model_card(content, tasks, preprocessor), encoding="utf-8")
    names = [*chosen.files, SPEC_FILE, LABELS_FILE, CARD_FILE]
    names += [TOKENIZER_FILE] if preprocessor.tokenizer else []
    (folder / CHECK_FILE).unlink(missing_ok=True)
    if check:
        save_file({name: np.ascontiguousarray(array) for name, array in check.items()}, folder / CHECK_FILE)
        names.append(CHECK_FILE)
    files = {file: {"bytes": (folder / file).stat().st_size, "sha256": sha256_file(folder / file)} for file in names}
    write_json(folder / BUNDLE_FILE, {**content, "files": files})
    return verify_bundle(folder)


def parity(
    source: Mapping[str, NDArray[np.float32]],
    bundle: Mapping[str, NDArray[np.float32]],
    *,
    min_agreement: float,
    tasks: Mapping[str, Task] | None = None,
    ids: Sequence[int] | NDArray[np.int64] | None = None,
    close: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare an exported model with its source on the same rows.

    Args:
        source: output name -> logits [N, C] of the source model, or ``embedding.MODALITY`` -> [N, E] of length 1, zeros
            where the row lacks it.
        bundle: the same outputs, computed by the exported model on its own runtime.
        min_agreement: least agreement: share of rows (0 to 1) on which both name the same class, of labels that both
            give or both withhold, R² of numbers, or mean cosine.
        tasks: what the logits are of; classes where it does not say.
        ids: row ids, for messages and the result; row numbers where absent.
        close: largest difference of a number, relative to the source's largest (at least 1): of a bundle that computes
            the same, where classes alone would not tell what a model of little certainty reads. Not of captions.

    Returns:
        output name -> ``agreement``, ``rows``, ``max_difference`` (absolute, of any number) and ``row``, the id of the
        row that has it.

    Raises:
        ParityError: an output is missing, of another shape, not finite, agrees on too few rows, or is not close.
    """
    names = np.arange(len(next(iter(source.values()), ()))) if ids is None else np.asarray(ids)
    result = {}
    for name, expected in source.items():
        found = bundle.get(name)
        if found is None or found.shape != expected.shape:
            shape = "absent" if found is None else f"of shape {found.shape}"
            raise ParityError(f"output {name!r} is {shape} in the bundle, of shape {expected.shape} in its source")
        difference = np.abs(found.astype(np.float64) - expected).max(axis=1)
        worst = int(np.argmax(difference))  # NaN counts as the largest
        if not np.isfinite(difference[worst]):
            raise ParityError(f"output {name!r} is not finite at row {names[worst]}")
        task = (tasks or {}).get(name.removeprefix(LOGITS))
        kind = EMBEDDINGS if name.startswith(EMBEDDINGS) else task.kind if task else CLASSIFICATION
        entry = {
            "agreement": AGREEMENTS[kind](found, expected),
            "rows": len(expected),
            "max_difference": float(difference[worst]),
            "row": int(names[worst]),
        }
        if not entry["agreement"] >= min_agreement:  # NaN too
            what, form = AGREES[kind]
            shown, least = (form.format(value) for value in (entry["agreement"], min_agreement))
            raise ParityError(
                f"output {name!r}: bundle and source {what} {shown} of {len(expected)} rows, {least} are required; the "
                f"largest difference of a number is {entry['max_difference']:.4g}, at row {entry['row']}"
            )
        limit = np.inf if close is None or kind == CAPTIONING else close * max(1.0, float(np.abs(expected).max()))
        if difference[worst] > limit:
            raise ParityError(
                f"output {name!r}: bundle and source differ by {entry['max_difference']:.4g} at row {entry['row']}, "
                f"{limit:.4g} are allowed of the same computation"
            )
        result[name] = entry
    return result


def _mean_cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Of the rows whose embedding has a direction in the source; a bundle's is as long as there."""
    there = np.any(expected != 0, axis=1)
    return float((found[there].astype(np.float64) * expected[there]).sum(axis=1).mean()) if there.any() else 1.0


def _agreement(kind: str, found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(agreement(kind, found, expected)[0])


AGREEMENTS: dict[str, Callable[[Any, Any], float]] = {
    EMBEDDINGS: _mean_cosine,
    **{kind: partial(_agreement, kind) for kind in KINDS},
}


def _check_tasks(tasks: Mapping[str, Task], outputs: Mapping[str, Mapping[str, Any]]) -> None:
    for name, task in tasks.items():
        if name not in outputs:
            raise UserError(f"labels are given for {name!r}, but the graph's outputs are {', '.join(outputs)}")
        width = outputs[name]["shape"][-1]
        if task.kind != CAPTIONING and width != len(task.names):
            raise UserError(f"task {name!r} has {len(task.names)} names, but its output has {width} numbers a row")


def _settle_tokenizer(path: Path, max_length: int) -> None:
    """Write the recipe's truncation into a ``tokenizer.json``, and no padding: then the file alone says the tokens."""
    tree = read_json(path)  # the library's own save keeps one token an id, and tokens may share one
    cut = {"direction": "Right", "max_length": max_length, "strategy": "LongestFirst", "stride": 0}
    write_json(path, {**tree, "truncation": cut, "padding": None})
