"""Bundles for other runtimes than onnxruntime say what the torch model says; those that can, without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from export_models import as_feeds
from runtime_models import LENGTH, answers, batch_of, bundle_of, cosine, predicted_without, said, source_of

from distill.contracts import UserError
from distill.export import subprocesses
from distill.export.conversion import EXPORTERS, convert
from distill.export.subprocesses import ExportError, read_feeds, run_exporter, write_feeds
from distill.predict import EMBEDDING, load, predict_rows
from distill.runtimes import RUNTIMES

PACKAGES = {
    "openvino": ["openvino", "nncf"],
    "executorch": ["executorch", "torchao"],
    "litert": ["ai_edge_litert", "ai_edge_quantizer"],
}
"""What a runtime's exporter needs."""
SLOW = {"executorch", "litert"}
"""Their exporters take half a minute and more."""
MODELS = ["cross_attention", "concat", "gru", "learnt"]
RUNTIME = pytest.mark.parametrize(
    "runtime", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PACKAGES]
)


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "runtime" in request.fixturenames:
        for package in PACKAGES[request.getfixturevalue("runtime")]:
            pytest.importorskip(package)


@RUNTIME
@pytest.mark.parametrize("kind", MODELS)
def test_float_bundles_say_what_torch_says(runtime: str, kind: str) -> None:
    for count, length in ((1, 2), (3, 4), (5, LENGTH)):
        batch = batch_of(kind, count, length, seed=count)
        predictor, found = answers(bundle_of(kind, runtime), batch)
        expected = said(kind, batch)
        assert list(found) == list(expected) == predictor.outputs
        for name, value in expected.items():
            assert found[name].dtype == np.float32
            rows = batch.present.get(name.removeprefix(EMBEDDING), batch.ids >= 0).numpy()  # other rows mean nothing
            np.testing.assert_allclose(found[name][rows], value[rows], rtol=1e-3, atol=1e-4, err_msg=name)


@RUNTIME
@pytest.mark.parametrize("precision", ["int8", "dynamic"])
@pytest.mark.parametrize("kind", ["learnt", "gru"])
def test_int8_bundles_are_near(runtime: str, kind: str, precision: str) -> None:
    bundle = bundle_of(kind, runtime, precision)
    batch = batch_of(kind, 200, seed=7)
    found, expected = answers(bundle, batch)[1], said(kind, batch)
    assert min(cosine(found[name], value) for name, value in expected.items()) > 0.99
    for name, value in expected.items():
        if not name.startswith("embedding"):
            assert (found[name].argmax(1) == value.argmax(1)).mean() > 0.95, name


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_is_half_as_large_and_near(kind: str) -> None:
    openvino = pytest.importorskip("openvino")
    whole, half = (load(bundle_of(kind, "openvino", precision)) for precision in ("fp32", "bf16"))
    if kind == "learnt":  # of the others not even the graph's constants are large
        assert half.info["files"]["model.bin"]["bytes"] < 0.51 * whole.info["files"]["model.bin"]["bytes"]
    has = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert half.runtime.device == ("CPU in bfloat16" if has else "CPU in float32, as it has no bfloat16")
    assert whole.runtime.device == "CPU"
    used = half.runtime.request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
    assert used == (openvino.Type.bf16 if has else openvino.Type.f32)
    batch = batch_of(kind, 50, seed=7)
    found, expected = half.run(as_feeds(batch)), said(kind, batch)
    for name, value in expected.items():
        rows = batch.present.get(name.removeprefix(EMBEDDING), batch.ids >= 0).numpy()
        assert cosine(found[name][rows], value[rows]) > 0.999, name


def test_bf16_on_a_processor_without_it_is_float32_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    bundle, real = bundle_of("learnt", "openvino", "bf16"), openvino.Core.get_property
    monkeypatch.setattr(
        openvino.Core,
        "get_property",
        lambda core, *asked: ["FP32", "INT8"] if asked[1] == "OPTIMIZATION_CAPABILITIES" else real(core, *asked),
    )
    predictor = load(bundle)
    assert predictor.runtime.device == "CPU in float32, as it has no bfloat16"
    used = predictor.runtime.request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
    assert used == openvino.Type.f32


@RUNTIME
def test_int8_bundles_are_smaller(runtime: str) -> None:
    size = {
        precision: sum(
            (bundle_of("learnt", runtime, precision) / file).stat().st_size for file in RUNTIMES[runtime].files
        )
        for precision in ("fp32", "int8", "dynamic")
    }
    assert max(size["int8"], size["dynamic"]) < 0.3 * size["fp32"]


@RUNTIME
def test_a_bundle_says_what_it_is(runtime: str) -> None:
    bundle = bundle_of("learnt", runtime)
    predictor, chosen = load(bundle, threads=1), RUNTIMES[runtime]
    assert predictor.info["runtime"] == runtime
    assert predictor.info["runtime_version"] == predictor.runtime.version
    assert {*chosen.files} < {*predictor.info["files"]}
    assert predictor.inputs == ["image", "image_present", "text", "text_mask", "text_present"]
    card = (bundle / "README.md").read_text()
    assert f"It runs on {runtime} (`pip install 'multidistill[{chosen.extra}]'`)" in card
    assert ("without torch" in card) == (not chosen.needs_torch) and "InferenceSession" not in card
    model = b"".join((bundle / file).read_bytes() for file in chosen.files)
    for trace in (str(Path.home()).encode() + b"/", b"site-packages", str(bundle.parent.parent).encode() + b"/"):
        assert trace not in model


