"""The stages after training: export, quantize, evaluate, bench, report."""

from __future__ import annotations

import io
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distill import aware, bench, evaluate
from distill.build import Model, example_batch, input_spec
from distill.bundles import (
    BUNDLES,
    LAYERS_FILE,
    QAT,
    Exported,
    best_found,
    least_agreement,
    least_setting,
    not_run,
    stages_of,
)
from distill.config import FP32, INT8, Recipe
from distill.contracts import AND, TEST, Batch
from distill.data.loader import InputSpec
from distill.data.prepared import PreparedData
from distill.data.texts import Texts
from distill.dual import DualEncoder
from distill.export.bundle import ParityError
from distill.formats import TEXT, Format
from distill.gate import SHIPPED, Gate, bundle_says, towers, unrun
from distill.label_noise import doubts_of, told, write_doubts
from distill.measured import on_devices
from distill.other_teachers import provenance
from distill.predict import RUNTIME, load, verify_bundle
from distill.programs import graph_apart, origin
from distill.progress import progress
from distill.report import ModelEntry, ReportContext, write_report
from distill.report.formats import milliseconds
from distill.retrieval import ZERO_SHOT, Pairs, zero_shot_logits
from distill.runs import read_json
from distill.runtimes import CPU, RUNTIMES
from distill.workspace import STUDENT, TEACHER, Workspace

TRAINED = (TEACHER, "baseline", STUDENT, "pruned")
VERSIONS = ("torch", "transformers", "accelerate", "timm", "onnx", "onnxruntime", "torch-pruning", "numpy")
DOUBTS_FILE = "label_doubts.csv"
PAIR = ("image", "text")


def export_graphs(work: Workspace, folder: Path) -> dict[str, Any]:
    """Write the fp32 graphs of teacher and student, which the bench times, and the gated ``onnx-fp32`` bundle."""
    graphs: dict[str, Any] = {}
    names = (TEACHER, STUDENT)
    with progress("export", quiet=work.quiet) as report:
        for number, name in enumerate(names):
            graphs[name] = aware.export_graph(work, work.model(name), folder / f"{name}.onnx")
            report(number + 1, len(names) + 1, name)
        graphs[SHIPPED], gate = export_shipped(work, folder)
        report(len(names) + 1, len(names) + 1, SHIPPED)
    return {"graphs": {name: graph["bytes"] for name, graph in graphs.items()}, "parity": {FP32: gate}}


