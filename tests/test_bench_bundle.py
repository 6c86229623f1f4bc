"""A bundle timed where it lies: by one file that needs nothing of the project."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from export_models import tiny_preprocessor, write_tiny_graph

from distill import bench_bundle
from distill.export.bundle import write_bundle
from distill.runs import sha256_file
from distill.targets import tasks_from_json


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """A folder with a bundle and the script, as copied to a device."""
    folder = tmp_path_factory.mktemp("device")
    write_bundle(
        folder / "bundle",
        model_path=write_tiny_graph(folder / "graph.onnx"),
        preprocessor=tiny_preprocessor(folder, image_size=8),
        tasks=tasks_from_json({"category": ["apple", "bird", "chair"]}),
        name="tiny",
        source={},
        info={},
    )
    shutil.copy(bench_bundle.__file__, folder / "bench_bundle.py")
    return folder


def call(folder, *arguments):
    command = [sys.executable, "-I", "bench_bundle.py", *map(str, arguments)]  # -I: no paths but the packages'
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_file_alone_times_a_bundle(device):
    source = Path(bench_bundle.__file__).read_text()
    assert "import distill" not in source and "from distill" not in source
    done = call(device, "bundle", "--batches", "1,4", "--threads", "1,2", "--runs", "10", "--json", "measured.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny on onnxruntime ") and len(done.stdout.splitlines()) == 7
    found = json.loads((device / "measured.json").read_text())
    assert (found["format"], found["version"]) == ("multidistill-measured", 1)
    assert found["bundle_sha256"] == sha256_file(device / "bundle" / "bundle.json")
    assert found["size_bytes"] == (device / "bundle" / "model.onnx").stat().st_size
    assert [(row["batch"], row["threads"]) for row in found["results"]] == [(1, 1), (4, 1), (1, 2), (4, 2)]
    for row in found["results"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["runs"] == 10
        assert row["p50_spread_ms"][0] <= row["p50_ms"] <= row["p50_spread_ms"][1] * 1.001
        assert row["rows_per_second"] == pytest.approx(row["batch"] * 1e3 / row["p50_ms"])
    assert found["load_ms"] > 0 and found["machine"]["cpus"] >= 1
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 0


def test_inputs_are_made_up_of_the_right_shape_and_length():
    inputs = {
        "image": {"dtype": "uint8", "shape": ["batch", 3, 8, 8]},
        "image_present": {"dtype": "bool", "shape": ["batch"]},
        "text": {"dtype": "int64", "shape": ["batch", "length"]},
        "text_mask": {"dtype": "bool", "shape": ["batch", "length"]},
        "audio": {"dtype": "int16", "shape": ["batch", 800]},
        "audio_length": {"dtype": "int64", "shape": ["batch"]},
        "tabular": {"dtype": "float32", "shape": ["batch", 5]},
    }
    feeds = bench_bundle.make_feeds(inputs, 3, 6)
    for name, given in inputs.items():
        assert feeds[name].dtype == np.dtype(given["dtype"]) and feeds[name].shape[0] == 3
    assert feeds["text"].shape == feeds["text_mask"].shape == (3, 6) and feeds["text_mask"].all()
    assert (feeds["audio_length"] == 800).all() and feeds["image_present"].all()
    assert feeds["text"].max() <= 1 and np.isfinite(feeds["tabular"]).all()


def test_models_of_one_row_run_row_by_row_with_their_own_types(device, tmp_path, monkeypatch):
    shutil.copytree(device / "bundle", tmp_path / "bundle")
    info = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    info["inputs"]["text"]["shape"] = info["inputs"]["text_mask"]["shape"] = ["batch", 12]
    (tmp_path / "bundle" / "model.tflite").write_bytes(b"123")
    files = {"model.tflite": {"sha256": sha256_file(tmp_path / "bundle" / "model.tflite")}}
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps({**info, "runtime": "litert", "files": files}))
    ran = []

    class Interpreter:
        def __init__(self, path, num_threads):
            assert Path(path).name == "model.tflite"
            self.threads = num_threads

        def get_signature_runner(self):
            return self

        def get_input_details(self):
            return {f"args_{number}": {"dtype": kind} for number, kind in enumerate(("u1", "?", "i4", "?", "?"))}

        def __call__(self, **inputs):
            ran.append((self.threads, [(value.dtype.str[1:], value.shape[0]) for value in inputs.values()]))

    package = type(sys)("ai_edge_litert")
    package.interpreter = type(sys)("ai_edge_litert.interpreter")
    package.interpreter.Interpreter = Interpreter
    for name, module in (("ai_edge_litert", package), ("ai_edge_litert.interpreter", package.interpreter)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(bench_bundle.metadata, "version", lambda name: "2.0")
    monkeypatch.setattr(bench_bundle, "peak_memory", lambda *arguments: None)
    found = bench_bundle.measure(tmp_path / "bundle", [1, 3], [1, 2], runs=10)
    assert (found["runtime"], found["size_bytes"]) == ("litert 2.0", 3)
    assert found["text_length"] == 12, "the graph takes no other"
    assert {row["runs"] for row in found["results"]} == {10}
    assert len(ran) == 2 * (1 + 3) * (bench_bundle.WARM_UP + 10), "a run a row"
    assert {threads for threads, _ in ran} == {1, 2}
    assert {tuple(row) for _, row in ran} == {(("u1", 1), ("b1", 1), ("i4", 1), ("b1", 1), ("b1", 1))}


def test_threads_of_one_pool_follow_one_another(device, monkeypatch):
    ran = []

    def opened(path, inputs, threads):
        return lambda feeds: ran.append(threads), "1"

    shared = bench_bundle.RUNTIMES["onnxruntime"]._replace(open=opened, one_pool=True)
    monkeypatch.setitem(bench_bundle.RUNTIMES, "onnxruntime", shared)
    monkeypatch.setattr(bench_bundle, "peak_memory", lambda *arguments: None)
    found = bench_bundle.measure(device / "bundle", [1, 2], [2, 1], runs=10)
    assert [(row["batch"], row["threads"]) for row in found["results"]] == [(1, 2), (2, 2), (1, 1), (2, 1)]
    assert ran == sorted(ran, reverse=True), "what was loaded with two threads does not run after one"


@pytest.mark.parametrize("runtime", ["openvino", "executorch", "litert"])
def test_a_runtime_that_is_missing_is_told_with_its_package(runtime, monkeypatch):
    for module in bench_bundle.RUNTIMES[runtime].modules:
        monkeypatch.setitem(sys.modules, module, None)
    package = "ai-edge-litert" if runtime == "litert" else runtime
    with pytest.raises(SystemExit, match=f"error: the bundle is for {runtime} .*; pip install {package}$"):
        bench_bundle.load_packages(runtime)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "bundle.json").unlink(), "is no bundle"),
        (lambda folder: (folder / "bundle.json").write_text("{"), "is no bundle"),
        (lambda folder: (folder / "model.onnx").unlink(), "lacks its model model.onnx; copy the whole folder"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"another"), "model.onnx is not the bundle's; copy"),
        (
            lambda folder: (folder / "bundle.json").write_text('{"runtime": "onnxruntime", "inputs": {}}'),
            "says nothing",
        ),
        (lambda folder: (folder / "bundle.json").write_text('{"runtime": "abacus", "inputs": {}}'), "is for abacus"),
    ],
)
def test_a_sentence_for_what_cannot_be_timed(device, tmp_path, change, message):
    shutil.copytree(device / "bundle", tmp_path / "bundle")
    change(tmp_path / "bundle")
    done = call(device, tmp_path / "bundle")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
