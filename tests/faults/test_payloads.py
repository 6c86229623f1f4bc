"""Files that carry code: none is run, nothing is written beside the project, and each is refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from fork_server import Child, ForkServer
from onnx import TensorProto, helper

from distill.runs import read_json, sha256_file, write_json

pytestmark = [pytest.mark.fault, pytest.mark.slow]

MARKER = "executed"  # what each payload would make, beside the project


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def pickled(project: Path) -> bytes:
    return pickle.dumps(Payload(project.parent / MARKER))


def yaml_tag(project: Path) -> str:
    return f"!!python/object/apply:os.system ['touch {project.parent / MARKER}']"


def evil_module(project: Path) -> str:
    return f"import os\nos.system('touch {project.parent / MARKER}')\nclass EvilModel: pass\nclass EvilConfig: pass\n"


def redo(project: Path, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(project / "runs/tiny" / stage)


def forge(file: Path) -> None:
    """Make the stage's manifest vouch for a file."""
    folder = next(parent for parent in file.parents if (parent / "manifest.json").exists())
    manifest = read_json(folder / "manifest.json")
    entry = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    manifest["files"][str(file.relative_to(folder))] = entry
    write_json(folder / "manifest.json", manifest)


def torch_file_for_weights(project: Path) -> list[str]:
    (project / "bert/model.safetensors").unlink()
    (project / "bert/pytorch_model.bin").write_bytes(pickled(project))
    return ["cache", "recipe.yaml"]


def pickle_named_safetensors(project: Path) -> list[str]:
    (project / "bert/model.safetensors").write_bytes(pickled(project))
    return ["cache", "recipe.yaml"]


def pickle_named_tokenizer(project: Path) -> list[str]:
    (project / "bert/tokenizer.json").write_bytes(pickled(project))
    return ["cache", "recipe.yaml"]


def auto_map(project: Path, **change: str) -> list[str]:
    config = read_json(project / "bert/config.json") | change
    config["auto_map"] = {"AutoModel": "evil.EvilModel", "AutoConfig": "evil.EvilConfig"}
    write_json(project / "bert/config.json", config)
    (project / "bert/evil.py").write_text(evil_module(project))
    return ["cache", "recipe.yaml"]


def auto_map_of_an_unknown_architecture(project: Path) -> list[str]:
    return auto_map(project, model_type="evil")


def pickle_in_array(project: Path, name: str) -> None:
    file = project / "runs/tiny" / name
    np.save(file, np.array([Payload(project.parent / MARKER)], dtype=object), allow_pickle=True)
    forge(file)


def pickle_in_token_ids(project: Path) -> list[str]:
    pickle_in_array(project, "vocabulary/token_ids.npy")
    redo(project, "inherit")
    return ["train", "recipe.yaml"]


def pickle_in_images(project: Path) -> list[str]:
    pickle_in_array(project, "data/image.npy")
    redo(project, "teacher")
    return ["cache", "recipe.yaml"]


def pickle_in_finished_weights(project: Path) -> list[str]:
    file = project / "runs/tiny/teacher/model.safetensors"
    file.write_bytes(pickled(project))
    forge(file)
    redo(project, "cache")
    return ["cache", "recipe.yaml"]


def pickled_optimizer_in_a_checkpoint(project: Path) -> list[str]:
    from distill import checkpoint

    folder = project / "runs/tiny/student"
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").unlink()
    checkpoint.save(folder / "checkpoint", {"trainee": {}, "optimizer": {}}, {"state": {}})
    file = folder / "checkpoint/optimizer.safetensors"
    file.write_bytes(pickled(project))
    manifest = read_json(folder / "checkpoint/checkpoint.json")
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    manifest["sha256"] = checkpoint._digest(manifest["files"])
    write_json(folder / "checkpoint/checkpoint.json", manifest)
    return ["train", "recipe.yaml"]


def yaml_tag_in_a_recipe(project: Path) -> list[str]:
    recipe = project / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: tiny", f"name: {yaml_tag(project)}"))
    return ["run", "recipe.yaml"]


def yaml_tag_in_a_part(project: Path) -> list[str]:
    (project / "part.yaml").write_text(f"encoders: {yaml_tag(project)}\n")
    return ["run", "recipe.yaml", "--teacher", "part.yaml"]


def yaml_tag_in_an_override(project: Path) -> list[str]:
    return ["run", "recipe.yaml", f"seed={yaml_tag(project)}"]


def bundle_that_names_a_file_outside(project: Path) -> list[str]:
    bundle = project / "runs/tiny/export/onnx-fp32"
    content = read_json(bundle / "bundle.json")
    outside = bundle.parent / "student.onnx"
    content["files"]["../student.onnx"] = {"bytes": outside.stat().st_size, "sha256": sha256_file(outside)}
    write_json(bundle / "bundle.json", content)
    return ["predict", str(bundle), "--text", "a red cat"]


