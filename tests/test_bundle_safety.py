"""Bundles that are damaged, exchanged or reach outside: one sentence, exit code 2, and nothing is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
from export_models import tiny_preprocessor, write_tiny_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tiny_project import distill, refusal

from distill.contracts import UserError
from distill.export.bundle import write_bundle
from distill.onnx_file import check_one_file
from distill.predict import load
from distill.runs import sha256_file
from distill.targets import tasks_from_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("safety")
    write_bundle(
        folder / "bundle",
        model_path=write_tiny_graph(folder / "graph.onnx"),
        preprocessor=tiny_preprocessor(folder, image_size=8),
        tasks=tasks_from_json({"category": ["apple", "bird", "chair"]}),
        name="tiny",
        source={},
        info={},
    )
    return folder / "bundle"


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "bundle")


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a graph or a tokenizer fails the test."""

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("something was opened")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    monkeypatch.setattr(tokenizers.Tokenizer, "from_file", opened, raising=False)
    monkeypatch.setattr("distill.predict.Preprocessor.load", opened)


def content(bundle: Path, **changes: Any) -> None:
    file = bundle / "bundle.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def listed(bundle: Path, **files: dict[str, Any] | None) -> None:
    """Change what ``bundle.json`` says of files; None leaves one out."""
    known = json.loads((bundle / "bundle.json").read_text())["files"] | files
    content(bundle, files={name: entry for name, entry in known.items() if entry is not None})


def sign(bundle: Path, name: str) -> None:
    """Make the hash that of the file as it is."""
    listed(bundle, **{name: {"bytes": 1, "sha256": sha256_file(bundle / name)}})


