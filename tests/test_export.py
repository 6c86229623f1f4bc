"""The exported graph says what the model says, at any batch and length, and the bundle around it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_models import CLASSES, LABELS, SIZE, VOCAB, StandIn, as_feeds, rows, tiny_preprocessor, trained
from tiny import make_batch, make_model
from torch import nn

from distill.contracts import Batch, Outputs, UserError
from distill.export.bundle import ParityError, parity, verify_bundle, write_bundle
from distill.export.onnx import export_onnx, graph_outputs
from distill.predict import open_session
from distill.targets import tasks_from_json

INPUTS = ["image", "image_present", "text", "text_mask", "text_present"]
OUTPUTS = ["category", "subcategory", "embedding_fused", "embedding_image", "embedding_text"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    return path, export_onnx(trained(), rows(4, 6, seed=1), path)


def agree(model: nn.Module, path: Path, batch: Batch) -> None:
    session = open_session(path)
    wanted = {value.name for value in session.get_inputs()}
    feeds = {name: value for name, value in as_feeds(batch).items() if name in wanted}
    found = dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
    with torch.no_grad():
        expected = graph_outputs(model.eval()(batch))
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)


def test_names_order_types_and_shapes(exported: tuple[Path, dict]) -> None:
    path, info = exported
    assert list(info["inputs"]) == INPUTS
    assert list(info["outputs"]) == OUTPUTS
    assert info["inputs"]["image"] == {"dtype": "uint8", "shape": ["batch", 3, SIZE, SIZE]}
    assert info["inputs"]["text"] == {"dtype": "int64", "shape": ["batch", "length"]}
    assert info["inputs"]["text_mask"] == {"dtype": "bool", "shape": ["batch", "length"]}
    assert info["outputs"]["category"] == {"dtype": "float32", "shape": ["batch", CLASSES["category"]]}
    assert info["opset"] == 20
    assert info["bytes"] == path.stat().st_size
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 6), (2, 2), (5, 11), (3, 1)])
def test_any_batch_and_length(exported: tuple[Path, dict], count: int, length: int) -> None:
    agree(trained(), exported[0], rows(count, length, seed=count + length))


def test_absent_modalities_are_ignored(exported: tuple[Path, dict]) -> None:
    batch = rows(3, 4, seed=3)
    batch.present["image"][:] = False
    other = batch._replace(inputs=batch.inputs | {"image": 255 - batch.inputs["image"]})
    session = open_session(exported[0])
    first, second = (session.run(["category"], as_feeds(each))[0] for each in (batch, other))
    np.testing.assert_array_equal(first, second)


def test_nothing_of_the_build_machine_and_little_beside_the_weights(exported: tuple[Path, dict]) -> None:
    content = exported[0].read_bytes()
    for trace in (b"/export_models.py", b"File ", b"stack_trace", str(Path.home()).encode(), b"site-packages"):
        assert trace not in content
    weights = sum(p.numel() * 4 for p in trained().parameters())
    assert len(content) < weights + 30_000


def test_nodes_are_named_after_modules(exported: tuple[Path, dict]) -> None:
    names = [node.name for node in onnx.load(exported[0]).graph.node]
    assert {"image.0/Conv", "table/Gather", "fuse.0/Gemm", "heads.category/Gemm"} <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("count", "length"), [(1, 1), (3, 3)])
def test_any_example_and_modes_are_kept(tmp_path: Path, count: int, length: int) -> None:
    model = StandIn(width=8).train()
    model.image.eval()
    before = {name: module.training for name, module in model.named_modules()}
    export_onnx(model, rows(count, length, seed=5), tmp_path / "model.onnx", opset=18)
    assert {name: module.training for name, module in model.named_modules()} == before
    agree(model, tmp_path / "model.onnx", rows(4, 5, seed=6))


class ImageOnly(nn.Module):
    """Its one embedding is also the fused one, and its aux head is not exported."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, batch: Batch) -> Outputs:
        pooled = batch.inputs["image"].float().mean(dim=(2, 3)) / 255
        return Outputs(
            {"category": self.linear(pooled), "category.image": pooled}, {"image": pooled, "fused": pooled}, {}
        )


def test_one_modality_with_a_shared_embedding(tmp_path: Path) -> None:
    full = rows(4, 3, seed=7)
    batch = full._replace(inputs={"image": full.inputs["image"]}, present={"image": full.present["image"]})
    model = ImageOnly()
    info = export_onnx(model, batch, tmp_path / "model.onnx")
    assert list(info["inputs"]) == ["image", "image_present"]
    assert list(info["outputs"]) == ["category", "embedding_fused", "embedding_image"]
    agree(model, tmp_path / "model.onnx", batch)


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
def test_our_models_are_traced_at_the_first_attempt(
    tmp_path: Path, wordpiece_file: Path, fusion: str, monkeypatch
) -> None:
    """A choice that depends on the number of rows would make torch trace them twice, the second time slowly."""
    attempts, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: attempts.append(k.get("strict")) or export(*a, **k))
    model = make_model(wordpiece_file, fusion=fusion, head_weights={"text": 2.0})
    export_onnx(model, make_batch(3), tmp_path / "model.onnx")
    assert attempts == [False]


