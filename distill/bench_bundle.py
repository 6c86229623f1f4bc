"""What a bundle costs on the device where it lies: latency, throughput, time to load, memory, size.

Needs numpy and the bundle's runtime (onnxruntime, openvino, executorch, ai-edge-litert, coremltools), nothing else of
multidistill: copy this file and a bundle to a device, and run

    python bench_bundle.py BUNDLE --batches 1,8 --threads 1,2 --json measured.json

Inputs are made up: what they hold does not change the time. Batches and numbers of threads are timed in short rounds
that take turns, so that a disturbance of the device hits all alike; but numbers of threads of ExecuTorch, whose models
share the process's, follow one another. Its models and those of LiteRT and Core ML, which chooses its threads itself,
run row by row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT, VERSION = "multidistill-measured", 1
WARM_UP, ROUND = 10, 10
LOADS = 3
TEXT_LENGTH = 8

Feeds = dict[str, Any]
Run = Callable[[Feeds], object]
Opened = tuple[Run, str]
"""What takes named inputs, and the version of the runtime."""
_COREML = "Manifest.json", *(f"Data/com.apple.CoreML/{file}" for file in ("model.mlmodel", "weights/weight.bin"))
_GPU = ("CUDAExecutionProvider", "CPUExecutionProvider")
PROVIDERS = {"cpu": _GPU[1:], "cuda": _GPU, "tensorrt": ("TensorrtExecutionProvider", *_GPU)}


class Runtime(NamedTuple):
    """How a runtime's bundles are loaded."""

    files: tuple[str, ...]  # of the model; the first is the one to open
    modules: tuple[str, ...]  # imported for any model; their memory is none of the model's
    open: Callable[[Path, dict[str, Any], int], Opened]  # by that file, bundle.json, and threads inside an operator
    one_pool: bool = False  # models of a process share their threads


def open_onnxruntime(path: Path, info: dict[str, Any], threads: int) -> Opened:
    """Load ``model.onnx``; ``SystemExit`` with a sentence where the provider is not there or does not load."""
    import onnxruntime as ort

    provider, inputs = info.get("provider", "cpu"), list(info["inputs"])
    asked = PROVIDERS[provider]
    if asked[0] not in ort.get_available_providers():
        raise SystemExit(f"error: onnxruntime {ort.__version__} has no {asked[0]}; pip install onnxruntime-gpu instead")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=list(asked))
    if asked[0] not in session.get_providers():
        raise SystemExit(f"error: {asked[0]} did not load; install the libraries that onnxruntime-gpu was built for")
    session.disable_fallback()
    on = "" if provider == "cpu" else f" on {provider}"
    return lambda feeds: session.run(None, {name: feeds[name] for name in inputs}), ort.__version__ + on


def open_openvino(path: Path, info: dict[str, Any], threads: int) -> Opened:
    """Load ``model.xml`` for its latency, in float32 wherever it is not quantized; in bfloat16 if it is for that."""
    import openvino

    half = info.get("info", {}).get("precision") == "bf16"
    has = half and "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = {"INFERENCE_PRECISION_HINT": "bf16" if has else "f32"}
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **precision}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    version = metadata.version("openvino") + (" in bfloat16" if has else " in float32" if half else "")
    return lambda feeds: request.infer({name: feeds[name] for name in info["inputs"]}), version


def open_executorch(path: Path, info: dict[str, Any], threads: int) -> Opened:
    """Load ``model.pte``, which runs row by row. The runtime's Python package brings torch, its C++ one does not."""
    import torch
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool
    from executorch.runtime import Runtime as Loader

    if _threadpool_get_thread_count() != threads:  # loaded models keep the threads that they were loaded with
        _unsafe_reset_threadpool(threads)
    method = Loader.get().load_program(path).load_method("forward")
    run = _by_rows(lambda row: method.execute([torch.from_numpy(value) for value in row]), list(info["inputs"]))
    return run, metadata.version("executorch")


