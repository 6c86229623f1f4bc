"""Prediction from a bundle: labels, probabilities, errors in one sentence, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from export_models import tiny_preprocessor, write_tiny_graph
from PIL import Image

from distill.contracts import UserError
from distill.export.bundle import write_bundle
from distill.predict import load, open_session, predict_rows, softmax
from distill.targets import tasks_from_json

NAMES = ["apple", "bird", "chair"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    write_bundle(
        folder / "bundle",
        model_path=write_tiny_graph(folder / "graph.onnx"),
        preprocessor=tiny_preprocessor(folder, image_size=8),
        tasks=tasks_from_json({"category": NAMES}),
        name="tiny",
        source={},
        info={},
    )
    return folder / "bundle"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (20, 10), (200, 30, 90)).save(path)
    return path


def test_labels_and_probabilities(bundle: Path, image: Path) -> None:
    predictor = load(bundle)
    rows = [{"image": image, "text": "red cat"}, {"image": image}, {"text": "blue dog green"}]
    results = predictor.predict(rows, top_k=2)
    raw = predictor.run(predictor.preprocessor(rows))
    assert list(raw) == ["category"]
    for result, logits in zip(results, raw["category"], strict=True):
        expected = np.exp(logits) / np.exp(logits).sum()
        found = result["category"]
        assert found["label"] == NAMES[int(logits.argmax())]
        assert found["probability"] == pytest.approx(expected.max(), abs=1e-6)
        assert [entry["label"] for entry in found["top"]] == [NAMES[i] for i in np.argsort(-logits)[:2]]
    json.dumps(results)


def test_results_do_not_depend_on_the_batch_size(bundle: Path) -> None:
    rows = [{"text": text} for text in ("red", "green blue cat", "dog", "cat cat", "blue")]
    predictor = load(bundle, threads=2)
    assert predictor.predict(rows, top_k=9) == predictor.predict(rows, top_k=9, batch_size=2)
    assert len(predictor.predict(rows, top_k=9)[0]["category"]["top"]) == 3
    assert predictor.predict([]) == []


def test_bad_rows_are_named(bundle: Path, image: Path) -> None:
    predictor = load(bundle)
    good = {"text": "red"}
    with pytest.raises(UserError, match="row 1 has no image or text"):
        predictor.predict([good, {"text": "  "}])
    with pytest.raises(UserError, match="row 2 has no image or text"):
        predictor.predict([good, good, {}], batch_size=2)
    with pytest.raises(UserError, match="batch that begins with row 2, row 0: no such image file"):
        predictor.predict([good, good, {"image": image.parent / "none.png"}], batch_size=2)


def test_raw_inputs_are_checked(bundle: Path) -> None:
    predictor = load(bundle)
    feeds = predictor.preprocessor([{"text": "red"}])
    with pytest.raises(UserError, match="input 'text_mask' is missing"):
        predictor.run({name: value for name, value in feeds.items() if name != "text_mask"})
    with pytest.raises(UserError, match="refused its inputs"):
        predictor.run(feeds | {"image": feeds["image"].astype(np.float32)})
    assert predictor.run(feeds | {"unused": feeds["image"]})["category"].shape == (1, 3)


def test_softmax_is_stable() -> None:
    logits = np.array([[1000.0, 0.0], [-1000.0, -1000.0]], dtype=np.float32)
    np.testing.assert_allclose(softmax(logits), [[1, 0], [0.5, 0.5]])


def test_images_and_texts(bundle: Path, image: Path) -> None:
    both = predict_rows(bundle, {"image": [image, image], "text": ["red", "blue"]})
    assert [row["text"] for row in both] == ["red", "blue"]
    assert both[0]["image"] == str(image)
    assert predict_rows(bundle, {"image": [image]})[0]["text"] is None
    alone = load(bundle).predict([{"text": "cat"}], top_k=1)[0]
    assert predict_rows(bundle, {"text": ["cat"]}, top_k=1) == [{"image": None, "text": "cat", "predictions": alone}]


def test_a_table(bundle: Path, image: Path) -> None:
    table = image.parent / "rows.csv"
    table.write_text("\ufefftext,image,note\nred cat,photo.png,x\nblue,,y\n,photo.png,z\n", encoding="utf-8")
    found = predict_rows(bundle, table=table)
    assert [(row["image"], row["text"]) for row in found] == [
        (str(image), "red cat"),
        (None, "blue"),
        (str(image), None),
    ]
    assert found[0]["predictions"] == predict_rows(bundle, {"image": [image], "text": ["red cat"]})[0]["predictions"]


def test_wrong_requests(bundle: Path, image: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("picture\na.png\n")
    with pytest.raises(UserError, match="has no column image or text"):
        predict_rows(bundle, table=table)
    table.write_text("text\n")
    with pytest.raises(UserError, match="nothing to classify"):
        predict_rows(bundle, table=table)
    with pytest.raises(UserError, match="not both"):
        predict_rows(bundle, {"image": [image]}, table=table)
    with pytest.raises(UserError, match="2 of image and 1 of text"):
        predict_rows(bundle, {"image": [image, image], "text": ["red"]})
    with pytest.raises(UserError, match="reads no audio; it reads image, text"):
        predict_rows(bundle, {"audio": [image]})
    with pytest.raises(UserError, match="not a readable CSV"):
        predict_rows(bundle, table=tmp_path / "none.csv")


def copy(bundle: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in bundle.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_not_a_bundle(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a bundle"):
        load(tmp_path / "nowhere")
    folder = copy(bundle, tmp_path / "copy")
    content = json.loads((folder / "bundle.json").read_text())
    for change, message in (
        ({"version": 99}, "version 99"),
        ({"format": "zip"}, "holds a zip"),
        ({"files": {"../x": {"sha256": "0"}}}, r"lacks its file '\.\./x'"),
        ({"files": {}}, "does not list"),
        ({"files": None}, "malformed"),
    ):
        (folder / "bundle.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            load(folder)
    (folder / "bundle.json").write_text("{")
    with pytest.raises(UserError, match="malformed"):
        load(folder)


def test_a_damaged_model(bundle: Path, tmp_path: Path) -> None:
    folder = copy(bundle, tmp_path / "copy")
    damaged = bytearray((folder / "model.onnx").read_bytes())
    damaged[100] ^= 1
    (folder / "model.onnx").write_bytes(bytes(damaged))
    with pytest.raises(UserError, match=r"model\.onnx was changed after export"):
        load(folder)
    (folder / "model.onnx").write_bytes(b"junk")
    with pytest.raises(UserError, match="is no whole ONNX file"):
        open_session(folder / "model.onnx")
    with pytest.raises(UserError, match="no model file"):
        open_session(folder / "other.onnx")


def test_no_torch_is_imported(bundle: Path, image: Path) -> None:
    code = (
        "import sys\n"
        "from distill.predict import predict_rows\n"
        f"rows = predict_rows({str(bundle)!r}, {{'image': [{str(image)!r}], 'text': ['red']}})\n"
        "print(rows[0]['predictions']['category']['label'])\n"
        "assert not {'torch', 'onnx', 'transformers', 'pandas'} & set(sys.modules)\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in NAMES
