"""Size, speed and faithfulness of compressed models: ``python -m benchmarks.compress --markdown compress.md``.

Models of random weights, whole and pruned by half, in several precisions, on every runtime that is installed. Each cell
is made in a process of its own, as lowering takes minutes and sets flags for a whole process. Then, for each model and
runtime, all its cells and the eager model are timed in one process, in short rounds that take turns: one row, one
thread. A cell that cannot be made keeps its reason. What is finished is kept, so a second call goes on, and prints.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch

from benchmarks.compress_models import MODELS, build, rows
from benchmarks.seed_tables import add_outputs, command_line, put_out, table
from distill import evaluate
from distill.bench import time_rounds
from distill.config import QuantizeConfig
from distill.contracts import UserError
from distill.export.conversion import EXPORTERS, convert
from distill.export.onnx import export_onnx, graph_outputs
from distill.export.torch_program import export_program
from distill.quantization.dynamic import quantize_dynamic
from distill.quantization.places import graph_ranges
from distill.quantization.static import quantize_static
from distill.runs import read_json, write_json
from distill.runtimes import RUNTIMES

VERSION = 2  # raised when the code changes what a cell is
DENSITIES = ("dense", "pruned")
PRECISIONS = ("fp32", "int8 dynamic", "int8 static", "int8 QAT")
CALIBRATED, CHECKED = 64, 8
"""Rows that static int8 is calibrated on, and that outputs are compared on."""
SECONDS = 1200
"""After which a process is given up."""
NEEDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "executorch": "executorch", "litert": "ai_edge_litert"}
NONE = {("onnxruntime", "int8 QAT"): "the graph of int8 static with other numbers, so its size and speed"}
"""Cells that there are not, and why."""


class Cell(NamedTuple):
    """One artifact."""

    model: str
    density: str
    precision: str
    runtime: str


def cells(models: Sequence[str], runtimes: Sequence[str]) -> Iterator[Cell]:
    """All cells in the order of the table."""
    for model in models:
        for runtime in runtimes:
            for density in DENSITIES:
                for precision in PRECISIONS:
                    yield Cell(model, density, precision, runtime)


def folder_of(output: Path, cell: Cell) -> Path:
    """Where a cell lies."""
    return output / cell.model / cell.density / f"{cell.runtime}-{cell.precision.replace(' ', '-')}"


def make(output: Path, cell: Cell) -> dict[str, Any]:
    """Make a cell's artifact, run it on its runtime, and return what is known of it.

    Returns:
        ``bytes`` of the model's files, ``cosine`` (the lowest over rows and outputs, against the eager model of the
        same density in float), ``graph`` (inputs and outputs) and ``seconds`` that it took.
    """
    began, folder = time.perf_counter(), folder_of(output, cell)
    folder.mkdir(parents=True, exist_ok=True)
    model = eager(output, cell.model, cell.density)
    graph = MAKERS[cell.runtime](output, cell, model, folder)
    files = RUNTIMES[cell.runtime].files
    opened = RUNTIMES[cell.runtime](folder / files[0], graph)
    checked = rows(cell.model, CHECKED, seed=2)
    with torch.no_grad():
        expected = {name: value.numpy() for name, value in graph_outputs(model(checked)).items()}
    found = opened.run(evaluate.feeds(checked))
    return {
        "bytes": sum((folder / file).stat().st_size for file in files),
        "cosine": min(lowest_cosine(found[name], value) for name, value in expected.items()),
        "graph": graph,
        "version": opened.version,
        "seconds": time.perf_counter() - began,
    }


def eager(output: Path, name: str, density: str) -> Any:
    """The model in torch."""
    place = output / name
    place.mkdir(parents=True, exist_ok=True)
    return build(name, output / "weights", pruned=place / "plan.json" if density == "pruned" else None)


def lowest_cosine(found: Any, expected: Any) -> float:
    """The lowest cosine of two outputs [N, D] over rows."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / np.maximum(norms, 1e-12)).min())


