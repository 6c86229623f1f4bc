"""int8 on other runtimes: layers that really compute with integers, audio, and ranges that training has learnt."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_models import as_feeds
from onnx import TensorProto, helper
from runtime_models import batch_of, cosine, source_of
from test_aware import ARMS, TRAIN_QAT, opened
from test_dual import RECIPE as DUAL
from test_media_encoders import batch as media_batch
from test_media_encoders import built
from tiny import around
from tiny_project import make_project
from torch import nn

from distill import aware, evaluate, pipeline
from distill.build import input_spec
from distill.bundles import BUNDLES
from distill.config import QuantizeConfig
from distill.contracts import TEST, VALID
from distill.export.conversion import EXPORTERS, convert, missing_packages
from distill.export.onnx import graph_outputs
from distill.export.torch_program import export_program
from distill.predict import load, open_graph
from distill.prints import SAME, LearntRanges, Seen, distance, fingerprint, told_by
from distill.quantization.static import quantize_static
from distill.recipe import load_recipe
from distill.rounding import Plan
from distill.runs import read_json
from distill.runtimes import RUNTIMES
from distill.workspace import STUDENT

TRAINED = [name for name in EXPORTERS if f"{name}-int8-qat" in BUNDLES]
RUNTIME = pytest.mark.parametrize(
    "runtime", [pytest.param(name, marks=[pytest.mark.slow] if name != "openvino" else []) for name in TRAINED]
)


def needed(runtime: str) -> None:
    if missing_packages(runtime):
        pytest.skip(f"needs {' and '.join(missing_packages(runtime))}")


def seen(*parts: np.ndarray) -> Seen:
    whole = Seen()
    for part in parts:
        whole.add(part)
    return whole


def test_prints_tell_values_by_their_numbers_alone() -> None:
    values = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    padded = np.pad(values.transpose(2, 0, 1), ((0, 3), (0, 0), (1, 0)))
    parts = seen(*(values[row : row + 1] * 1.0 for row in range(6))).print()
    for same in (fingerprint(padded), parts):
        assert distance([fingerprint(values)], [same]) < 1e-9
    for other in (values * 1.001, -values, np.abs(values), values[:5]):
        assert distance([fingerprint(values)], [fingerprint(other)]) > SAME


def test_learnt_ranges_are_found_by_the_numbers(tmp_path: Path) -> None:
    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8])

    nodes = [helper.make_node("Relu", ["x"], ["positive"]), helper.make_node("Tanh", ["positive"], ["small"])]
    graph = helper.make_graph(nodes, "two", [value("x")], [value("small")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    rows = {"x": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)}
    positive = np.maximum(rows["x"], 0)
    ranges = LearntRanges(tmp_path / "g.onnx", {"positive": (0.0, 2.0), "small": (-1.0, 1.0), "gone": (0.0, 9.0)}, rows)
    assert ranges.of([seen(*positive.T)]) == (0.0, 2.0)
    assert ranges.of([seen(np.tanh(positive))]) == (-1.0, 1.0)
    assert ranges.of([seen(positive), seen(np.tanh(positive))]) == (-1.0, 2.0), "one range for both holds both"
    assert ranges.of([seen(positive), seen(rows["x"])]) is None and ranges.of([seen(0 * positive)]) is None
    inside = np.clip(positive, 0, 1).mean(axis=1)
    assert ranges.of([seen(positive), seen(inside)]) == (0.0, 2.0) and ranges.of([seen(inside)]) is None


def test_rows_that_tell_values_miss_each_modality_once() -> None:
    rows = told_by(
        as_feeds(batch_of("learnt", 20)) | {name: np.ones(20, bool) for name in ("image_present", "text_present")}
    )
    assert all(len(value) == 16 for value in rows.values()) and np.array_equal(rows["text"][:8], rows["text"][8:])
    image, text = rows["image_present"], rows["text_present"]
    assert image[:8].all() and text[:8].all() and not image[8:].all() and not text[8:].all()
    assert (image | text).all() and (image & text)[8:].any()


def test_openvino_computes_with_integers_what_the_onnx_graph_says(tmp_path: Path) -> None:
    needed("openvino")
    feeds, source = [as_feeds(batch_of("learnt", 64, seed=1))], source_of("learnt", ".onnx")
    quantize_static(source, tmp_path / "int8.onnx", feeds, QuantizeConfig())
    graph = convert("openvino", tmp_path / "int8.onnx", tmp_path)
    opened_model: Any = RUNTIMES["openvino"](tmp_path / "model.xml", graph)
    rows = as_feeds(batch_of("learnt", 100, seed=2))
    found, meant = opened_model.run(rows), open_graph(tmp_path / "int8.onnx").run(rows)
    assert min(cosine(found[name], value) for name, value in meant.items()) > 0.999
    nodes = [node.get_rt_info() for node in opened_model.request.get_compiled_model().get_runtime_model().get_ops()]
    told = [{key: node[key].astype(str) for key in ("layerType", "runtimePrecision")} for node in nodes]
    layers = [one["runtimePrecision"] for one in told if one["layerType"] in ("Convolution", "FullyConnected")]
    assert len(layers) >= 8 and {*layers} <= {"u8", "i8"}


@pytest.mark.slow
def test_executorch_puts_a_learnt_range_wherever_its_observer_is() -> None:
    """Values that share a range have one observer, by several names."""
    needed("executorch")
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver

    from distill.export.executorch import _carry

    root, graph = nn.Module(), torch.fx.Graph()
    root.one = root.two = HistogramObserver(dtype=torch.int8, quant_min=-128, quant_max=127)
    value = graph.call_module("one", (graph.placeholder("x"),))
    graph.output(graph.call_module("two", (graph.call_function(torch.relu, (value,)),)))
    prepared = torch.fx.GraphModule(root, graph)

    class Learnt:
        def of(self, values: list[Seen]) -> tuple[float, float]:
            assert len(values) == 2 and values[0].low < values[1].low == 0
            return -1.0, 2.0

    rows: Any = [(torch.linspace(-3, 3, 7),)]
    ranges: Any = Learnt()
    assert _carry(prepared, rows, ranges) == {"learnt": 1, "calibrated": 0}
    for observer in (prepared.one, prepared.two):
        assert isinstance(observer, MinMaxObserver)
        assert (float(observer.min_val), float(observer.max_val)) == (-1.0, 2.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the packages' own, of their imports
def test_executorch_rounds_small_weights_as_finely_as_large_ones() -> None:
    needed("executorch")
    from distill.export.executorch import _quantized

    ids = torch.arange(64)[None]
    for scale in (1.0, 0.01):
        model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 8)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(scale)
            program, _ = _quantized(torch.export.export(model, (ids,)), [{"ids": ids.numpy()}], None, [])
            found, meant = (one(ids)[0].numpy() for one in (program.module(), model))
        assert cosine(found, meant) > 0.999, scale


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["feeds", "dynamic"])
def test_litert_hears(kind: str, tmp_path: Path) -> None:
    """A spectrogram's filters are a constant factor of a product, which the runtime has in float alone."""
    needed("litert")
    model = around({"audio": built("audio_convnet")}).eval()
    export_program(model, media_batch("audio", 4), tmp_path / "audio.pt2", rows=1)
    given: dict[str, Any] = {"dynamic": True} if kind == "dynamic" else {"feeds": [as_feeds(media_batch("audio", 16))]}
    graph = convert("litert", tmp_path / "audio.pt2", tmp_path, **given)
    rows = media_batch("audio", 24, seed=3)
    found = RUNTIMES["litert"](tmp_path / "model.tflite", graph).run(as_feeds(rows))
    with torch.no_grad():
        meant = {name: value.numpy() for name, value in graph_outputs(model(rows)).items()}
    assert min(cosine(found[name], value) for name, value in meant.items()) > 0.99


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained for int8."""
    folder = tmp_path_factory.mktemp("trained")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pipeline.run(load_recipe("recipe.yaml", ARMS), until="qat", quiet=True)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    yield


@RUNTIME
def test_bundles_say_what_was_trained(runtime: str, copied: None) -> None:
    needed(runtime)
    name, gate = f"{runtime}-int8-qat", "export.min_agreement_int8=0.8"  # of 15 rows, so one is 0.07
    work = opened(f"export.bundles=[{name}]", TRAIN_QAT, "trackers=[]", gate)
    model, bundle, shipped = aware.trained(work), load(f"runs/tiny/quantize/{name}"), work.model("pruned")
    assert bundle.info["source"]["stage"] == "qat" and bundle.info["info"]["precision"] == "int8, trained"
    for split in (VALID, TEST):
        batches = evaluate.clean_batches(work.clean_loader(split, input_spec(model), STUDENT), STUDENT)
        expected, found = evaluate.predict_torch(model, batches), evaluate.predict_bundle(bundle, batches)
        before = evaluate.predict_torch(shipped, batches)
        for task, logits in expected.items():
            off, learnt = (np.abs(logits - other).mean() for other in (found[task], before[task]))
            assert off < 0.02 * np.abs(logits).max() and off < 0.2 * learnt
    if runtime != "openvino":  # which has the graph itself
        told = read_json(Path("runs/tiny/quantize/manifest.json"))["info"]["others"][name]["ranges"]
        values = Plan.load(Path("runs/tiny/qat") / aware.PLAN_FILE).values
        assert told["learnt"] >= 0.6 * len({tuple(place.modules) for place in values})


@RUNTIME
def test_encoders_of_one_embedding_space_are_trained_for_it(runtime: str, copied: None) -> None:
    needed(runtime)
    Path("dual.yaml").write_text(DUAL, encoding="utf-8")
    names = [f"{runtime}-fp32", f"{runtime}-int8-qat"]  # the parts of both are made, of different models
    bundles = f"export.bundles=[{','.join(names)}]"
    recipe = load_recipe("dual.yaml", [bundles, TRAIN_QAT, "trackers=[]", "export.min_agreement_int8=0.9"])
    done = pipeline.run(recipe, until="quantize", quiet=True)
    parity = done["quantize"].info["parity"]
    assert all(found["agreement"] > 0.995 for found in parity[names[1]].values())
    for modality in ("image", "text"):
        alone = load(f"runs/dual/quantize/{names[1]}-{modality}")
        assert alone.info["source"]["stage"] == "qat" and alone.info["info"]["precision"] == "int8, trained"
        assert {name.split("_")[0] for name in alone.inputs} == {modality}
