"""Models and bundles that the tests of runtimes share."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export_models import LABELS, as_feeds, rows, tiny_preprocessor, trained
from tiny import NUM_CLASSES, around, make_batch, make_model, write_wordpiece
from torch import nn

from distill.contracts import Batch
from distill.export.bundle import write_bundle
from distill.export.conversion import EXPORTERS, convert
from distill.export.onnx import export_onnx, graph_outputs
from distill.export.torch_program import export_program
from distill.predict import Predictor, load
from distill.runtimes import RUNTIMES
from distill.targets import tasks_from_json
from students import RecurrentText

LENGTH = 6
"""Tokens of the longest text."""
PRECISIONS = {
    "onnxruntime": ("fp32",),
    "openvino": ("fp32", "bf16", "int8", "dynamic"),
    "executorch": ("fp32", "int8", "dynamic"),
    "litert": ("fp32", "int8", "dynamic"),
    "coreml": ("fp32", "fp16"),
}
TINY_LABELS = {task: [f"{task} {number}" for number in range(count)] for task, count in NUM_CLASSES.items()}


@cache
def model_of(kind: str) -> nn.Module:
    """ConvNet and token embeddings with fusion, a GRU that reads texts, or the stand-in, which has learnt its rows."""
    if kind == "learnt":
        return trained()
    with tempfile.TemporaryDirectory() as folder:
        file = write_wordpiece(Path(folder) / "tokenizer.json")
        if kind != "gru":
            return make_model(file, fusion=kind).eval()
        torch.manual_seed(0)
        text = RecurrentText(tokenizer_file=file, vocab_size=64, dim=16, hidden=16, cell="gru", max_length=LENGTH)
        return around({"text": text}).eval()


def batch_of(kind: str, count: int, length: int = LENGTH, seed: int = 0) -> Batch:
    """Rows as the model of this kind reads them."""
    if kind == "learnt":
        return rows(count, length, seed=seed)
    batch = make_batch(count, length, seed=seed)
    if kind == "gru":
        inputs = {name: value for name, value in batch.inputs.items() if name != "image"}
        return batch._replace(inputs=inputs, present={"text": batch.present["text"]})
    batch.present["text"][1::3] = False
    batch.present["image"][2::3] = False
    for name, value in batch.inputs.items():
        value[~batch.present[name.split("_")[0]]] = 0
    return batch


@cache
def source_of(kind: str, suffix: str) -> Path:
    """The model as an exporter takes it."""
    path = Path(tempfile.mkdtemp()) / f"model{suffix}"
    if suffix == ".onnx":
        export_onnx(model_of(kind), batch_of(kind, 4), path)
    else:
        export_program(model_of(kind), batch_of(kind, 4), path, rows=1)
    return path


@cache
def bundle_of(kind: str, runtime: str, precision: str = "fp32") -> Path:
    """A bundle, made once."""
    folder = Path(tempfile.mkdtemp())
    source = source_of(kind, EXPORTERS[runtime].source if runtime in EXPORTERS else ".onnx")
    graph: dict[str, Any] | None = None
    if runtime in EXPORTERS:
        feeds = [as_feeds(batch_of(kind, 32, seed=100 + number)) for number in range(2)]
        made: dict[str, Any] = {"int8": {"feeds": feeds}, "dynamic": {"dynamic": True}}
        graph = convert(runtime, source, folder, **made.get(precision, {"precision": precision}))
        source = folder / RUNTIMES[runtime].files[0]
    write_bundle(
        folder / "bundle",
        model_path=source,
        preprocessor=tiny_preprocessor(folder / "tokenizer", image_size=16 if kind != "learnt" else 32),
        tasks=tasks_from_json(LABELS if kind == "learnt" else TINY_LABELS),
        name=kind,
        source={},
        info={"precision": precision},
        runtime=runtime,
        graph=graph,
    )
    return folder / "bundle"


def said(kind: str, batch: Batch) -> dict[str, np.ndarray]:
    """What the torch model says."""
    with torch.no_grad():
        return {name: value.numpy() for name, value in graph_outputs(model_of(kind)(batch)).items()}


def answers(bundle: Path, batch: Batch) -> tuple[Predictor, dict[str, np.ndarray]]:
    """What a bundle says on its runtime."""
    predictor = load(bundle)
    return predictor, predictor.run(as_feeds(batch))


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    return float((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected))


def predicted_without(module: str, bundle: Path) -> list[dict[str, Any]]:
    """What ``distill predict`` says in a process in which a module cannot be imported."""
    code = (
        "import json, sys\n"
        f"sys.modules[{module!r}] = None\n"
        "from distill.predict import predict_rows\n"
        f"print(json.dumps(predict_rows({str(bundle)!r}, {{'text': ['red', 'blue cat']}})))\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def measured(kinds: list[str], runtimes: list[str]) -> Iterator[str]:
    """Lines of a table; bundles of a model are timed in turns, so that a disturbance hits all alike."""
    for kind in kinds:
        batch, one = batch_of(kind, 64, seed=5), as_feeds(batch_of(kind, 1, seed=6))
        expected, calls = said(kind, batch), {}
        found: dict[tuple[str, str], tuple[int, float]] = {}
        for runtime in ("onnxruntime", *runtimes):
            for precision in PRECISIONS[runtime]:
                predictor, values = answers(bundle_of(kind, runtime, precision), batch)
                size = sum(predictor.info["files"][file]["bytes"] for file in RUNTIMES[runtime].files)
                worst = max(float(np.abs(values[name] - value).max()) for name, value in expected.items())
                found[runtime, precision] = (size, worst)
                calls[runtime, precision] = partial(predictor.run, one)
        seconds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
        for _ in range(300):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        for name, (size, worst) in found.items():
            latency = f"{1e3 * float(np.median(seconds[name])):.3f}"
            yield f"| {kind} | {name[0]} | {name[1]} | {size} | {worst:.1e} | {latency} |"