def calibration(name: str) -> list[dict[str, Any]]:
    """Rows that static int8 is calibrated on, in batches."""
    return [evaluate.feeds(rows(name, 16, seed=100 + number)) for number in range(CALIBRATED // 16)]


def _onnx(output: Path, cell: Cell, model: Any, folder: Path) -> dict[str, Any]:
    path = output / cell.model / cell.density / "model.onnx"
    described = path.with_suffix(".json")
    if not described.is_file():
        made = export_onnx(model, rows(cell.model, 2, seed=0), path)
        write_json(described, {name: made[name] for name in ("inputs", "outputs")})
    graph, target = read_json(described), folder / "model.onnx"
    config = QuantizeConfig()
    if cell.precision == "fp32":
        target.write_bytes(path.read_bytes())
    elif cell.precision == "int8 dynamic":
        quantize_dynamic(path, target, [], config)
    else:
        quantize_static(path, target, calibration(cell.model), config)
    return graph


def _converted(output: Path, cell: Cell, model: Any, folder: Path) -> dict[str, Any]:
    suffix, place = EXPORTERS[cell.runtime].source, output / cell.model / cell.density
    source, graph, learnt = place / f"source{suffix}", place / "source.onnx", None
    trained = cell.precision == "int8 QAT"
    if (trained or source == graph) and not graph.is_file():
        export_onnx(model, rows(cell.model, 2, seed=0), graph)
    if not source.is_file():
        export_program(model, rows(cell.model, 2, seed=0), source, rows=1)
    if trained:
        int8 = folder / "ranges.onnx"
        quantize_static(graph, int8, calibration(cell.model), QuantizeConfig())
        learnt = None if source == graph else (graph, graph_ranges(onnx.load(int8).graph))
        source = int8 if source == graph else source
    feeds = calibration(cell.model) if cell.precision == "int8 static" or learnt else None
    made = convert(cell.runtime, source, folder, feeds=feeds, dynamic=cell.precision == "int8 dynamic", learnt=learnt)
    return {name: made[name] for name in ("inputs", "outputs", "ranges") if name in made}


MAKERS: dict[str, Callable[[Path, Cell, Any, Path], dict[str, Any]]] = {
    "onnxruntime": _onnx,
    **dict.fromkeys(EXPORTERS, _converted),
}
"""Runtime -> writes a cell's model into a folder and returns its inputs and outputs."""


def time_cells(output: Path, model: str, runtime: str, repeats: int) -> dict[str, Any]:
    """Time all cells of a model on a runtime, and the eager dense model, in turns: one row, one thread.

    Returns:
        "eager" and cell -> ``p50_ms`` and ``spread_ms``, the smallest and largest median of a round.
    """
    torch.set_num_threads(1)
    whole, one = eager(output, model, "dense"), rows(model, 1, seed=3)
    feeds = evaluate.feeds(one)
    calls: dict[str, Callable[[], object]] = {"eager": torch.no_grad()(partial(whole, one))}
    for cell in cells([model], [runtime]):
        made = known(output, cell)
        if made is not None and "graph" in made:
            opened = RUNTIMES[runtime](folder_of(output, cell) / RUNTIMES[runtime].files[0], made["graph"])
            calls[f"{cell.density} {cell.precision}"] = partial(opened.run, feeds)
    seconds = time_rounds(calls, repeats)
    medians = {name: np.median(values * 1e3, axis=1) for name, values in seconds.items()}
    return {
        name: {
            "p50_ms": float(np.median(values * 1e3)),
            "spread_ms": [float(medians[name].min()), float(medians[name].max())],
        }
        for name, values in seconds.items()
    }


def known(output: Path, cell: Cell) -> dict[str, Any] | None:
    """What is known of a cell: its artifact, or the reason why there is none; None where it was not tried."""
    if (cell.runtime, cell.precision) in NONE:
        return {"reason": NONE[cell.runtime, cell.precision]}
    file = folder_of(output, cell) / "cell.json"
    found = read_json(file) if file.is_file() else {}
    return dict(found["found"]) if found.get("version") == VERSION else None


def in_own_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Run this file with arguments; return what it printed last, or the reason why it failed."""
    command = [sys.executable, "-m", "benchmarks.compress", *arguments]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done after {SECONDS // 60} minutes"}
    if child.returncode == 0:
        return dict(json.loads(child.stdout.splitlines()[-1]))
    lines = [line for line in child.stderr.splitlines() if line.strip()] or [f"exit code {child.returncode}"]
    return {"reason": lines[-1].strip()[:200]}


def run(options: argparse.Namespace) -> None:
    """Make and time what there is not yet."""
    output, wanted = options.output, list(cells(options.models, options.runtimes))
    fresh: set[tuple[str, str]] = set()
    for number, cell in enumerate(wanted):
        found = known(output, cell)
        if found is None or (options.again and "reason" in found and (cell.runtime, cell.precision) not in NONE):
            print(f"{number + 1}/{len(wanted)} {' '.join(cell)}", file=sys.stderr, flush=True)
            found = in_own_process(["--output", str(output), "--cell", json.dumps(cell)])
            folder_of(output, cell).mkdir(parents=True, exist_ok=True)
            write_json(folder_of(output, cell) / "cell.json", {"version": VERSION, "found": found})
            fresh.add((cell.model, cell.runtime))
    for model in options.models:
        for runtime in options.runtimes:
            file = times_file(output, model, runtime)
            if (model, runtime) in fresh or not file.is_file():
                print(f"time {model} on {runtime}", file=sys.stderr, flush=True)
                asked = ["--output", str(output), "--time", model, runtime, "--repeats", str(options.repeats)]
                write_json(file, in_own_process(asked))


def times_file(output: Path, model: str, runtime: str) -> Path:
    """Where the times of a model's cells on a runtime are kept."""
    return output / model / f"times-{runtime}.json"


def markdown(options: argparse.Namespace, command: str) -> str:
    """All tables, one a model, and what is missing with its reason."""
    parts = [f"# Compressed models by runtime\n\n    {command}\n\n{ABOUT}"]
    for model in options.models:
        lines, holes = [], dict[tuple[str, str], list[str]]()
        for runtime in options.runtimes:
            timed = read_json(times_file(options.output, model, runtime))
            for cell in cells([model], [runtime]):
                found = known(options.output, cell) or {"reason": "not made"}
                name = f"{cell.density} {cell.precision}"
                if "reason" in found or name not in timed:
                    why = str(found.get("reason") or timed.get("reason", "not timed"))
                    holes.setdefault((f"{cell.precision} on {runtime}", why), []).append(cell.density)
                    continue
                lines.append([runtime, cell.density, cell.precision, *figures(found, timed, name)])
        parts.append(f"## {model}: {MODELS[model].about}\n\n{table(TITLES, lines)}")
        if holes:
            parts.append("Not there:\n\n" + "\n".join(told(hole, densities) for hole, densities in holes.items()))
    return "\n\n".join(parts) + "\n"


def told(hole: tuple[str, str], densities: Sequence[str]) -> str:
    """A line about cells that there are not, which of both densities are alike."""
    which = "" if set(densities) == set(DENSITIES) else f"{densities[0]} "
    return f"- {which}{hole[0]}: {hole[1]}"


TITLES = ("runtime", "density", "precision", "MiB", "p50, ms", "rounds", "x eager", "x dense fp32", "cosine")
ABOUT = (
    "One row, one thread; p50 of interleaved rounds, with the smallest and largest median of a round. x eager: how\n"
    "many times faster than the dense model in torch; x dense fp32: than the dense fp32 model on the same runtime, in\n"
    "the same process. Cosine: the lowest over rows and outputs to the eager model of the same density. Weights are\n"
    "random, so cosines show faithful conversion and no accuracy: int8 QAT is the graph that a model trained for int8\n"
    "gets, with ranges that were calibrated on onnxruntime's and go where learnt ones go."
)


def figures(found: dict[str, Any], timed: dict[str, Any], name: str) -> list[str]:
    """A line's numbers as text."""
    p50, (low, high) = timed[name]["p50_ms"], timed[name]["spread_ms"]
    whole = timed.get("dense fp32", {}).get("p50_ms")
    against = "" if whole is None else f"{whole / p50:.2f}"
    eager_ratio = f"{timed['eager']['p50_ms'] / p50:.2f}"
    size = f"{found['bytes'] / 2**20:.2f}"
    return [size, f"{p50:.2f}", f"{low:.2f}–{high:.2f}", eager_ratio, against, f"{found['cosine']:.4f}"]


def floors(options: argparse.Namespace) -> list[str]:
    """The promises of :data:`FLOORS`, with what was measured."""
    lines = []
    for model, runtime, density, precision, least in FLOORS:
        if model not in options.models or runtime not in options.runtimes:
            continue
        timed = read_json(times_file(options.output, model, runtime))
        one, whole = (timed.get(name, {}).get("p50_ms") for name in (f"{density} {precision}", "dense fp32"))
        ratio = f"{whole / one:.2f} times as fast as dense fp32" if one and whole else "not measured"
        lines.append(f"- {model}, {density} {precision} on {runtime}: {ratio}, expected at least {least}")
    if "fused" in options.models and "onnxruntime" in options.runtimes:
        small, whole = (
            (known(options.output, Cell("fused", *which, "onnxruntime")) or {}).get("bytes")
            for which in (("pruned", "int8 static"), ("dense", "fp32"))
        )
        share = f"{small / whole:.3f} of dense fp32's bytes" if small and whole else "not measured"
        lines.append(f"- fused, pruned int8 static on onnxruntime: {share}, expected at most {1 / 6:.3f}")
    return lines


FLOORS = (
    ("fused", "onnxruntime", "dense", "int8 static", 1.4),
    ("fused", "executorch", "dense", "int8 static", 1.6),
    ("fused", "onnxruntime", "pruned", "fp32", 1.7),
)
"""Model, runtime, density, precision, and how many times faster than dense fp32 it is to be, with VNNI."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    installed = [name for name, module in NEEDS.items() if importlib.util.find_spec(module)]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compress", description=__doc__, formatter_class=raw)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", default=installed, choices=list(NEEDS), help="default: installed ones")
    parser.add_argument("--output", type=Path, default=Path("runs/compress"), help="folder of all that is made")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of ten runs")
    parser.add_argument("--again", action="store_true", help="try cells once more that could not be made")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    add_outputs(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Make and time what there is not yet, and print the tables."""
    options = parse(arguments)
    if options.cell:
        print(json.dumps(make(options.output, Cell(*options.cell))))
    elif options.time:
        print(json.dumps(time_cells(options.output, *options.time, options.repeats)))
    else:
        run(options)
        command = command_line("benchmarks.compress", arguments)
        text = markdown(options, command) + "\n" + "\n".join(floors(options)) + "\n"
        put_out(options, text, {"command": command})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