def open_litert(path: Path, info: dict[str, Any], threads: int) -> Opened:
    """Load ``model.tflite``, which runs row by row and reads token ids as int32."""
    from ai_edge_litert.interpreter import Interpreter

    call = Interpreter(str(path), num_threads=threads).get_signature_runner()
    kinds = [call.get_input_details()[f"args_{number}"]["dtype"] for number in range(len(info["inputs"]))]

    def run(row: list[Any]) -> object:
        values = (value.astype(kind, copy=False) for value, kind in zip(row, kinds, strict=True))
        return call(**{f"args_{number}": value for number, value in enumerate(values)})

    return _by_rows(run, list(info["inputs"])), metadata.version("ai-edge-litert")


def open_coreml(path: Path, info: dict[str, Any], threads: int) -> Opened:
    """Load ``model.mlpackage``, which runs row by row and reads whole numbers and flags as int32."""
    import coremltools

    if sys.platform != "darwin":
        raise SystemExit(f"error: Core ML runs on macOS alone, and this system is {sys.platform}")
    inputs, model = list(info["inputs"]), coremltools.models.MLModel(str(path.parent))

    def run(row: list[Any]) -> object:
        values = (value if value.dtype == np.float32 else value.astype(np.int32) for value in row)
        return model.predict(dict(zip(inputs, values, strict=True)))

    return _by_rows(run, inputs), metadata.version("coremltools")


def _by_rows(run: Callable[[list[Any]], object], inputs: list[str]) -> Run:
    return lambda feeds: [run([feeds[name][row : row + 1] for name in inputs]) for row in range(len(feeds[inputs[0]]))]


RUNTIMES = {
    "onnxruntime": Runtime(("model.onnx",), ("onnxruntime",), open_onnxruntime),
    "openvino": Runtime(("model.xml", "model.bin"), ("openvino",), open_openvino),
    "executorch": Runtime(
        ("model.pte",), ("executorch.kernels.quantized", "executorch.runtime"), open_executorch, one_pool=True
    ),
    "litert": Runtime(("model.tflite",), ("ai_edge_litert.interpreter",), open_litert),
    "coreml": Runtime(tuple(f"model.mlpackage/{file}" for file in _COREML), ("coremltools",), open_coreml),
}
"""What ``bundle.json`` calls a runtime -> how its bundles are loaded."""


PACKAGES = {"litert": "ai-edge-litert", "coreml": "coremltools"}
"""Runtime -> its package, where that has another name."""


def load_packages(runtime: str) -> None:
    """Import a runtime; ``SystemExit`` with a sentence where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages' own, of their imports
            for module in RUNTIMES[runtime].modules:
                import_module(module)
        if runtime == "openvino":  # its plugin for the CPU is a library of its own
            sys.modules["openvino"].Core().get_versions("CPU")
    except ImportError as error:
        wanted = PACKAGES.get(runtime, runtime)
        raise SystemExit(f"error: the bundle is for {runtime} ({error}); pip install {wanted}") from None


def read_bundle(folder: Path, provider: str = "cpu") -> dict[str, Any]:
    """Return the content of ``bundle.json``; ``SystemExit`` with a sentence where it is none that can be timed."""
    try:
        content = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        runtime, inputs = content["runtime"], content["inputs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {folder} is no bundle ({error!r}); give a folder made by `distill export`") from None
    if runtime not in RUNTIMES:
        raise SystemExit(f"error: {folder} is for {runtime}; this script times {', '.join(RUNTIMES)}")
    for file in RUNTIMES[runtime].files:
        if not isinstance(inputs, dict) or not (folder / file).is_file():
            raise SystemExit(f"error: {folder} lacks its model {file}; copy the whole folder")
        try:
            expected = content["files"][file]["sha256"]
        except (KeyError, TypeError):
            raise SystemExit(f"error: {folder / 'bundle.json'} says nothing of {file}; copy the folder again") from None
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() != expected:
            raise SystemExit(f"error: {folder / file} is not the bundle's; copy the whole folder again")
    if provider != "cpu" and runtime != "onnxruntime":
        raise SystemExit(f"error: --provider is onnxruntime's, and {folder} is for {runtime}; leave it out")
    return {**content, "provider": provider}


def fixed_length(inputs: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Return the tokens of all texts of a graph that takes one length alone."""
    length = inputs["text"]["shape"][1] if "text" in inputs else None
    return length if isinstance(length, int) else None