def graph_with_data_outside_its_folder(project: Path) -> list[str]:
    bundle = project / "runs/tiny/export/onnx-fp32"
    (project.parent / "secret").write_bytes(np.ones(4, np.float32).tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": os.path.relpath(project.parent / "secret", bundle), "length": "16"}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    output = helper.make_tensor_value_info("colour", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["colour"])], "g", [], [output], [tensor])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), bundle / "model.onnx"
    )
    content = read_json(bundle / "bundle.json")
    content["files"]["model.onnx"] = {"bytes": 1, "sha256": sha256_file(bundle / "model.onnx")}
    write_json(bundle / "bundle.json", content)
    return ["predict", str(bundle), "--text", "a red cat"]


ATTACKS: dict[Callable[[Path], list[str]], str] = {
    torch_file_for_weights: "weights cannot be loaded: Error no file named model.safetensors",
    pickle_named_safetensors: "weights cannot be loaded",
    pickle_named_tokenizer: "tokenizer.json is not a tokenizer.json",
    auto_map: "config.json names code of its own (auto_map), which is never run",
    auto_map_of_an_unknown_architecture: "config.json names code of its own (auto_map), which is never run",
    pickle_in_token_ids: "token_ids.npy is not an array of plain numbers",
    pickle_in_images: "image.npy is not an array of plain numbers",
    pickle_in_finished_weights: "model.safetensors: not readable as safetensors",
    pickled_optimizer_in_a_checkpoint: "optimizer.safetensors: not readable as safetensors",
    yaml_tag_in_a_recipe: "recipe.yaml: not readable as YAML: could not determine a constructor for the tag",
    yaml_tag_in_a_part: "part.yaml: not readable as YAML: could not determine a constructor for the tag",
    yaml_tag_in_an_override: "cannot be applied to",
    bundle_that_names_a_file_outside: "lacks its file '../student.onnx'",
    graph_with_data_outside_its_folder: "has weights outside itself",
}


def attack(server: ForkServer, finished: Path, folder: Path, prepare: Callable[[Path], list[str]]) -> Child:
    """Run a prepared command in a copy of the finished project; nothing may appear beside that."""
    project = folder / "here/project"
    shutil.copytree(finished, project)
    arguments = prepare(project)
    beside = {path: path.read_bytes() for path in (folder / "here").iterdir() if path.is_file()}
    child = server.start("distill", folder / "out.txt", cwd=project, arguments=arguments)
    child.wait()
    assert {path: path.read_bytes() for path in (folder / "here").iterdir() if path.is_file()} == beside
    assert sorted(path.name for path in folder.iterdir()) == ["here", "out.txt"]
    assert MARKER not in {path.name for path in folder.rglob("*")}
    return child


def test_the_payload_works_where_it_is_loaded(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path / "project"))
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("prepare", ATTACKS, ids=lambda prepare: prepare.__name__)
def test_a_file_that_carries_code_is_refused_in_one_sentence(
    server: ForkServer, finished: Path, tmp_path: Path, prepare: Callable[[Path], list[str]]
) -> None:
    child = attack(server, finished, tmp_path, prepare)
    errors = [line for line in child.text().splitlines() if line.startswith("error: ")]
    assert child.wait() == 2 and len(errors) == 1 and "Traceback" not in child.text(), child.text()
    assert ATTACKS[prepare] in errors[0]


def test_code_that_a_tokenizers_config_names_is_never_read(server: ForkServer, finished: Path, tmp_path: Path) -> None:
    def prepare(project: Path) -> list[str]:
        own = {"auto_map": {"AutoTokenizer": ["evil.EvilConfig", None]}, "tokenizer_class": "EvilTokenizer"}
        (project / "bert/tokenizer_config.json").write_text(json.dumps(own))
        (project / "bert/evil.py").write_text(evil_module(project))
        redo(project, "vocabulary", "towers", "teacher", "cache")
        return ["cache", "recipe.yaml"]

    child = attack(server, finished, tmp_path, prepare)
    assert child.wait() == 0 and "cache: done" in child.text(), child.text()


def test_nothing_in_the_product_unpacks_archives() -> None:
    root = Path(__file__).parents[2]
    sources = [path for name in ("distill", "teachers", "students") for path in (root / name).rglob("*.py")]
    assert len(sources) > 40
    for path in sources:
        text = path.read_text(encoding="utf-8")
        words = ["zipfile", "unpack_archive", "extractall", "extractfile", ".extract("]
        words += ["tarfile"] if path.name != "tar_index.py" else []  # it reads the headers of data shards, no more
        assert not any(word in text for word in words), path
