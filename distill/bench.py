"""What a model costs where it runs: latency, memory and size on the exported runtime; FLOPs and parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from distill.contracts import Batch
from distill.predict import RUNTIME, open_session

if TYPE_CHECKING:
    from torch import nn

Feeds = Mapping[str, NDArray[Any]]

WARM_UP_RUNS = 20
ROUND_RUNS = 10
LOADS = 3
MEMORY_RUNS = 5

MEMORY_MEANING = (
    "peak resident memory of a fresh process that loaded the model and ran it a few times, minus its own peak "
    "before that, with onnxruntime imported"
)


def bench_onnx(models: Mapping[str, tuple[Path, Feeds]], *, repeats: int, threads: int = 1) -> dict[str, Any]:
    """Measure ONNX models side by side.

    All models are warmed up, then timed in short rounds that take turns and change their order, so that a
    disturbance of the machine hits all alike.

    Args:
        models: name -> ONNX file and the inputs to time it with (their first dimension is the batch).
        repeats: timed runs a model, at least.
        threads: threads inside an operator.

    Returns:
        For each model: ``latency_ms`` (``p50``, ``p95``, ``p99``, and ``p50_spread``: the smallest and the largest
        median of a round), ``load_ms`` (median), ``peak_memory_bytes`` (see ``peak_memory``; None where the system
        does not tell), ``peak_memory`` (what that is), ``size_bytes``, ``runtime``, ``batch``, ``threads``, ``runs``.

    Raises:
        UserError: a model file is missing or cannot be loaded.
    """
    calls: dict[str, Callable[[], object]] = {}
    loads: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(LOADS):
        for name, (path, feeds) in models.items():
            start = time.perf_counter()
            session = open_session(path, threads)
            loads[name].append(time.perf_counter() - start)
            calls[name] = _call(session, feeds)
    rounds = _time_rounds(calls, max(1, -(-repeats // ROUND_RUNS)))
    return {
        name: {
            "latency_ms": _summary(rounds[name]),
            "load_ms": float(np.median(loads[name]) * 1e3),
            "peak_memory_bytes": peak_memory(path, feeds, threads=threads),
            "peak_memory": MEMORY_MEANING,
            "size_bytes": path.stat().st_size,
            "runtime": f"{RUNTIME} {ort.__version__}",
            "batch": len(next(iter(feeds.values()))),
            "threads": threads,
            "runs": rounds[name].size,
        }
        for name, (path, feeds) in models.items()
    }


def time_onnx(models: Mapping[str, tuple[Path, Feeds]], *, repeats: int, threads: int = 1) -> dict[str, dict[str, Any]]:
    """Measure latencies alone, as :func:`bench_onnx` does: its arguments, and for each model its ``latency_ms``."""
    calls = {name: _call(open_session(path, threads), feeds) for name, (path, feeds) in models.items()}
    rounds = _time_rounds(calls, max(1, -(-repeats // ROUND_RUNS)))
    return {name: _summary(seconds) for name, seconds in rounds.items()}


def peak_memory(path: Path, feeds: Feeds, *, threads: int = 1) -> int | None:
    """Return what loading and running a model adds to a fresh process's peak resident memory, bytes.

    None on systems that tell neither ``VmHWM`` nor ``ru_maxrss``.
    """
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "feeds.safetensors"
        save_file({name: np.ascontiguousarray(value) for name, value in feeds.items()}, arrays)
        package_root = str(Path(__file__).resolve().parent.parent)
        paths = [package_root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        child = subprocess.run(
            [sys.executable, "-m", "distill.bench", path, arrays, str(threads)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode:
        raise RuntimeError(f"measuring the memory of {path} failed: {child.stderr.strip()[-500:]}")
    before, after = json.loads(child.stdout)
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


def _call(session: ort.InferenceSession, feeds: Feeds) -> Callable[[], object]:
    inputs = {value.name: feeds[value.name] for value in session.get_inputs()}
    return lambda: session.run(None, inputs)


def _time_rounds(calls: Mapping[str, Callable[[], object]], num_rounds: int) -> dict[str, NDArray[np.float64]]:
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
    path, arrays, threads = sys.argv[1:]
    feeds = load_file(arrays)
    before = _peak_resident_bytes()
    call = _call(open_session(path, int(threads)), feeds)
    for _ in range(MEMORY_RUNS):
        call()
    sys.stdout.write(json.dumps([before, _peak_resident_bytes()]))


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