def export_shipped(work: Workspace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the gated ``onnx-fp32`` bundle of the shipped model; return what export and gate found."""
    model, export = work.model(SHIPPED), work.recipe.export
    path = folder / f"{SHIPPED}.onnx"
    graph = aware.export_graph(work, model, path)
    info = {"precision": "fp32", "num_params": bench.num_params(model)}
    gate = Gate(work).write(folder / FP32, path, info, least_agreement(export, FP32))
    path.unlink()  # the bundle holds it
    return graph, gate


def quantize_bundles(work: Workspace, folder: Path) -> dict[str, Any]:
    """Write the other gated bundles, for each runtime; those that are calibrated read training rows."""
    config, model = work.recipe.export, work.model(SHIPPED)
    made, found = {}, {}
    names = [name for name in config.bundles if name != FP32]
    with progress("quantize", quiet=work.quiet) as report, tempfile.TemporaryDirectory(dir=folder) as scratch:
        made_from = cache(lambda stage: origin(work, stage, Path(scratch)))
        for number, name in enumerate(names):
            least, kind = least_agreement(config, name), BUNDLES[name]
            assert kind.make is not None
            source = made_from(kind.source)
            gate, sources = source.gate, source.sources
            exported = Exported(
                graph=source.graph,
                program=sources.program,
                feeds=partial(aware.calibration, work, model),
                config=aware.settings(work, model),
                agreement=gate.agreement,
                compared=gate.compared,
                least=least,
                folder=folder,
                progress=partial(progress, quiet=work.quiet),
                ranges=source.ranges,
            )
            path = Path(scratch) / kind.file
            described, made[name] = graph_apart(kind.make(exported, path))
            part = None if described is None else partial(sources.make_part, kind.make, exported)
            info = {"precision": kind.precision, **made[name]}
            try:
                found[name] = gate.write(folder / name, path, info, least, graph=described, part=part)
            except ParityError as error:
                raise ParityError(f"{name}: {error}{best_found(made[name], least_setting(config, name))}") from None
            report(number + 1, len(names), name)
    return {**made.pop(INT8, {}), **({"others": made} if made else {}), "parity": found}


def evaluate_all(work: Workspace, folder: Path) -> dict[str, Any]:
    """Predict the test rows with every model: the trained ones in torch, each bundle on its runtime."""
    data = work.data()
    rows = data.rows(TEST)
    targets = {f"target.{task}": values[rows] for task, values in data.targets.items()}
    if work.recipe.retrieval is not None:
        targets |= _retrieval_targets(work)
    evaluate.write_arrays(
        folder / "targets.safetensors", {"ids": data.ids[rows], "group": data.groups[rows], **targets}
    )
    bundles = [name for name in stages_of(work.recipe.export) if not not_run(name)]
    names = [*TRAINED, *bundles]
    with progress("evaluate", quiet=work.quiet) as report:
        for number, name in enumerate(names):
            arrays = _bundle_arrays(work, name) if name in bundles else _torch_arrays(work, work.model(name), name)
            evaluate.write_arrays(folder / f"{name}.safetensors", {"ids": data.ids[rows], **arrays})
            report(number + 1, len(names), name)
    return {"rows": len(rows), "models": names}


def _retrieval_targets(work: Workspace) -> dict[str, NDArray[Any]]:
    pairs = work.pairs(TEST)
    return {
        f"{part}.{name}": values
        for part, found in zip(pairs._fields, pairs, strict=True)
        for name, values in found.items()
    }


def _torch_arrays(work: Workspace, model: Model, name: str) -> evaluate.Arrays:
    reads = TEACHER if name == TEACHER else STUDENT
    spec = input_spec(model)
    loader = work.towers(work.clean_loader(TEST, spec, reads), model, reads)
    subsets = [] if isinstance(model, DualEncoder) else evaluate.subsets_of(list(model.encoders))
    wanted = PAIR if work.recipe.retrieval is not None else ()
    arrays = evaluate.predict_torch(model, evaluate.clean_batches(loader, reads), subsets=subsets, embeddings=wanted)

    def read(batches: Callable[[], Iterator[Batch]]) -> evaluate.Arrays:
        return evaluate.predict_torch(model, batches, embeddings=["text"])

    return arrays | _zero_shot(work, spec, reads, arrays, read)


def bundle_folder(work: Workspace, name: str) -> Path:
    """Where a bundle lies."""
    return work.path(stages_of(work.recipe.export)[name]) / name


def _bundle_arrays(work: Workspace, name: str) -> evaluate.Arrays:
    model, bundle = work.model(SHIPPED), bundle_folder(work, name)
    spec = input_spec(model)
    batches = evaluate.clean_batches(work.clean_loader(TEST, spec, STUDENT), STUDENT)
    wanted = PAIR if work.recipe.retrieval is not None else ()
    arrays = bundle_says(model, bundle, batches, wanted)
    alone, formats = towers(model, bundle), work.preprocessor(spec).formats
    texts = load(alone.get("text", bundle))

    def read(batches: Callable[[], Iterator[Batch]]) -> evaluate.Arrays:
        whole = batches if alone else lambda: (with_blanks(batch, formats) for batch in batches())
        return evaluate.predict_bundle(texts, whole, embeddings=["text"])

    return arrays | _zero_shot(work, spec, STUDENT, arrays, read)


def with_blanks(batch: Batch, formats: Mapping[str, Format]) -> Batch:
    """Texts alone, as a graph reads them that has inputs of other modalities too."""
    arrays = {name: shape for item in formats.values() for name, shape in item.arrays.items()}
    blank = {
        name: torch.zeros((len(batch.ids), *shape), dtype=getattr(torch, kind))
        for name, (kind, shape) in arrays.items()
    }
    return batch._replace(inputs={**blank, **batch.inputs})


def _zero_shot(
    work: Workspace,
    spec: InputSpec,
    reads: str,
    arrays: evaluate.Arrays,
    read: Callable[[Callable[[], Iterator[Batch]]], evaluate.Arrays],
) -> evaluate.Arrays:
    """Logits of the tasks whose classes have prompts, from a model's embeddings of images and of the prompts."""
    config, found = work.recipe.retrieval, {}
    for task, templates in ({} if config is None else config.prompts).items():
        prompts = read(evaluate.clean_batches(work.prompts_loader(spec, reads, task, templates), reads))
        images = arrays["embedding.image"]
        scale = 1.0 if config is None else config.logit_scale
        found[f"logits.{task}{ZERO_SHOT}"] = zero_shot_logits(images, prompts["embedding.text"], len(templates), scale)
    return found


def bench_all(work: Workspace, folder: Path) -> dict[str, Any]:
    """Measure every graph on its runtime, on one test row whose text has the median length."""
    recipe, export = work.recipe, work.path("export")
    models = {name: work.model(name) for name in (TEACHER, STUDENT, SHIPPED)}
    feeds = {name: median_row(work, model) for name, model in models.items()}
    graphs = {name: export / f"{name}.onnx" for name in (TEACHER, STUDENT)}
    timed = {name: bench.Timed(graph, feeds[name], provider=recipe.bench.provider) for name, graph in graphs.items()}
    bundles = [name for name in recipe.export.bundles if not not_run(name)]
    timed |= {name: timed_bundle(work, name, feeds[SHIPPED]) for name in bundles}
    settings = {"repeats": recipe.bench.repeats, "threads": recipe.bench.threads}
    with progress("bench", quiet=work.quiet) as report:
        measured = bench.bench_models(timed, **settings, neighbour=FP32)
        report(1, 1)
    for name, model in models.items():
        length = feeds[name]["text"].shape[1] if "text" in feeds[name] else 0
        one = example_batch(input_spec(model), recipe.data, rows=1, length=length)
        entry = measured.setdefault(name, dict(measured[FP32]))  # the fp32 bundle is the shipped model's graph
        entry |= {"flops": bench.flops(model, one), "num_params": bench.num_params(model)}
    costs = {field: measured[SHIPPED][field] for field in ("flops", "num_params")}
    for name in bundles:
        measured[name] |= costs
    measured["baseline"] = dict(measured[STUDENT])  # the same architecture, so the same graph but for its weights
    return {"models": measured, "processor": platform.processor() or platform.machine()}


def timed_bundle(work: Workspace, name: str, feeds: bench.Feeds) -> bench.Timed:
    """A bundle as it is timed."""
    kind, folder = BUNDLES[name], bundle_folder(work, name)
    provider = work.recipe.bench.provider if kind.runtime == RUNTIME else CPU
    return bench.Timed(folder / kind.file, feeds, kind.runtime, verify_bundle(folder), provider)


def median_row(work: Workspace, model: Model, split: str = TEST) -> dict[str, NDArray[Any]]:
    """The inputs of one row of a split, whose text has the median length."""
    spec = input_spec(model)
    loader = work.clean_loader(split, spec, TEACHER)
    rows = loader.row_positions
    if spec.tokenizer is not None:
        batch = loader.batch(rows, loader.clean_views(len(rows)))[TEACHER]
        lengths = batch.inputs["text_mask"].sum(1).numpy()
        rows = rows[np.argsort(lengths, kind="stable")[len(rows) // 2 :]]
    return evaluate.feeds(loader.batch(rows[:1], loader.clean_views(1))[TEACHER])


def write_run_report(work: Workspace, folder: Path) -> dict[str, Any]:
    """Write ``report.json``, ``report.md`` and ``report.html``, and the labels that the teacher doubts."""
    recipe, data = work.recipe, work.data()
    predictions = work.path("evaluate")
    kept = evaluate.read_arrays(predictions / "targets.safetensors")
    measured = work.done["bench"].info["models"]
    run = [name for name in recipe.export.bundles if name in measured and name in work.done["evaluate"].info["models"]]
    fused = recipe.teacher.fusion is not None or recipe.student.fusion is not None
    tasks = dict(data.tasks) if fused else {}
    doubts = doubts_of(work)
    write_doubts(folder / DOUBTS_FILE, data.tasks, doubts)
    gates = {**work.done["export"].info["parity"], **work.done["quantize"].info["parity"]}
    pairs = None
    if recipe.retrieval is not None:
        tasks |= {f"{task}{ZERO_SHOT}": data.tasks[task] for task in recipe.retrieval.prompts}
        pairs = Pairs(*({name: kept[f"{part}.{name}"] for name in PAIR} for part in Pairs._fields))
    context = ReportContext(
        name=recipe.name,
        recipe=recipe.model_dump(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tasks=tasks,
        targets={task: kept[f"target.{task.removesuffix(ZERO_SHOT)}"] for task in tasks},
        pairs=pairs,
        groups=kept["group"],
        ids=kept["ids"],
        shown=shown_alike(data, data.rows(TEST)),
        models=[_entry(work, name, predictions, measured[name]) for name in (*TRAINED, *run)],
        data={
            **work.done["data"].info,
            "fingerprint": work.done["data"].fingerprint,
            "test_fingerprint": data.fingerprint(TEST),
        },
        seeds=[recipe.seed],
        versions=_versions(recipe) | {"python": platform.python_version()},
        curves={name: _curve(work.path(stage) / "metrics.jsonl") for name, stage in _trainings(work).items()},
        costs={name: artifact.info["cost"] for name, artifact in work.done.items() if "cost" in artifact.info},
        cache={k: v for k, v in work.done["cache"].info.items() if k != "cost"} if "cache" in work.done else {},
        teachers=provenance(recipe),
        parity={name: gate for name, gate in gates.items() if "not_run" not in gate},
        not_run=unrun({name: bundle_folder(work, name) for name in recipe.export.bundles if name not in run}),
        quantized=_layers(work),
        doubts={task: told(data.tasks[task], splits, recipe.report.examples) for task, splits in doubts.items()},
        measured=on_devices(recipe.report, (work.path("export"), work.path("quantize"))),
        examples=lambda row: _example(work, row),
        num_examples=recipe.report.examples,
        resamples=recipe.report.bootstrap,
    )
    report = write_report(context, folder)
    return {"title": report["headline"]["title"]}


def shown_alike(data: PreparedData, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Numbers that rows share which show models the same, as an image with several captions does; None of series and
    tables, whose rows are all different.
    """
    if not data.present.keys() <= {*data.codes, TEXT}:
        return None
    shown = [codes[rows] for codes in data.codes.values()]
    if TEXT in data.present:
        assert isinstance(data.texts, Texts)
        shown.append(data.texts.numbers[rows])
    return np.unique(np.stack(shown), axis=1, return_inverse=True)[1].reshape(-1)


def _versions(recipe: Recipe) -> dict[str, str]:
    """Of what every run is made with, and of the runtimes of its bundles."""
    runtimes = (RUNTIMES[BUNDLES[name].runtime].package for name in recipe.export.bundles)
    return {name: _version(name) for name in (*VERSIONS, *runtimes)}


def _version(package: str) -> str:
    """Finished bundles of a runtime may be reported where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _layers(work: Workspace) -> dict[str, Any]:
    """What the static int8 bundle's stage found out about its layers; runs of earlier versions have none."""
    file = work.path("quantize") / LAYERS_FILE
    return {INT8: read_json(file)} if file.is_file() else {}


def _entry(work: Workspace, name: str, predictions: Path, measured: Mapping[str, Any]) -> ModelEntry:
    arrays = evaluate.read_arrays(predictions / f"{name}.safetensors")
    subsets: dict[str, dict[str, Any]] = {}
    for key, values in arrays.items():
        if key.startswith("subset."):
            _, modalities, task = key.split(".")
            subsets.setdefault(modalities, {})[task] = values
    threads, beside = measured["threads"], measured.get("neighbour_p50_ms")
    device = measured.get("device", "CPU")
    note = f"{measured['runtime']} {device}, batch 1, {threads} thread{'s' if threads > 1 else ''}"
    return ModelEntry(
        name=name,
        stage=stages_of(work.recipe.export).get(name, name),
        runtime=BUNDLES[name].runtime if name in BUNDLES else "torch",
        logits={key.removeprefix("logits."): values for key, values in arrays.items() if key.startswith("logits.")},
        embeddings={name: arrays[f"embedding.{name}"] for name in PAIR if f"embedding.{name}" in arrays},
        subsets={name: subsets[name] for name in sorted(subsets, key=lambda name: (name.count(AND), name))},
        num_params=measured["num_params"],
        flops=measured["flops"],
        size_bytes=measured["size_bytes"],
        latency_ms=measured["latency_ms"],
        latency_note=note if beside is None else f"{note}; in turns with {FP32}, which took {milliseconds(beside)}",
        peak_memory_bytes=measured["peak_memory_bytes"],
        seeds=[work.recipe.seed],
        source=SHIPPED if name in BUNDLES else None,
    )


def _trainings(work: Workspace) -> dict[str, str]:
    """Model -> the stage that trained it; of bundles the first."""
    aware_of = [name for name in work.recipe.export.bundles if BUNDLES[name].source == QAT]
    return {name: name for name in TRAINED} | ({aware_of[0]: QAT} if QAT in work.done else {})


def _curve(file: Path) -> list[dict[str, Any]]:
    """What was logged of each epoch, without numbers that were none."""
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    finite = [{name: value for name, value in entry.items() if value is not None} for entry in entries]
    return [{**entry, "train_loss": entry["train/loss"]} for entry in finite]


def _example(work: Workspace, row_id: int) -> dict[str, Any]:
    data = work.data()
    (row,) = np.flatnonzero(data.ids == row_id)
    picture = None
    if "image" in data.arrays and data.present["image"][row]:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(data.arrays["image"][row].transpose(1, 2, 0))).save(buffer, "PNG")
        picture = buffer.getvalue()
    return {"image_png": picture, "text": data.texts[int(row)]}
