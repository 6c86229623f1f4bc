"""The model card's example is short, needs neither torch nor multidistill, and says what ``distill.predict`` says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tokenizers
from export_models import WORDS, tiny_preprocessor, write_tiny_graph
from onnx.shape_inference import infer_shapes
from onnx.utils import Extractor
from PIL import Image

from distill.export.bundle import write_bundle
from distill.formats.image import ImageFormat
from distill.predict import load
from distill.preprocess import Preprocessor, Tokenizer
from distill.targets import tasks_from_json

ROOT = Path(__file__).resolve().parent.parent
SIZE = 13  # odd: margins are, too
LABELS = {"category": ["café", "bird", "chair"]}
INPUTS = {"image": ["image", "image_present"], "text": ["text", "text_mask", "text_present"]}
KINDS = {"image and text": ("image", "text"), "image": ("image",), "cropped image": ("image",), "text": ("text",)}
ROW = {"image": "photo.png", "text": "a few words"}
WITHOUT = "import sys\nsys.modules |= dict.fromkeys(('torch', 'distill', 'onnx', 'transformers'))\n"
LARGE = ((900, 601), (53, 52), (7, 400))
SMALL = ((1, 1), (1, 90), (200, 3), (13, 13), (26, 15), (26, 25), (27, 38), (104, 12))


@pytest.fixture(scope="module", params=KINDS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of each kind, its tokenizer's file padding and cutting otherwise than the recipe."""
    folder = tmp_path_factory.mktemp("card")
    modalities = KINDS[request.param]
    graph = write_tiny_graph(folder / "graph.onnx", size=SIZE)
    if len(modalities) == 1:
        keep_one(graph, modalities[0])
    write_bundle(
        folder / "bundle",
        model_path=graph,
        preprocessor=Preprocessor(
            {"image": ImageFormat(SIZE, crop="cropped" in request.param)} if "image" in modalities else {},
            other_tokenizer(folder) if "text" in modalities else None,
        ),
        tasks=tasks_from_json(LABELS),
        name=request.param,
        source={},
        info={},
    )
    return folder / "bundle"


def keep_one(path: Path, modality: str) -> None:
    """Cut the graph to one modality's inputs."""
    whole = infer_shapes(onnx.load(path))
    part = Extractor(whole).extract_model(INPUTS[modality], [f"used_{modality}"])
    part.graph.node.add(op_type="Identity", input=[f"used_{modality}"], output=["category"])
    part.graph.output[0].CopyFrom(whole.graph.output[0])
    onnx.save(part, path)


def other_tokenizer(folder: Path) -> Tokenizer:
    made = tiny_preprocessor(folder).tokenizer
    assert made is not None
    tokenizer = tokenizers.Tokenizer.from_file(str(made.path))
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(made.path))
    return Tokenizer(made.path, max_length=6)


def examples(bundle: Path) -> list[str]:
    """The example that stands alone, and the one with this package."""
    return re.findall(r"```python\n(.*?)```", (bundle / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def row_of(bundle: Path, **values: object) -> dict[str, object]:
    preprocessor = load(bundle).preprocessor
    reads = {"image": "image" in preprocessor.formats, "text": preprocessor.tokenizer is not None}
    return {name: value for name, value in (ROW | values).items() if reads[name]}


def run_python(code: str, folder: Path) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same(printed: str, row: dict[str, object], bundle: Path) -> None:
    """The printed class is that of ``distill.predict``, and its probability to float32's last digits."""
    expected = load(bundle).predict([row])[0]["category"]
    task, label, probability = printed.split()
    assert (task, label) == ("category", expected["label"])
    assert float(probability) == pytest.approx(expected["probability"], rel=1e-6)


def test_it_has_at_most_15_lines_one_statement_each(bundle: Path) -> None:
    alone, _ = examples(bundle)
    assert len(alone.splitlines()) <= 15
    assert max(len(line) for line in alone.splitlines()) <= 120
    assert ";" not in alone


def test_it_runs_where_torch_and_multidistill_cannot_be_imported(bundle: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 37, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(bundle / "photo.png")
    alone, with_package = examples(bundle)
    row = row_of(bundle)
    row |= {"image": str(bundle / "photo.png")} if "image" in row else {}
    assert_same(run_python(WITHOUT + alone, bundle), row, bundle)
    assert run_python(with_package, bundle).strip() == str(load(bundle).predict([row]))


def drawings(folder: Path):
    """Files of odd sizes, modes, formats and orientations."""
    random = np.random.default_rng(1)
    for width, height in (*SMALL, *LARGE):
        image = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8))
        yield save(folder, image, "PNG")
        for orientation in (3, 6):
            exif = Image.Exif()
            exif[0x112] = orientation
            yield save(folder, image.convert("RGB"), "JPEG", exif=exif)
    drawing = Image.fromarray(random.integers(0, 256, (29, 40, 3), dtype=np.uint8))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield save(folder, drawing.convert("RGBA").convert(mode), "PNG")
    for mode in ("L", "CMYK", "YCbCr"):
        yield save(folder, drawing.resize((400, 300)).convert(mode), "JPEG")
    for mode in ("F", "I", "CMYK", "LAB"):
        yield save(folder, drawing.convert("L" if mode in "FI" else "RGB").convert(mode), "TIFF")
    yield save(folder, drawing.convert("L"), "PNG", transparency=3)
    yield save(folder, drawing, "PNG", transparency=tuple(np.asarray(drawing)[0, 0].tolist()))
    yield save(folder, drawing.quantize(8), "PNG", transparency=bytes(range(0, 256, 32)))
    yield save(folder, drawing.quantize(8), "GIF", transparency=2, save_all=True, append_images=[drawing.quantize(4)])
    yield save(folder, drawing.convert("RGBA"), "WEBP", lossless=True)


def save(folder: Path, image: Image.Image, kind: str, **options: object) -> str:
    image.save(folder / "photo.png", kind, **options)  # Pillow goes by the content, not by the name
    return f"{kind} {image.mode} {image.size} {options}"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # an example may leave closing to the interpreter
def test_its_inputs_are_those_of_training_bit_by_bit(bundle, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for file in bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    alone, _ = examples(bundle)
    preprocessor = load(bundle).preprocessor
    texts = ("a few words", "red", "cat dog " * 9, f"{WORDS[0]}\t{WORDS[1]}, {WORDS[2]}!")
    for number, what in enumerate(drawings(tmp_path)):
        text = texts[number % len(texts)]
        space: dict[str, object] = {}
        exec(compile(alone.replace('"a few words"', repr(text)), "README.md", "exec"), space)
        row = row_of(bundle, text=text)
        expected = preprocessor([row])
        found = space["feeds"]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=f"{what}: {name}")
            assert np.asarray(found[name]).dtype == value.dtype
        assert_same(capsys.readouterr().out, row, bundle)
