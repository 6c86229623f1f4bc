"""The gate refuses exports that are wrong though they run: normalisation, inputs, heads, preprocessing."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from onnx import ModelProto, numpy_helper
from PIL import Image
from tiny_project import distill_process, make_project

from distill import pipeline
from distill.contracts import VALID
from distill.data.loader import InputSpec, Loader
from distill.data.prepare import prepare
from distill.data.prepared import PreparedData
from distill.data_config import DataConfig
from distill.export.bundle import ParityError
from distill.gate import Gate, check_reading
from distill.predict import MODEL_FILE
from distill.preprocess import Preprocessor, Tokenizer
from distill.recipe import load_recipe
from distill.workspace import STUDENT, Workspace

FP32 = "onnx-fp32"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    make_project(folder)
    answer = distill_process("export", "recipe.yaml", cwd=folder)
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture
def work(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(exported)
    recipe = load_recipe(Path("recipe.yaml"))
    done = {item.stage.name: item.artifact for item in pipeline.plan(recipe, until="export")}
    return pipeline.workspace(recipe, done)


def whole(model: ModelProto) -> None:
    pass


def another_mean(model: ModelProto) -> None:
    (node,) = (node for node in model.graph.node if node.name == "encoders.image/Sub")
    shift(model, node.input[1], 0.3)


def another_deviation(model: ModelProto) -> None:
    (node,) = (node for node in model.graph.node if node.name == "encoders.image/Mul")
    shift(model, node.input[1], -0.004)


def shift(model: ModelProto, name: str, by: float) -> None:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) + by).astype(np.float32), name))


def exchanged_inputs(model: ModelProto) -> None:
    """Both are bool [B], and all rows have both modalities."""
    rename(model, {"image_present": "text_present", "text_present": "image_present"}, inputs=True)


def exchanged_tasks(model: ModelProto) -> None:
    """Both are float [B, 3]."""
    rename(model, {"colour": "shape", "shape": "colour"}, inputs=False)


def rename(model: ModelProto, names: dict[str, str], *, inputs: bool) -> None:
    for node in model.graph.node:
        field = node.input if inputs else node.output
        field[:] = [names.get(name, name) for name in field]


def dropped_head(model: ModelProto) -> None:
    kept = [value for value in model.graph.output if value.name != "shape"]
    del model.graph.output[:]
    model.graph.output.extend(kept)


WRONG: dict[Callable[[ModelProto], None], str] = {
    another_mean: "output 'logits",
    another_deviation: "output 'logits",
    exchanged_inputs: "with .* alone: output",
    exchanged_tasks: "output 'logits",
    dropped_head: "'shape'",
}


@pytest.mark.parametrize("breaks", [whole, *WRONG], ids=lambda breaks: breaks.__name__)
def test_a_wrong_graph_is_refused(breaks: Callable[[ModelProto], None], work: Workspace, tmp_path: Path) -> None:
    model = onnx.load(work.path("export") / FP32 / MODEL_FILE)
    breaks(model)
    onnx.save(model, tmp_path / "broken.onnx")
    gate = Gate(work)
    if breaks is whole:
        found = gate.write(tmp_path / FP32, tmp_path / "broken.onnx", {}, 0.9)
        assert found == work.done["export"].info["parity"][FP32]
        return
    with pytest.raises((ParityError, ValueError), match=WRONG[breaks]):
        gate.write(tmp_path / FP32, tmp_path / "broken.onnx", {}, 0.9)


def test_wrong_preprocessing_is_refused_where_the_graph_is_right(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = work.preprocessor

    def shorter(spec: InputSpec) -> Preprocessor:
        found = right(spec)
        assert found.tokenizer is not None
        return Preprocessor(found.formats, Tokenizer(found.tokenizer.path, 4, found.tokenizer.pad_id))

    monkeypatch.setattr(work, "preprocessor", shorter)
    with pytest.raises(ParityError, match=r"input 'text' of the same 15 validation rows is int64 \[15, 4\]"):
        Gate(work).write(tmp_path / FP32, work.path("export") / FP32 / MODEL_FILE, {}, 0.9)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DataConfig, Loader, InputSpec]]:
    """Rows of an oblong picture, a series, a record and a text, of which some lack one."""
    folder, random = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["picture", "trace", "length", "kind", "words", "label", "split"])
        for row in range(60):
            Image.fromarray(random.integers(0, 256, (20, 31, 3), np.uint8)).save(folder / f"{row}.png")
            np.save(folder / f"{row}.npy", random.normal(5, 3, (8 + row % 5, 2)).astype(np.float32))
            words = " ".join(random.choice(["red", "green", "blue", "cat", "dog"], 1 + row % 7))
            split = "valid" if row % 3 == 2 else "test" if row % 10 == 0 else "train"
            trace, number = f"{row}.npy" if row % 7 else "", random.normal(100, 20) if row % 4 else ""
            table.writerow([f"{row}.png", trace, number, "abc"[row // 2 % 3], words, row % 2, split])
    config = DataConfig.model_validate(
        {
            "source": {"type": "table", "path": str(folder / "rows.csv")},
            "modalities": {"image": "picture", "series": "trace", "tabular": ["length", "kind"], "text": "words"},
            "targets": {"label": "label"},
            "working_size": 16,
            "series": {"steps": 12, "channels": 2},
            "tabular": {"categories": ["kind"]},
        }
    )
    prepare(config, folder / "data", Path())
    spec = InputSpec(("image", "series", "tabular"), tiny.write_wordpiece(folder / "tokenizer.json"), 8, 0)
    data = PreparedData.open(folder / "data", config)
    yield config, Loader(data, VALID, {STUDENT: spec}, batch_size=8, seed=0, augment=None, shuffle=False), spec


def preprocessor(loader: Loader, spec: InputSpec, **changes: Any) -> Preprocessor:
    formats = dict(loader.data.formats)
    for modality, fields in changes.items():
        formats[modality] = dataclasses.replace(formats[modality], **fields)
    assert spec.tokenizer is not None
    return Preprocessor(formats, Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id))


def test_bundles_read_what_training_read(mixed: tuple[DataConfig, Loader, InputSpec]) -> None:
    config, loader, spec = mixed
    check_reading(preprocessor(loader, spec), loader, spec, config)


@pytest.mark.parametrize(
    ("modality", "change", "message"),
    [
        ("image", lambda format: {"crop": True}, "input 'image' of row .* is not what training read"),
        ("image", lambda format: {"size": 12}, "input 'image' of the same 16 validation rows is uint8"),
        ("series", lambda format: {"mean": tuple(x + 0.01 for x in format.mean)}, "input 'series' of row"),
        ("series", lambda format: {"std": tuple(2 * x for x in format.std)}, "input 'series' of row"),
        ("series", lambda format: {"steps": 9}, "input 'series'"),
        ("tabular", lambda format: {"mean": (0.0,)}, "input 'tabular' of row .* differs by up to"),
        ("tabular", lambda format: {"std": (1.0,)}, "input 'tabular' of row"),
        ("tabular", lambda format: {"values": (format.values[0][::-1],)}, "input 'tabular' of row"),
    ],
)
def test_another_normalisation_is_named(
    modality: str, change: Callable[[Any], dict[str, Any]], message: str, mixed: tuple[DataConfig, Loader, InputSpec]
) -> None:
    config, loader, spec = mixed
    wrong = preprocessor(loader, spec, **{modality: change(loader.data.formats[modality])})
    with pytest.raises(ParityError, match=message):
        check_reading(wrong, loader, spec, config)
