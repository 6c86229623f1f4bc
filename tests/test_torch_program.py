"""Programs of torch.export, which other exporters convert: what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_models import as_feeds
from runtime_models import LENGTH, batch_of, model_of, said
from tiny import around

from distill.contracts import INPUTS as INPUT_TYPES
from distill.contracts import Batch
from distill.export import openvino, torch_program
from distill.export.onnx import graph_outputs
from distill.export.torch_program import export_program, in_plain_layout, read_program
from distill.predict import EMBEDDING
from students import AudioConvNet

INPUTS = ["image", "image_present", "text", "text_mask", "text_present"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    return path, export_program(model_of("learnt"), batch_of("learnt", 1), path)


@pytest.mark.parametrize("kind", ["cross_attention", "gru", "learnt"])
def test_programs_say_what_the_model_says(kind: str, tmp_path: Path) -> None:
    made = export_program(model_of(kind), batch_of(kind, 3), tmp_path / "model.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    module = read_program(tmp_path / "model.pt2")[0].module()
    for count in (1, 3, 5):
        batch = batch_of(kind, count, LENGTH, seed=count)
        feeds = as_feeds(batch)
        with torch.no_grad():
            values = module(*(torch.from_numpy(feeds[name]) for name in made["inputs"]))
        found = dict(zip(made["outputs"], (value.numpy() for value in values), strict=True))
        for name, value in said(kind, batch).items():
            rows = batch.present.get(name.removeprefix(EMBEDDING), batch.ids >= 0).numpy()  # other rows mean nothing
            np.testing.assert_allclose(found[name][rows], value[rows], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_program_says_its_tensors_and_not_where_it_was_made(program: tuple[Path, dict[str, Any]]) -> None:
    path, made = program
    assert list(made["inputs"]) == INPUTS
    assert made["inputs"]["text"] == {"dtype": "int64", "shape": ["batch", LENGTH]}
    assert made["outputs"]["category"] == {"dtype": "float32", "shape": ["batch", 4]}
    assert made["bytes"] == path.stat().st_size
    _, graph = read_program(path)
    assert graph == {"inputs": made["inputs"], "outputs": made["outputs"]}
    for trace in (b"export_models.py", b"site-packages", str(Path.home()).encode() + b"/"):
        assert trace not in path.read_bytes()


def test_a_program_without_embeddings_gives_the_tasks(program: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    made = export_program(model_of("learnt"), batch_of("learnt", 1), tmp_path / "model.pt2", embeddings=False)
    assert made["outputs"] == {name: one for name, one in program[1]["outputs"].items() if EMBEDDING not in name}
    batch = batch_of("learnt", 3, LENGTH)
    feeds, expected = as_feeds(batch), said("learnt", batch)
    with torch.no_grad():
        values = read_program(tmp_path / "model.pt2")[0].module()(*(torch.from_numpy(feeds[name]) for name in INPUTS))
    for name, value in zip(made["outputs"], values, strict=True):
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-4, atol=1e-5)


def test_sounds_are_read_and_constant_tables_kept_in_the_state(tmp_path: Path) -> None:
    """A spectrogram's tables are no weights of a checkpoint; ExecuTorch refuses buffers that its state has not."""
    torch.manual_seed(0)
    model = around({"audio": AudioConvNet(sample_rate=8000, num_samples=800, widths=[4], blocks=[0])}).eval()
    inputs = {"audio": torch.randint(-3000, 3000, (2, 800), dtype=torch.int16), "audio_length": torch.full((2,), 800)}
    batch = Batch(torch.arange(2), torch.zeros(2, dtype=torch.int64), inputs, {"audio": torch.ones(2).bool()}, {})
    made = export_program(model, batch, tmp_path / "model.pt2", rows=1)
    assert made["inputs"]["audio"] == {"dtype": "int16", "shape": ["batch", 800]}
    plain = in_plain_layout(*read_program(tmp_path / "model.pt2"))
    assert plain.graph_signature.buffers and not plain.graph_signature.non_persistent_buffers
    row = [value[:1] for value in (inputs["audio"], inputs["audio_length"], batch.present["audio"])]
    with torch.no_grad():
        found, expected = plain.module()(*row), graph_outputs(model(batch))
    for name, value in zip(made["outputs"], found, strict=True):
        torch.testing.assert_close(value, expected[name][:1], rtol=1e-4, atol=1e-5)


def test_exporters_know_the_types_of_all_inputs() -> None:
    types = {told.split()[0] for told in INPUT_TYPES.values()} | {"bool"}
    assert types <= {*torch_program.DTYPES.values()} & {*openvino.DTYPES.values()}
