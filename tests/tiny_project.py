"""A real project in miniature (random BERT, 32-pixel drawings, a table, a recipe), and calls of the command line."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tiny
from PIL import Image

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}
SHAPES = ("sun", "moon", "cat")  # a square, a bar and a frame, named in words that the tiny vocabulary has

RECIPE = """\
version: 1
name: tiny
data:
  source: {type: table, path: rows.csv}
  modalities: {image: image, text: caption}
  targets: {colour: colour, shape: shape}
  group: family
  id: id
  working_size: 32
  augment: {image: {flip: 0.5, shift: 2}, text: {word_dropout: 0.1}}
teacher:
  encoders:
    image: {type: convnet, widths: [8, 16], blocks: [0, 1]}
    text: {type: pretrained_text, weights: "path:bert", max_length: 12}
  fusion: {type: cross_attention, dim: 16, heads: 2, depth: 1}
  embedding_dim: 16
  modality_dropout: 0.1
  members: 2
  train: {epochs: 3, batch_size: 16, lr: 0.003, ema: 0.9}
  objective:
    - {loss: cross_entropy, task: colour}
    - {loss: cross_entropy, task: shape}
    - {loss: cross_entropy, task: shape.image, weight: 0.5}
    - {loss: clip_infonce, embedding: "image,text", weight: 0.1}
student:
  encoders:
    image: {type: convnet, widths: [8, 8], blocks: [0, 1]}
    text: {type: static_embeddings, vocab_size: 64, dim: 8, max_length: 12}
  fusion: {type: concat, dim: 16}
  embedding_dim: 8
  inherit: {text: {type: token_embeddings}}
  train: {epochs: 2, batch_size: 16, lr: 0.003}
  baseline:
    - {loss: cross_entropy, task: colour}
    - {loss: cross_entropy, task: shape}
  objective:
    - {loss: cross_entropy, task: colour}
    - {loss: cross_entropy, task: shape}
    - {loss: kd, task: colour, params: {temperature: 2.0}}
    - {loss: cosine, embedding: fused}
    - {loss: fitnet, taps: {student: "encoders.image.stages:mean", teacher: "encoders.image.stages:mean"}}
cache: {views: 2}
prune: {ratio: 0.25, round_to: 2, train: {epochs: 1, batch_size: 16}}
export: {min_agreement_fp32: 0.9, min_agreement_int8: 0.0, quantize: {calibration_rows: 16}}
bench: {repeats: 10}
report: {bootstrap: 100, examples: 2}
"""


@dataclass(frozen=True)
class Answer:
    """What a call of the command line gave."""

    code: int
    out: str
    err: str


def make_project(folder: Path) -> Path:
    """Write ``bert/``, ``images/``, ``rows.csv`` and ``recipe.yaml``; return the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_bert(folder / "bert")
    make_rows(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return recipe


def make_rows(folder: Path, count: int = 96) -> None:
    """Write drawings (a colour and a shape each) and their table; those beyond 96 are test rows."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(exist_ok=True)
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "caption", "colour", "shape", "family", "split"])
        for number in range(count):
            colour, shape = list(COLOURS)[number % 3], SHAPES[number // 3 % 3]
            name = f"images/{number:03d}.png"
            Image.fromarray(_drawing(COLOURS[colour], shape, random)).save(folder / name)
            caption = f"a {'big' if number % 2 else 'small'} {colour} {shape}"
            split = "test" if number >= 96 else {4: "valid", 5: "test"}.get(number // 9 % 6, "train")
            table.writerow([1000 + number, name, caption, colour, shape, number // 3, split])


def _drawing(colour: Sequence[int], shape: str, random: np.random.Generator) -> np.ndarray:
    pixels = random.integers(225, 256, size=(32, 32, 3), dtype=np.uint8)
    top, left = random.integers(2, 10, size=2)
    height, width = (8, 20) if shape == "moon" else (16, 16)
    pixels[top : top + height, left : left + width] = colour
    if shape == "cat":
        pixels[top + 4 : top + 12, left + 4 : left + 12] = 255
    return pixels


def distill(*arguments: str | Path) -> Answer:
    """Call the command line in this process."""
    from distill.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.dict(os.environ), redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Answer(code, out.getvalue(), err.getvalue())


def start_distill(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    command = [sys.executable, "-m", "distill", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_python(code: str) -> str:
    """Run Python code in a process of its own; return what it printed."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=_environment(), capture_output=True, text=True, check=True).stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def distill_process(*arguments: str | Path, cwd: Path) -> Answer:
    """Call the command line in a process of its own and wait for it."""
    process = start_distill(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return Answer(process.returncode, out, err)


def refusal(answer: Answer) -> str:
    """The sentence with which a call was refused, after checking that it is just that: exit code 2 and one line."""
    assert answer.code == 2, answer
    assert "Traceback" not in answer.err
    lines = [line for line in answer.err.splitlines() if line]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], answer.err
    return errors[0].removeprefix("error: ")


CAPTIONING = """\
    - {loss: cross_entropy, task: colour}
    - {loss: token_cross_entropy, task: words}
"""


def make_captioning(folder: Path) -> Path:
    """The tiny project, whose captions are written from the images alone; return the recipe."""
    recipe = make_project(folder)
    text = recipe.read_text()
    head, _, rest = text.partition("teacher:\n")
    head = (
        head.replace("modalities: {image: image, text: caption}", "modalities: {image: image}")
        .replace(
            "targets: {colour: colour, shape: shape}",
            "targets: {colour: colour, words: {column: caption, kind: captioning, vocab_size: 100, max_length: 7}}",
        )
        .replace(", text: {word_dropout: 0.1}", "")
    )
    tail = rest[rest.index("prune: {ratio") :]
    body = f"""\
teacher:
  encoders: {{image: {{type: convnet, widths: [8, 16], blocks: [0, 1]}}}}
  fusion: {{type: concat, dim: 16}}
  embedding_dim: 16
  train: {{epochs: 12, batch_size: 16, lr: 0.01}}
  objective:
{CAPTIONING}student:
  encoders: {{image: {{type: convnet, widths: [8, 8], blocks: [0, 1]}}}}
  fusion: {{type: concat, dim: 16}}
  heads: {{colour: {{type: linear}}, words: {{type: decoder, depth: 1, heads: 2}}}}
  embedding_dim: 8
  train: {{epochs: 12, batch_size: 16, lr: 0.01}}
  baseline:
{CAPTIONING}  objective:
{CAPTIONING}    - {{loss: kd, task: colour}}
    - {{loss: token_kd, task: words, params: {{temperature: 2.0}}}}
cache: {{views: 2}}
"""
    recipe.write_text(head + body + tail)
    return recipe