@RUNTIME
def test_predictions_need_no_torch(runtime: str) -> None:
    bundle = bundle_of("learnt", runtime)
    if not RUNTIMES[runtime].needs_torch:
        assert predicted_without("torch", bundle) == predict_rows(bundle, {"text": ["red", "blue cat"]})
    onnx = predict_rows(bundle_of("learnt", "onnxruntime"), {"text": ["red", "blue cat"]})
    for row, other in zip(predict_rows(bundle, {"text": ["red", "blue cat"]}), onnx, strict=True):
        for task, answer in row["predictions"].items():
            assert answer["probability"] == pytest.approx(other["predictions"][task]["probability"], abs=1e-4)


@RUNTIME
def test_a_file_that_is_no_model_is_refused(runtime: str, tmp_path: Path) -> None:
    for file in RUNTIMES[runtime].files:
        (tmp_path / file).write_bytes(b"junk")
    info = load(bundle_of("learnt", runtime)).info
    with pytest.raises(UserError, match=r"model\.\w+: \S+ \S+ cannot load it"):
        RUNTIMES[runtime](tmp_path / RUNTIMES[runtime].files[0], info)


@RUNTIME
def test_wrong_inputs_are_refused(runtime: str) -> None:
    predictor = load(bundle_of("learnt", runtime))
    feeds = as_feeds(batch_of("learnt", 2))
    with pytest.raises(UserError, match="the model refused its inputs: 'image' is float32"):
        predictor.run(feeds | {"image": feeds["image"].astype(np.float32)})


@RUNTIME
def test_a_model_that_cannot_be_converted(runtime: str, tmp_path: Path) -> None:
    source = tmp_path / f"model{EXPORTERS[runtime].source}"
    source.write_bytes(b"junk")
    with pytest.raises(ExportError, match=f"{EXPORTERS[runtime].module} cannot convert the model: .*(Error|File): "):
        convert(runtime, source, tmp_path / "out")
    with pytest.raises(UserError, match=f"converts {EXPORTERS[runtime].source} files"):
        convert(runtime, tmp_path / "model.zip", tmp_path / "out")
    with pytest.raises(UserError, match="no calibration rows"):
        convert(runtime, source, tmp_path / "out", feeds=[])


def test_parts_stay_in_float(tmp_path: Path) -> None:
    for package in PACKAGES["openvino"]:
        pytest.importorskip(package)
    feeds, source = [as_feeds(batch_of("learnt", 8))], source_of("learnt", ".onnx")
    every = load(bundle_of("learnt", "openvino", "int8")).info["files"]["model.bin"]["bytes"]
    some = convert("openvino", source, tmp_path / "some", feeds=feeds, keep_float=["table", "image.0"])
    assert some["bytes"] > 3 * every, "the table is most of the model"
    with pytest.raises(UserError, match="no node's name has 'hedas' in it"):
        convert("openvino", source, tmp_path / "none", feeds=feeds, keep_float=["hedas"])


def test_feeds_come_back(tmp_path: Path) -> None:
    feeds = [as_feeds(batch_of("learnt", count, seed=count)) for count in range(1, 13)]
    found = read_feeds(write_feeds(tmp_path / "feeds.safetensors", feeds))
    assert len(found) == 12
    for one, other in zip(feeds, found, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name].dtype == value.dtype
            np.testing.assert_array_equal(other[name], value)


def test_an_exporter_that_is_killed_or_unknown(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ExportError, match=r"exporter abacus was ended by an error: .*No module named"):
        run_exporter("abacus", tmp_path, tmp_path, {})
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho so far >&2\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(subprocesses.sys, "executable", str(script))
    with pytest.raises(ExportError, match="ended by signal SIGKILL: so far"):
        run_exporter("openvino", tmp_path, tmp_path, {})


def test_progress_and_a_stop(tmp_path: Path, monkeypatch) -> None:
    script, told = tmp_path / "python", []
    script.write_text(f"#!/bin/sh\nsleep 1; echo '{{\"made\": {{}}}}'; touch {tmp_path}/ended\n")
    script.chmod(0o755)
    monkeypatch.setattr(subprocesses.sys, "executable", str(script))
    monkeypatch.setattr(subprocesses, "SECONDS", 0.1)
    assert run_exporter("openvino", tmp_path, tmp_path, {}, report=lambda *what: told.append(what)) == {}
    assert told[0] == (0, 1, "openvino, 0 s") and told[-1] == (1, 1, "openvino") and len(told) > 3
    (tmp_path / "ended").unlink()

    def stop(*what: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_exporter("openvino", tmp_path, tmp_path, {}, report=stop)
    assert not (tmp_path / "ended").exists()


@pytest.mark.slow
def test_table_of_runtimes(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes, the largest difference and the p50 latency of one row, one thread."""
    from runtime_models import measured

    chosen = [name for name in PACKAGES if all(package_is_there(package) for package in PACKAGES[name])]
    with capsys.disabled():
        print("\n| model | runtime | precision | bytes | largest difference | p50, ms |\n|---|---|---|---|---|---|")
        for line in measured(MODELS, chosen):
            print(line)


def package_is_there(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return name in sys.modules
