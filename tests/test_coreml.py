"""Core ML packages: what they hold, what they mean, and what is refused; Core ML itself runs on macOS alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_models import as_feeds
from runtime_models import LENGTH, batch_of, bundle_of, said, source_of
from test_encoders import PARAMS, build, checkpoints, example

from distill.contracts import UserError
from distill.export.conversion import convert
from distill.export.onnx import graph_inputs, graph_outputs
from distill.export.subprocesses import ExportError
from distill.export.torch_program import export_program
from distill.predict import EMBEDDING, load, verify_bundle
from distill.runtimes import RUNTIMES
from distill.runtimes.coreml import MANIFEST, MODEL, PACKAGE, WEIGHTS, check_package, operations

coremltools = pytest.importorskip("coremltools")
__all__ = ["checkpoints"]  # a fixture
MODELS = ["cross_attention", "concat", "gru", "learnt"]
ELSEWHERE = pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")


def package(kind: str, precision: str) -> Path:
    return bundle_of(kind, "coreml", precision) / PACKAGE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_program_means_what_torch_says(kind: str, precision: str) -> None:
    from mil_reference import Program

    program, tolerance = Program(package(kind, precision)), 1e-4 if precision == "fp32" else 2e-2
    for count, length in ((3, LENGTH), (2, 3)):
        batch = batch_of(kind, count, length, seed=count)
        feeds, expected = as_feeds(batch), said(kind, batch)
        feeds = {
            name: np.pad(value, ((0, 0), (0, LENGTH - length))) if name in ("text", "text_mask") else value
            for name, value in feeds.items()
        }
        found = program.run(feeds)
        assert [*found] == [*expected]
        for name, value in expected.items():
            rows = batch.present.get(name.removeprefix(EMBEDDING), batch.ids >= 0).numpy()
            np.testing.assert_allclose(found[name][rows], value[rows], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in PARAMS if name != "pretrained_audio"])
def test_every_encoder_means_what_torch_says(kind: str, checkpoints: Path, tmp_path: Path) -> None:
    from mil_reference import Program

    model = build(kind, checkpoints)
    batch = example(model)
    export_program(model, batch, tmp_path / "model.pt2", rows=1)
    convert("coreml", tmp_path / "model.pt2", tmp_path)
    feeds = {name: value.numpy() for name, value in graph_inputs(batch).items()}
    with torch.no_grad():
        expected = graph_outputs(model(batch))
    found = Program(tmp_path / PACKAGE).run(feeds)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_tower_that_coremltools_cannot_read_is_told(checkpoints: Path, tmp_path: Path) -> None:
    model = build("pretrained_audio", checkpoints)
    export_program(model, example(model), tmp_path / "model.pt2", rows=1)
    with pytest.raises(
        ExportError, match="coreml cannot convert the model: ValueError: Tensors in 'values' of the stack"
    ):
        convert("coreml", tmp_path / "model.pt2", tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_package_has_our_names_shapes_and_types(precision: str) -> None:
    bundle = bundle_of("learnt", "coreml", precision)
    info = verify_bundle(bundle)
    spec = coremltools.models.MLModel(str(bundle / PACKAGE), skip_model_load=True).get_spec()
    types = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType
    for told, tensors in ((spec.description.input, info["inputs"]), (spec.description.output, info["outputs"])):
        assert [each.name for each in told] == [*tensors]
        for each in told:
            array = each.type.multiArrayType
            assert list(array.shape) == [1, *tensors[each.name]["shape"][1:]]
            whole = tensors[each.name]["dtype"] != "float32"
            assert array.dataType == (types.INT32 if whole else types.FLOAT32)
    assert spec.specificationVersion == 7, "iOS 16 and macOS 13"


def test_half_precision_halves_the_weights_and_the_ops_are_known() -> None:
    sizes = {name: (package("learnt", name).parent / WEIGHTS).stat().st_size for name in ("fp32", "fp16")}
    assert sizes["fp16"] < 0.51 * sizes["fp32"]
    kinds = {kind for kind, _ in operations(package("gru", "fp16"))}
    assert {"sigmoid", "tanh", "linear", "const"} <= kinds and "custom_layer" not in kinds


def test_the_same_model_gives_the_same_bytes_and_no_other_files(tmp_path: Path) -> None:
    convert("coreml", source_of("concat", ".pt2"), tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        RUNTIMES["coreml"].files
    )
    for file in RUNTIMES["coreml"].files:
        assert (tmp_path / file).read_bytes() == (bundle_of("concat", "coreml", "fp32") / file).read_bytes(), file
        for trace in (str(Path.home()).encode() + b"/", b"site-packages", str(tmp_path).encode()):
            assert trace not in (tmp_path / file).read_bytes()


def test_a_bundle_covers_the_packages_files(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_of("learnt", "coreml", "fp32"), bundle)
    assert {MANIFEST, MODEL, WEIGHTS} < {*verify_bundle(bundle)["files"]}
    assert (
        "It runs on coreml (`pip install 'multidistill[coreml]'`), without torch" in (bundle / "README.md").read_text()
    )
    (bundle / WEIGHTS).write_bytes((bundle / WEIGHTS).read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"weight\.bin was changed after export"):
        verify_bundle(bundle)
    (bundle / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"lacks its file 'model\.mlpackage/Data"):
        verify_bundle(bundle)
    shutil.copytree(bundle_of("learnt", "coreml", "fp32") / PACKAGE, tmp_path / "else")
    shutil.rmtree(bundle / PACKAGE)
    (bundle / PACKAGE).symlink_to(tmp_path / "else", target_is_directory=True)
    with pytest.raises(UserError, match=r"model\.mlpackage is a link"):
        verify_bundle(bundle)


def test_a_package_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    from coremltools.proto import Model_pb2

    shutil.copytree(package("concat", "fp32"), tmp_path / PACKAGE)
    check_package(tmp_path / PACKAGE)
    manifest, model = tmp_path / MANIFEST, tmp_path / MODEL
    whole, bytes_before = json.loads(manifest.read_text()), model.read_bytes()
    entries = whole["itemInfoEntries"]
    next(iter(entries.values()))["path"] = "../../other.mlmodel"
    manifest.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"it names '\.\./\.\./other\.mlmodel', which is none of its own files"):
        check_package(tmp_path / PACKAGE)
    shutil.copyfile(package("concat", "fp32").parent / MANIFEST, manifest)
    spec = Model_pb2.Model.FromString(bytes_before)
    (function,) = spec.mlProgram.functions.values()
    blob = next(
        operation.attributes["val"].blobFileValue
        for operation in function.block_specializations[function.opset].operations
        if operation.attributes["val"].WhichOneof("value") == "blobFileValue"
    )
    blob.fileName = "/etc/hosts"
    model.write_bytes(spec.SerializeToString())
    with pytest.raises(UserError, match="it names '/etc/hosts'"):
        check_package(tmp_path / PACKAGE)
    model.write_bytes(b"junk")
    with pytest.raises(UserError, match="it is no Core ML program"):
        check_package(tmp_path / PACKAGE)


@ELSEWHERE
def test_elsewhere_it_is_said_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"Core ML runs on macOS alone, .* is \w+; copy the bundle to a Mac"):
        load(bundle_of("learnt", "coreml", "fp32"))


def test_a_model_that_cannot_be_converted(tmp_path: Path) -> None:
    source = tmp_path / "model.pt2"
    source.write_bytes(b"junk")
    with pytest.raises(ExportError, match=r"coreml cannot convert the model: \w+: "):
        convert("coreml", source, tmp_path / "out")
    with pytest.raises(UserError, match=r"converts \.pt2 files"):
        convert("coreml", tmp_path / "model.zip", tmp_path / "out")


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS alone")
@pytest.mark.parametrize("kind", MODELS)
def test_core_ml_says_what_torch_says(kind: str) -> None:
    batch = batch_of(kind, 3)
    found, expected = load(bundle_of(kind, "coreml", "fp32")).run(as_feeds(batch)), said(kind, batch)
    for name, value in expected.items():
        rows = batch.present.get(name.removeprefix(EMBEDDING), batch.ids >= 0).numpy()
        np.testing.assert_allclose(found[name][rows], value[rows], rtol=1e-2, atol=1e-2, err_msg=name)
