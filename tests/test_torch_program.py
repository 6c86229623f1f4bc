"""Programs of torch.export: what they say, and that reading one runs no code from it."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_models import LABELS, as_feeds, tiny_preprocessor
from runtime_models import LENGTH, batch_of, model_of, said

from distill.contracts import UserError
from distill.export.bundle import write_bundle
from distill.export.torch_program import export_program
from distill.predict import EMBEDDING, load
from distill.runtimes.torch import TorchProgram, read_program
from distill.targets import tasks_from_json

INPUTS = ["image", "image_present", "text", "text_mask", "text_present"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    return path, export_program(model_of("learnt"), batch_of("learnt", 1), path)


@pytest.mark.parametrize("kind", ["cross_attention", "gru", "learnt"])
def test_programs_say_what_the_model_says(kind: str, tmp_path: Path) -> None:
    made = export_program(model_of(kind), batch_of(kind, 3), tmp_path / "model.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    runtime = TorchProgram(tmp_path / "model.pt2", made, threads=1)
    for count, length in ((1, 2), (3, 4), (5, LENGTH)):
        batch = batch_of(kind, count, length, seed=count)
        found = runtime.run(as_feeds(batch))
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


def test_a_bundle_of_a_program(program: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    content = write_bundle(
        tmp_path / "bundle",
        model_path=program[0],
        preprocessor=tiny_preprocessor(tmp_path),
        tasks=tasks_from_json(LABELS),
        name="stand-in",
        source={},
        info={},
        runtime="torch",
        graph=program[1],
    )
    assert content["runtime"] == "torch" and "opset" not in content
    assert "It runs on torch.\n" in (tmp_path / "bundle" / "README.md").read_text()
    predictor = load(tmp_path / "bundle")
    assert [row["category"]["label"] in LABELS["category"] for row in predictor.predict([{"text": "red"}])] == [True]
    feeds = as_feeds(batch_of("learnt", 2, LENGTH + 1))
    with pytest.raises(UserError, match=rf"refused its inputs: 'text' is int64 \[2, {LENGTH + 1}\], expected"):
        predictor.run(feeds)


def changed(program: Path, target: Path, change: Callable[[str, bytes], bytes], more: dict[str, bytes]) -> Path:
    """A copy of a program's archive."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if name not in {f"{root}/{other}" for other in more}:
                new.writestr(name, change(name, old.read(name)))
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content)
    return target


def replaced(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        return content.replace(old.encode(), new.encode(), 1) if name.endswith(".json") else content

    return change


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (replaced('"use_pickle": false', '"use_pickle": true'), {}, "its use_pickle is True"),
        (replaced("torch.ops.aten.relu.default", "torch.serialization.os.system"), {}, "its target is 'torch.serial"),
        (replaced("torch.ops.aten.relu.default", "torch.ops.aten.relu.default.x"), {}, "its target is"),
        (replaced("Symbol('s", "__import__('s"), {}, "its expr_str is"),
        (replaced("builtins.tuple", "evil.Thing"), {}, "its in_spec is|its out_spec is"),
        (lambda _, content: content, {"data/sample_inputs/model.pt": b"pickle"}, "holds pickled inputs"),
        (lambda _, content: content, {"data/constants/model.pt": b"pickle"}, "holds 'data/constants/model.pt'"),
        (lambda _, content: content, {"data/constants/opaque_obj_0": b"pickle"}, "is no part of a plain program"),
    ],
)
def test_programs_that_could_run_code_are_refused(
    program: tuple[Path, dict[str, Any]], tmp_path: Path, change, more, message
) -> None:
    path = changed(program[0], tmp_path / "model.pt2", change, more)
    with pytest.raises(UserError, match=message):
        read_program(path)


def test_a_copy_without_changes_is_read(program: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = changed(program[0], tmp_path / "model.pt2", lambda _, content: content, {})
    assert json.dumps(read_program(path)[1]) == json.dumps(read_program(program[0])[1])


def test_a_damaged_program_is_refused(program: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copyfile(program[0], tmp_path / "model.pt2")
    with open(tmp_path / "model.pt2", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match=r"model\.pt2: torch \S+ cannot load it"):
        TorchProgram(tmp_path / "model.pt2", program[1])