def make_feeds(inputs: Mapping[str, Mapping[str, Any]], batch: int, text_length: int = TEXT_LENGTH) -> Feeds:
    """Make rows of inputs up: all modalities present and of full length, texts of so many tokens.

    Args:
        inputs: name -> ``dtype`` and ``shape``, in which a name stands for a dimension that is free.
        batch: rows.
        text_length: tokens.
    """
    chance, feeds = np.random.default_rng(0), {}
    free = {"batch": batch, "length": text_length}
    shapes = {name: [free.get(size, size) for size in given["shape"]] for name, given in inputs.items()}
    for name, shape in shapes.items():
        kind = np.dtype(inputs[name]["dtype"])
        if kind.kind == "b":
            feeds[name] = np.ones(shape, bool)
        elif name.endswith("_length"):
            feeds[name] = np.full(shape, shapes[name.removesuffix("_length")][1], kind)
        elif kind.kind == "f":
            feeds[name] = chance.standard_normal(shape).astype(kind)
        else:
            feeds[name] = chance.integers(0, 2 if name == "text" else 128, shape).astype(kind)
    return feeds


def measure(
    folder: Path,
    batches: Sequence[int],
    threads: Sequence[int],
    *,
    runs: int = 100,
    text_length: int = TEXT_LENGTH,
    provider: str = "cpu",
) -> dict[str, Any]:
    """Time a bundle.

    Args:
        folder: the bundle.
        batches: rows a run.
        threads: threads inside an operator.
        runs: timed runs of each, at least.
        text_length: tokens of texts, where the graph takes any number.
        provider: of onnxruntime.

    Returns:
        JSON values: ``bundle`` and the sha256 of its ``bundle.json``, ``runtime``, ``machine``, ``size_bytes`` of the
        model, ``load_ms`` (median), ``peak_memory_bytes`` (what loading and running adds to a fresh process; None
        where the system does not tell), and ``results``: for each batch and number of threads ``p50_ms``, ``p95_ms``,
        ``p99_ms``, ``p50_spread_ms`` (the smallest and the largest median of a round), ``rows_per_second``, ``runs``.
    """
    info = read_bundle(folder, provider)
    load_packages(info["runtime"])
    runtime, text_length = RUNTIMES[info["runtime"]], fixed_length(info["inputs"]) or text_length
    loads, version = [], ""
    timed: dict[tuple[int, int], Any] = {}
    for together in [[count] for count in threads] if runtime.one_pool else [threads]:
        calls: dict[tuple[int, int], Callable[[], object]] = {}
        for count in together:
            for _ in range(LOADS):
                start = time.perf_counter()
                run, version = runtime.open(folder / runtime.files[0], info, count)
                loads.append(time.perf_counter() - start)
            for batch in batches:
                calls[batch, count] = partial(run, make_feeds(info["inputs"], batch, text_length))
        timed |= _take_turns(calls, max(1, -(-runs // ROUND)))
    return {
        "format": FORMAT,
        "version": VERSION,
        "bundle": info["name"],
        "bundle_sha256": hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest(),
        "runtime": f"{info['runtime']} {version}",
        "machine": describe_machine(),
        "text_length": text_length,
        "size_bytes": sum((folder / file).stat().st_size for file in runtime.files),
        "load_ms": float(np.median(loads) * 1e3),
        "peak_memory_bytes": peak_memory(folder, batches[0], threads[0], text_length, provider),
        "results": [_summary(batch, count, seconds) for (batch, count), seconds in timed.items()],
    }


def describe_machine() -> dict[str, Any]:
    """What the figures hold for."""
    name = platform.processor()
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    system = f"{platform.system()} {platform.release()}"
    return {"processor": name, "machine": platform.machine(), "cpus": os.cpu_count(), "system": system}


def peak_memory(folder: Path, batch: int, threads: int, text_length: int, provider: str = "cpu") -> int | None:
    """Return what loading and running adds to the peak resident memory of a fresh process, bytes."""
    options = ["--memory", f"{batch},{threads},{text_length}", "--provider", provider]
    asked = [sys.executable, __file__, str(folder), *options]
    child = subprocess.run(asked, capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"error: measuring the memory failed: {child.stderr.strip()[-500:]}")
    before, after = json.loads(child.stdout.splitlines()[-1])  # packages may print on loading
    return None if before is None else after - before


def _take_turns(calls: Mapping[tuple[int, int], Callable[[], object]], rounds: int) -> dict[tuple[int, int], Any]:
    """Seconds [rounds, runs a round] of each call."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    seconds, keys = {key: np.empty((rounds, ROUND)) for key in calls}, list(calls)
    for number in range(rounds):
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            for run in range(ROUND):
                start = time.perf_counter()
                calls[key]()
                seconds[key][number, run] = time.perf_counter() - start
    return seconds


def _summary(batch: int, threads: int, seconds: Any) -> dict[str, Any]:
    p50, p95, p99 = (float(value) for value in np.percentile(seconds * 1e3, [50, 95, 99]))
    medians = np.median(seconds * 1e3, axis=1)
    return {
        "batch": batch,
        "threads": threads,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "p50_spread_ms": [float(medians.min()), float(medians.max())],
        "rows_per_second": batch / p50 * 1e3,
        "runs": int(seconds.size),
    }


def _memory_child(folder: Path, provider: str, batch: int, threads: int, text_length: int) -> None:
    info = read_bundle(folder, provider)
    runtime = RUNTIMES[info["runtime"]]
    feeds = make_feeds(info["inputs"], batch, text_length)
    load_packages(info["runtime"])  # their own memory is none of the model's
    before = _peak_resident_bytes()
    run, _ = runtime.open(folder / runtime.files[0], info, threads)
    for _ in range(5):
        run(feeds)
    sys.stdout.write(f"\n{json.dumps([before, _peak_resident_bytes()])}\n")


def _peak_resident_bytes() -> int | None:
    status = Path("/proc/self/status")
    if status.is_file():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return None if line is None else int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time a bundle and print a table."""
    parser = argparse.ArgumentParser(
        prog="bench_bundle.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--batches", type=_numbers, default=[1], help="rows a run, as 1,8")
    parser.add_argument("--threads", type=_numbers, default=[1], help="threads inside an operator, as 1,2")
    parser.add_argument("--runs", type=_number, default=100, help="timed runs of each")
    parser.add_argument(
        "--text-length", type=_number, default=TEXT_LENGTH, help="tokens of texts, if any number may be"
    )
    parser.add_argument("--provider", choices=PROVIDERS, default="cpu", help="of onnxruntime")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--memory", type=_numbers, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.memory:
        _memory_child(given.bundle, given.provider, *given.memory)
        return
    options = {"runs": given.runs, "text_length": given.text_length, "provider": given.provider}
    found = measure(given.bundle, given.batches, given.threads, **options)
    machine, memory = found["machine"], found["peak_memory_bytes"]
    print(f"{found['bundle']} on {found['runtime']}, {machine['processor'] or machine['machine']}")
    print(f"size {found['size_bytes'] / 1e6:.2f} MB, loaded in {found['load_ms']:.1f} ms", end="")
    print("" if memory is None else f", {memory / 1e6:.1f} MB of memory")
    print(f"{'batch':>6}{'threads':>9}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'rows/s':>11}")
    for row in found["results"]:
        times = "".join(f"{row[name]:>10.3f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
        print(f"{row['batch']:>6}{row['threads']:>9}{times}{row['rows_per_second']:>11.0f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
