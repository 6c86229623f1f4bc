"""Execution providers of onnxruntime: asked for and not there is a refusal, and none is exchanged in silence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest
from export_models import as_feeds
from runtime_models import batch_of, bundle_of
from stand_in_runtime import StandIn
from tiny_project import distill, refusal

from distill import bench_bundle
from distill.bench import Timed, bench_models
from distill.bundles import check_machine
from distill.contracts import UserError
from distill.export.card import trtexec
from distill.predict import load
from distill.report_config import BenchConfig
from distill.runtimes import RUNTIMES, onnxruntime, open_model

NO_CUDA = pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="CUDA is there")
NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class FakeSession:
    """A session on the CPU that says which providers it was asked for, and loads some of them."""

    loads: tuple[str, ...] = ()
    asked: ClassVar[list[list[str]]] = []
    fallback = True

    def __init__(self, path: str, options: Any, providers: list[str]) -> None:
        self.asked.append(providers)
        self.inner = REAL(path, options, providers=["CPUExecutionProvider"])
        self.loaded = [name for name in providers if name in self.loads]

    def get_providers(self) -> list[str]:
        return self.loaded

    def disable_fallback(self) -> None:
        self.fallback = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


REAL = ort.InferenceSession


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    """An onnxruntime-gpu; ``loads`` says what of it works."""
    everything = (*NAMES.values(), "CPUExecutionProvider")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*everything])
    monkeypatch.setattr(ort, "InferenceSession", FakeSession)
    monkeypatch.setattr(FakeSession, "loads", everything)
    monkeypatch.setattr(FakeSession, "asked", [])
    return FakeSession


@pytest.mark.parametrize("provider", NAMES)
def test_a_provider_that_works_is_used_and_named(provider: str, machine: type[FakeSession]) -> None:
    bundle = bundle_of("learnt", "onnxruntime")
    predictor, batch = load(bundle, provider=provider), as_feeds(batch_of("learnt", 2))
    rest = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert machine.asked[-1] == (rest if provider == "cuda" else [NAMES[provider], *rest])
    assert predictor.runtime.session.fallback is False
    assert predictor.runtime.device == {"cuda": "CUDA", "tensorrt": "TensorRT"}[provider]
    for name, value in load(bundle).run(batch).items():
        np.testing.assert_array_equal(predictor.run(batch)[name], value)
    assert machine.asked[-1] == ["CPUExecutionProvider"] and load(bundle).runtime.device == "CPU"


@pytest.mark.parametrize("provider", NAMES)
def test_one_that_does_not_load_is_refused(
    provider: str, machine: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "loads", ("CPUExecutionProvider",))
    match = f"could not load {NAMES[provider]} and would run on CPUExecutionProvider; install the NVIDIA driver"
    with pytest.raises(UserError, match=match):
        load(bundle_of("learnt", "onnxruntime"), provider=provider)


@NO_CUDA
@pytest.mark.parametrize("provider", NAMES)
def test_one_that_is_not_there_is_refused(provider: str) -> None:
    bundle = bundle_of("learnt", "onnxruntime")
    said = refusal(distill("predict", bundle, "--text", "red", "--provider", provider))
    assert f"has no {NAMES[provider]} here (it has " in said and "pip install onnxruntime-gpu" in said
    assert distill("predict", bundle, "--text", "red", "--provider", "cpu").code == 0
    with pytest.raises(UserError, match="pip install onnxruntime-gpu"):
        bench_models(
            {"a": Timed(bundle / "model.onnx", as_feeds(batch_of("learnt", 1)), provider=provider)}, repeats=10
        )


def test_an_unknown_one_and_another_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no provider 'gpu'; the providers are cpu, cuda, tensorrt"):
        load(bundle_of("learnt", "onnxruntime"), provider="gpu")
    monkeypatch.setitem(RUNTIMES, "executorch", StandIn)
    with pytest.raises(UserError, match="providers are onnxruntime's, and this bundle is for executorch"):
        open_model("executorch", tmp_path, {}, provider="cuda")


@NO_CUDA
def test_a_recipe_that_asks_for_one_stops_before_it_is_timed() -> None:
    class Asks:
        bench = BenchConfig(provider="cuda")

    check_machine(Asks, ["evaluate", "report"])  # nothing is timed
    with pytest.raises(UserError, match=r"bench\.provider: provider 'cuda': onnxruntime \S+ has no CUDAExecution"):
        check_machine(Asks, ["bench"])


def test_the_default_changes_no_fingerprint() -> None:
    assert BenchConfig().settings() == {"repeats": 200, "threads": 1}
    assert BenchConfig(provider="cuda").settings() == {"repeats": 200, "threads": 1, "provider": "cuda"}
    known = BenchConfig.model_json_schema()["properties"]["provider"]["enum"]
    assert known == [*onnxruntime.PROVIDERS]
    assert onnxruntime.PROVIDERS == bench_bundle.PROVIDERS


@NO_CUDA
def test_the_script_for_devices_refuses_it_too(tmp_path: Path) -> None:
    shutil.copytree(bundle_of("learnt", "onnxruntime"), tmp_path / "bundle")
    shutil.copy(bench_bundle.__file__, tmp_path / "bench_bundle.py")
    command = [sys.executable, "-I", "bench_bundle.py", "bundle", "--runs", "10", "--provider", "cuda"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "error: onnxruntime" in done.stderr and "pip install onnxruntime-gpu" in done.stderr
    info = json.loads((tmp_path / "bundle/bundle.json").read_text())
    files = {"model.tflite": info["files"]["model.onnx"]}
    (tmp_path / "bundle/model.onnx").rename(tmp_path / "bundle/model.tflite")
    (tmp_path / "bundle/bundle.json").write_text(json.dumps({**info, "runtime": "litert", "files": files}))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "--provider is onnxruntime's, and bundle is for litert" in done.stderr


def test_the_script_names_the_provider_it_measured(machine: type[FakeSession], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_bundle, "peak_memory", lambda *arguments: None)
    bundle = bundle_of("learnt", "onnxruntime")
    found = bench_bundle.measure(bundle, [1], [1], runs=10, provider="cuda")
    assert found["runtime"] == f"onnxruntime {ort.__version__} on cuda"
    monkeypatch.setattr(machine, "loads", ("CPUExecutionProvider",))
    with pytest.raises(SystemExit, match="CUDAExecutionProvider did not load"):
        bench_bundle.measure(bundle, [1], [1], runs=10, provider="cuda")


def test_the_card_builds_an_engine() -> None:
    card = (bundle_of("learnt", "onnxruntime") / "README.md").read_text()
    said = card[card.index("## TensorRT") : card.index("## Tensors")]
    assert "trtexec --onnx=model.onnx --saveEngine=model.plan \\\n  --fp16 \\\n  --minShapes=image:1x3x32x32," in said
    lines = [line.strip(" \\").split("=") for line in said.splitlines() if "Shapes" in line]
    shapes = dict(lines)
    assert [*shapes] == ["--minShapes", "--optShapes", "--maxShapes"]
    named = {name: dict(part.split(":") for part in value.split(",")) for name, value in shapes.items()}
    inputs = load(bundle_of("learnt", "onnxruntime")).info["inputs"]
    assert all(each.keys() == inputs.keys() for each in named.values())
    assert named["--minShapes"]["text"] == "1x1" and named["--maxShapes"]["text_present"] == "64"
    length = load(bundle_of("learnt", "onnxruntime")).preprocessor.tokenizer.max_length
    assert named["--maxShapes"]["text_mask"] == f"64x{length}" and named["--optShapes"]["text"] == f"1x{length}"
    half = trtexec({"image": {"shape": ["batch", 3, 8, 8]}}, 1, half=False, batch=4)
    assert half.splitlines()[0] == "trtexec --onnx=model.onnx --saveEngine=model.plan \\" and "--fp16" not in half
    assert half.endswith("--maxShapes=image:4x3x8x8")