def truncated(bundle: Path) -> None:
    data = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(data[: len(data) // 2])


def truncated_and_signed(bundle: Path) -> None:
    truncated(bundle)
    sign(bundle, "model.onnx")


def one_bit(bundle: Path) -> None:
    data = bytearray((bundle / "preprocess.json").read_bytes())
    data[-5] ^= 1
    (bundle / "preprocess.json").write_bytes(data)


def exchanged(bundle: Path) -> None:
    labels, spec = (bundle / name for name in ("labels.json", "preprocess.json"))
    first, second = labels.read_bytes(), spec.read_bytes()
    labels.write_bytes(second)
    spec.write_bytes(first)


def of_another_bundle(bundle: Path) -> None:
    write_tiny_graph(bundle / "model.onnx", seed=3)


def missing(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()


def unlisted_tokenizer(bundle: Path) -> None:
    listed(bundle, **{"tokenizer.json": None})


def unlisted_preprocessing(bundle: Path) -> None:
    listed(bundle, **{"preprocess.json": None})


def linked_model(bundle: Path) -> None:
    (bundle / "model.onnx").rename(bundle.parent / "elsewhere.onnx")
    (bundle / "model.onnx").symlink_to(bundle.parent / "elsewhere.onnx")


def linked_content(bundle: Path) -> None:
    (bundle / "bundle.json").rename(bundle.parent / "elsewhere.json")
    (bundle / "bundle.json").symlink_to(bundle.parent / "elsewhere.json")


def named_outside(bundle: Path) -> None:
    (bundle.parent / "notes").write_text("x")
    listed(bundle, **{"../notes": {"sha256": sha256_file(bundle.parent / "notes")}})


def named_absolutely(bundle: Path) -> None:
    listed(bundle, **{str(bundle / "labels.json"): {"sha256": sha256_file(bundle / "labels.json")}})


def named_below(bundle: Path) -> None:
    (bundle / "part").mkdir()
    (bundle / "part/notes").write_text("x")
    listed(bundle, **{"part/notes": {"sha256": sha256_file(bundle / "part/notes")}})


def named_with_a_backslash(bundle: Path) -> None:
    (bundle / "..\\notes").write_text("x")
    listed(bundle, **{"..\\notes": {"sha256": sha256_file(bundle / "..\\notes")}})


def newer(bundle: Path) -> None:
    content(bundle, version=3, files=["another", "form"])


def nested(bundle: Path) -> None:
    (bundle / "bundle.json").write_text("[" * 100_000)


def long_name(bundle: Path) -> None:
    listed(bundle, **{300 * "a": {"sha256": ""}})


def no_inputs(bundle: Path) -> None:
    content(bundle, inputs=None)


def odd_inputs(bundle: Path) -> None:
    content(bundle, inputs={"image": 3})


BROKEN: dict[Callable[[Path], None], str] = {
    truncated: "was changed after export",
    truncated_and_signed: "is no whole ONNX file",
    one_bit: "was changed after export",
    exchanged: "was changed after export",
    of_another_bundle: "was changed after export",
    missing: "lacks its file 'tokenizer.json'",
    unlisted_tokenizer: "does not list tokenizer.json",
    unlisted_preprocessing: "does not list preprocess.json",
    linked_model: "model.onnx is a link",
    linked_content: "bundle.json is a link",
    named_outside: "lacks its file '../notes'",
    named_absolutely: "lacks its file '/",
    named_below: "lacks its file 'part/notes'",
    named_with_a_backslash: r"lacks its file '..\\notes'",
    newer: "version 3 for onnxruntime; this version reads multidistill-bundle 2",
    nested: "is malformed (RecursionError",
    long_name: "lacks its file 'aaa",
    no_inputs: "is malformed (TypeError",
    odd_inputs: "is malformed (TypeError",
}


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_broken_bundle_is_refused_unopened(breaks: Callable[[Path], None], bundle: Path) -> None:
    breaks(bundle)
    assert BROKEN[breaks] in refusal(distill("predict", bundle, "--text", "red"))


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("version", ["1", 1.0, True, None, 0, -1, [1], {"1": 1}])
def test_a_version_is_a_whole_number(version: Any, bundle: Path) -> None:
    content(bundle, version=version)
    said = refusal(distill("predict", bundle, "--text", "red"))
    assert "bundle.json is malformed" in said and "not a whole number" in said


def outside(where: str) -> TensorProto:
    tensor = TensorProto(name=where, data_type=TensorProto.FLOAT, dims=[4])
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../secret"
    if where != "unmarked":
        tensor.data_location = TensorProto.EXTERNAL
    return tensor


def with_weights_outside(model: onnx.ModelProto, where: str) -> None:
    """Put a tensor that lies elsewhere in each place of a model that may hold one."""
    graph, tensor = model.graph, outside(where)
    if where in ("initializer", "unmarked"):
        graph.initializer.append(tensor)
    elif where == "constant":
        graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    elif where == "constants":
        graph.node.append(helper.make_node("Custom", [], ["c"], domain="d"))
        graph.node[-1].attribute.append(
            onnx.AttributeProto(name="t", type=onnx.AttributeProto.TENSORS, tensors=[tensor])
        )
    elif where == "sparse":
        graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif where == "branch":
        branch = helper.make_graph([], "branch", [], [], [tensor])
        graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch))
    elif where == "function":
        function = model.functions.add()
        function.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    else:
        model.training_info.add().algorithm.initializer.append(tensor)


PLACES = ["initializer", "unmarked", "constant", "constants", "sparse", "branch", "function", "training"]


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("where", PLACES)
def test_weights_outside_the_file_are_never_opened(where: str, bundle: Path) -> None:
    (bundle.parent / "secret").write_bytes(np.ones(4, np.float32).tobytes())
    model = onnx.load(bundle / "model.onnx")
    with_weights_outside(model, where)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    sign(bundle, "model.onnx")
    said = refusal(distill("predict", bundle, "--text", "red"))
    assert f"has weights outside itself ({where!r})" in said


def test_a_task_without_output_is_refused(bundle: Path) -> None:
    (bundle / "labels.json").write_text(json.dumps({"category": ["a", "b", "c"], "colour": ["d", "e"]}))
    sign(bundle, "labels.json")
    assert "names 'colour', which the model does not answer" in refusal(distill("predict", bundle, "--text", "red"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.json", '{"category": ["a", "b"]}', "has 2 names for 'category', and the model answers [3] numbers"),
        ("labels.json", '{"category": ["a", "b", "c", "d"]}', "has 4 names for 'category'"),
        ("labels.json", '{"category": {"kind": "multilabel", "names": [1, 2, 3]}}', "a name of 'category' is no text"),
        ("labels.json", "[" * 100_000, "labels.json does not say what the model's outputs are"),
        ("preprocess.json", "[" * 100_000, "preprocess.json is malformed"),
        ("preprocess.json", '{"image": {"size": 1000000000}}', "makes 'image' uint8 [3, 1000000000, 1000000000], and"),
        ("preprocess.json", '{"image": {"size": "x"}}', "makes 'image' uint8 [3, 'x', 'x'], and the model reads"),
    ],
)
def test_files_that_do_not_fit_the_model_are_refused(name: str, text: str, message: str, bundle: Path) -> None:
    (bundle / name).write_text(text)
    sign(bundle, name)
    assert message in refusal(distill("predict", bundle, "--text", "red"))


@pytest.mark.parametrize(("field", "value"), [("max_length", 10**30), ("max_length", 0), ("pad_id", 10**30)])
def test_numbers_of_a_tokenizer_have_bounds(field: str, value: int, bundle: Path) -> None:
    spec = json.loads((bundle / "preprocess.json").read_text())
    spec["text"][field] = value
    (bundle / "preprocess.json").write_text(json.dumps(spec))
    sign(bundle, "preprocess.json")
    assert "preprocess.json is malformed" in refusal(distill("predict", bundle, "--text", "red"))


def test_a_field_that_others_would_read_as_another_is_refused(whole: Path, tmp_path: Path) -> None:
    """Readers cut keys to 32 bits, so that this one is field 7 to them, the graph, and unknown to who does not."""
    model = onnx.load(whole / "model.onnx")
    with_weights_outside(model, "initializer")
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    size = bytes([*(len(graph) >> 7 * place & 127 | 128 for place in range(4)), len(graph) >> 28])
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString() + b"\xba\x80\x80\x80\x10" + size + graph)
    with pytest.raises(UserError, match="is no whole ONNX file"):
        check_one_file(file)


def test_a_whole_bundle_is_read(whole: Path, bundle: Path) -> None:
    assert load(bundle).predict([{"text": "red"}]) == load(whole).predict([{"text": "red"}])
    (bundle.parent / "link").symlink_to(bundle)
    assert load(bundle.parent / "link").tasks, "the folder's own name may be a link"


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=60), start=st.integers(0, 10**6), length=st.integers(0, 40))
def test_any_bytes_are_read_or_refused(whole: Path, noise: bytes, start: int, length: int) -> None:
    """A damaged file gives no traceback, and one that ``onnx`` itself can read with a tensor elsewhere is refused."""
    model = onnx.load(whole / "model.onnx")
    with_weights_outside(model, "initializer")
    data = model.SerializeToString()
    start %= len(data)
    data = data[:start] + noise + data[start + length :]
    file = whole.parent / "noise.onnx"
    file.write_bytes(data)
    try:
        check_one_file(file)
    except UserError:
        return
    try:
        parsed = onnx.ModelProto.FromString(data)
    except Exception:  # of which type depends on protobuf's implementation
        return
    assert not [tensor for tensor in parsed.graph.initializer if tensor.data_location or tensor.external_data]