def test_encoded_inputs_are_refused(tmp_path: Path) -> None:
    batch = rows(2, 3, seed=8)
    encoded = {
        "image": batch.inputs["image"],
        "text_encoded": torch.zeros(2, 3, 4),
        "text_mask": batch.inputs["text_mask"],
    }
    with pytest.raises(UserError, match="no 'text' input"):
        export_onnx(trained(), batch._replace(inputs=encoded), tmp_path / "model.onnx")


class Bert(nn.Module):
    """A Hugging Face text encoder fed an additive mask, as the teachers feed it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(32, 4)

    def forward(self, batch: Batch) -> Outputs:
        mask = batch.inputs["text_mask"].float()
        tokens = self.bert(
            input_ids=batch.inputs["text"], attention_mask=(1 - mask[:, None, None, :]) * -1e4
        ).last_hidden_state
        pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return Outputs({"category": self.head(pooled)}, {"text": pooled}, {})


def test_transformer_text_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Bert().eval()

    def text_rows(count: int, length: int) -> Batch:
        full = rows(count, length, seed=count)
        inputs = {name: full.inputs[name] for name in ("text", "text_mask")}
        return full._replace(inputs=inputs, present={"text": full.present["text"]})

    export_onnx(model, text_rows(1, 1), tmp_path / "model.onnx")
    for count, length in ((1, 1), (3, 5), (2, 20)):
        agree(model, tmp_path / "model.onnx", text_rows(count, length))


@pytest.fixture(scope="module")
def bundle(exported: tuple[Path, dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "student"
    write_bundle(
        folder,
        model_path=exported[0],
        preprocessor=tiny_preprocessor(folder.parent),
        tasks=tasks_from_json(LABELS),
        name="stand-in",
        source={"fingerprint": "0123456789abcdef"},
        info={"precision": "float32", "accuracy": {"category": 0.5}},
    )
    return folder


def test_bundle_content(bundle: Path, exported: tuple[Path, dict]) -> None:
    content = verify_bundle(bundle)
    assert content["runtime"] == "onnxruntime"
    assert content["source"] == {"fingerprint": "0123456789abcdef"}
    assert content["inputs"] == exported[1]["inputs"]
    assert content["outputs"] == exported[1]["outputs"]
    files = {file.name for file in bundle.iterdir()}
    assert files == {*content["files"], "bundle.json"}
    assert {"model.onnx", "preprocess.json", "tokenizer.json", "labels.json", "README.md"} == set(content["files"])
    assert json.loads((bundle / "labels.json").read_text()) == LABELS
    card = (bundle / "README.md").read_text()
    assert "- fingerprint: 0123456789abcdef" in card
    assert '- accuracy: `{"category": 0.5}`' in card
    assert "| inputs | `text` | int64 | batch x length |" in card


def test_a_changed_or_lost_file_is_found(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in bundle.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "labels.json").write_text("{}")
    with pytest.raises(UserError, match=r"labels\.json was changed"):
        verify_bundle(folder)
    (folder / "labels.json").unlink()
    with pytest.raises(UserError, match=r"lacks its file 'labels\.json'"):
        verify_bundle(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [({"colour": ["red"]}, "labels are given for 'colour'"), ({"category": ["a"]}, "has 1 names")],
)
def test_labels_must_fit(exported: tuple[Path, dict], tmp_path: Path, labels: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_bundle(
            tmp_path / "bundle",
            model_path=exported[0],
            preprocessor=tiny_preprocessor(tmp_path),
            tasks=tasks_from_json(labels),
            name="x",
            source={},
            info={},
        )


def test_parity_reports_agreement_and_the_worst_row() -> None:
    source = {"category": np.eye(4, 3, dtype=np.float32)}
    shifted = source["category"].copy()
    shifted[2, 2] += 0.25
    result = parity(source, {"category": shifted, "other": shifted}, min_agreement=1.0, ids=[10, 11, 12, 13])
    assert result == {"category": {"agreement": 1.0, "rows": 4, "max_difference": 0.25, "row": 12}}


def test_parity_gate() -> None:
    source = {"category": np.eye(4, dtype=np.float32)}
    wrong = {"category": source["category"][[0, 1, 3, 2]]}
    assert parity(source, wrong, min_agreement=0.5)["category"]["agreement"] == 0.5
    with pytest.raises(ParityError, match=r"'category'.*50\.00% of 4 rows, 51\.00%.*at row 2"):
        parity(source, wrong, min_agreement=0.51)
    with pytest.raises(ParityError, match="absent"):
        parity(source, {}, min_agreement=0)
    with pytest.raises(ParityError, match=r"of shape \(3, 4\)"):
        parity(source, {"category": np.zeros((3, 4), dtype=np.float32)}, min_agreement=0)
    broken = source["category"].copy()
    broken[1, 0] = np.nan
    with pytest.raises(ParityError, match="not finite at row 1"):
        parity(source, {"category": broken}, min_agreement=0)
