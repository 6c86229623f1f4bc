"""What a model costs where it runs: latency, memory and size on the exported runtime; FLOPs and parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from distill.contracts import Batch
from distill.predict import RUNTIME
from distill.runtimes import CPU, RUNTIMES, Runtime, open_model

if TYPE_CHECKING:
    from torch import nn

Feeds = Mapping[str, NDArray[Any]]

WARM_UP_RUNS = 20
ROUND_RUNS = 10
LOADS = 3
MEMORY_RUNS = 5

MEMORY_MEANING = (
    "peak resident memory of a fresh process that loaded the model and ran it a few times, minus its own peak "
    "before that, with the runtime imported"
)


class Timed(NamedTuple):
    """A model to measure.

    Attributes:
        path: the first of its files.
        feeds: the inputs to time it with; their first dimension is the batch.
        runtime: one of :data:`~distill.runtimes.RUNTIMES`.
        graph: ``inputs`` and ``outputs`` as ``bundle.json`` has them; an ONNX file says its own.
        provider: of onnxruntime.
    """

    path: Path
    feeds: Feeds
    runtime: str = RUNTIME
    graph: Mapping[str, Any] = {}
    provider: str = CPU

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in RUNTIMES[self.runtime].beside(self.path).values())


def bench_models(
    models: Mapping[str, Timed], *, repeats: int, threads: int = 1, neighbour: str | None = None
) -> dict[str, Any]:
    """Measure models side by side, those of each runtime by themselves.

    All models of a runtime are warmed up, then timed in short rounds that take turns and change their order, so that a
    disturbance of the machine hits all alike. Runtimes follow one another, as threads of one may wait in the time of
    another; ``neighbour`` takes turns with each of them, so that its times tell whether the machine was as fast.

    Args:
        models: name -> what is measured.
        repeats: timed runs a model, at least.
        threads: threads inside an operator.
        neighbour: a model that is timed beside those of other runtimes too.

    Returns:
        For each model: ``latency_ms`` (``p50``, ``p95``, ``p99``, and ``p50_spread``: the smallest and the largest
        median of a round), ``load_ms`` (median), ``peak_memory_bytes`` (see ``peak_memory``; None where the system
        does not tell), ``peak_memory`` (what that is), ``size_bytes``, ``runtime``, ``device``, ``batch``, ``threads``,
        ``runs``, and, where the neighbour was timed beside it, ``neighbour_p50_ms``.

    Raises:
        UserError: a model file is missing or cannot be loaded.
    """
    found: dict[str, dict[str, Any]] = {}
    for runtime in dict.fromkeys(model.runtime for model in models.values()):
        group = {name: model for name, model in models.items() if model.runtime == runtime}
        beside = {} if neighbour is None or neighbour in group else {neighbour: models[neighbour]}
        timed = _bench_together({**group, **beside}, repeats, threads)
        for name in group:
            found[name] = {**timed[name], **_measures(models[name], threads)}
            if neighbour in beside:
                found[name]["neighbour_p50_ms"] = timed[neighbour]["latency_ms"]["p50"]
    return {name: found[name] for name in models}


def _bench_together(models: Mapping[str, Timed], repeats: int, threads: int) -> dict[str, Any]:
    """Load models and time them in turns."""
    opened: dict[str, Runtime] = {}
    loads: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(LOADS):
        for name, model in models.items():
            start = time.perf_counter()
            opened[name] = _opened(model, threads)
            loads[name].append(time.perf_counter() - start)
    calls = {name: partial(runtime.run, models[name].feeds) for name, runtime in opened.items()}
    rounds = time_rounds(calls, max(1, -(-repeats // ROUND_RUNS)))
    return {
        name: {
            "latency_ms": _summary(rounds[name]),
            "load_ms": float(np.median(loads[name]) * 1e3),
            "runtime": f"{model.runtime} {opened[name].version}",
            "device": opened[name].device,
            "runs": rounds[name].size,
        }
        for name, model in models.items()
    }


def _measures(model: Timed, threads: int) -> dict[str, Any]:
    """What is measured of a model alone."""
    return {
        "peak_memory_bytes": peak_memory(model, threads=threads),
        "peak_memory": MEMORY_MEANING,
        "size_bytes": model.size_bytes,
        "batch": len(next(iter(model.feeds.values()))),
        "threads": threads,
    }


def _opened(model: Timed, threads: int) -> Runtime:
    return open_model(model.runtime, model.path, model.graph, threads, model.provider)


def time_models(models: Mapping[str, Timed], *, repeats: int, threads: int = 1) -> dict[str, dict[str, Any]]:
    """Measure latencies alone, all in turns: the arguments of :func:`bench_models`, and for each its ``latency_ms``."""
    calls = {name: partial(_opened(model, threads).run, model.feeds) for name, model in models.items()}
    rounds = time_rounds(calls, max(1, -(-repeats // ROUND_RUNS)))
    return {name: _summary(seconds) for name, seconds in rounds.items()}


def peak_memory(model: Timed, *, threads: int = 1) -> int | None:
    """Return what loading and running a model adds to a fresh process's peak resident memory, bytes.

    None on systems that tell neither ``VmHWM`` nor ``ru_maxrss``.
    """
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "feeds.safetensors"
        save_file({name: np.ascontiguousarray(value) for name, value in model.feeds.items()}, arrays)
        package_root = str(Path(__file__).resolve().parent.parent)
        paths = [package_root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        graph = json.dumps(dict(model.graph))
        asked = [model.runtime, str(model.path), graph, str(arrays), str(threads), model.provider]
        child = subprocess.run(
            [sys.executable, "-m", "distill.bench", *asked],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode:
        raise RuntimeError(f"measuring the memory of {model.path} failed: {child.stderr.strip()[-500:]}")
    before, after = json.loads(child.stdout.splitlines()[-1])  # packages may print on loading
    return None if before is None else after - before


def num_params(model: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once; buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, example: Batch) -> int:
    """Return the floating-point operations of one forward pass over the example, a multiply-add counted as two.

    Matrix products, convolutions and attention count; element-wise operations and lookups do not. Give a batch of
    one row for the cost of a row.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from distill.operations import flop_counter

    modes = {module: module.training for module in model.modules()}
    counter = flop_counter()
    try:
        # the counter knows no fused CPU attention kernel, but the matrix products of the plain one
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model.eval()(example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return int(counter.get_total_flops())


def time_rounds(calls: Mapping[str, Callable[[], object]], num_rounds: int) -> dict[str, NDArray[np.float64]]:
    """Return seconds [rounds, runs a round] for each model."""
    for call in calls.values():
        for _ in range(WARM_UP_RUNS):
            call()
    seconds = {name: np.empty((num_rounds, ROUND_RUNS)) for name in calls}
    names = list(calls)
    for index in range(num_rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            call = calls[name]
            for run in range(ROUND_RUNS):
                start = time.perf_counter()
                call()
                seconds[name][index, run] = time.perf_counter() - start
    return seconds


def _summary(seconds: NDArray[np.float64]) -> dict[str, Any]:
    p50, p95, p99 = np.percentile(seconds * 1e3, [50, 95, 99])
    medians = np.median(seconds * 1e3, axis=1)
    spread = [float(medians.min()), float(medians.max())]
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "p50_spread": spread}


def _memory_child() -> None:
    """Run in a fresh process: print its peak memory before and after a model was loaded and run."""
    runtime, path, graph, arrays, threads, provider = sys.argv[1:]
    model = Timed(Path(path), load_file(arrays), runtime, json.loads(graph), provider)
    RUNTIMES[runtime].start()
    before = _peak_resident_bytes()
    opened = _opened(model, int(threads))
    for _ in range(MEMORY_RUNS):
        opened.run(model.feeds)
    sys.stdout.write(f"\n{json.dumps([before, _peak_resident_bytes()])}\n")


def _peak_resident_bytes() -> int | None:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would report the parent's peak, which Linux hands down through fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


if __name__ == "__main__":
    _memory_child()
