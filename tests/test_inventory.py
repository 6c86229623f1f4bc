"""``distill cache info`` and ``distill cache verify``: what a cache holds, and which of its files are damaged."""

import json
import shutil

import pytest
from tiny_project import distill, make_project, refusal, run_python

from distill import inventory
from distill.contracts import UserError
from distill.runs import read_json


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A run whose cache is filled, with a transfer set."""
    folder = tmp_path_factory.mktemp("filled")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        answer = distill("cache", "recipe.yaml", "transfer.texts=30")
    assert answer.code == 0 and answer.out.splitlines()[-1] == "cache: runs/tiny/cache"
    return folder / "runs/tiny"


@pytest.fixture
def broken(filled, tmp_path):
    """A copy of that run, to break."""
    return shutil.copytree(filled, tmp_path / "run")


def test_both_forms_of_the_verb_fill_the_cache(filled, monkeypatch):
    monkeypatch.chdir(filled.parents[1])
    for form in (("cache",), ("cache", "fill")):
        answer = distill(*form, "recipe.yaml", "transfer.texts=30")
        assert answer.code == 0 and answer.out == "cache: runs/tiny/cache\n"
    answer = distill("cache", "--force", "report", "recipe.yaml")  # options may come before the recipe
    assert "--force: stage 'report' is not needed for 'cache'" in refusal(answer)


def test_help_names_both_forms():
    text = " ".join(distill("cache", "--help").out.split())
    assert "RECIPE [OVERRIDES]... | COMMAND" in text
    for command in ("fill", "verify", "info"):
        assert command in text and distill("cache", command, "--help").code == 0
    assert "--dry-run" not in text and "--teacher" in distill("cache", "recipe.yaml", "--help").out


@pytest.mark.parametrize("arguments", [("cache",), ("cache", "info"), ("cache", "verify"), ("cache", "info", ".", ".")])
def test_incomplete_calls_exit_2(arguments):
    answer = distill(*arguments)
    assert answer.code == 2 and "Usage:" in answer.err


def test_info_tells_what_the_cache_holds(filled):
    found = json.loads(distill("cache", "info", filled, "--json").out)
    manifest = read_json(filled / "cache/cache.json")
    assert found["folder"] == str(filled / "cache") and found["rows"] == 72 and found["views"] == [0, 1]
    assert found["outputs"]["logits.colour"] == {"shape": [3], "dtype": "float16"}
    assert found["outputs"]["embeddings.fused"] == {"shape": [32], "dtype": "float16"}  # two members
    assert found["bytes"] == manifest["bytes"] and found["seconds"] == manifest["seconds"] > 0
    assert found["bytes_per_row"] == pytest.approx(found["bytes"] / 144)
    assert found["teacher"] == found["key"]["teacher"] == read_json(filled / "teacher/manifest.json")["fingerprint"]
    assert set(found["key"]) == {"teacher", "data", "transfer", "augmentation", "seed", "outputs"}
    assert found["transfer"]["rows"] == 30 and found["transfer"]["views"] == [-1]
    assert json.loads(distill("cache", "info", filled / "cache", "--json").out) == found


def test_info_in_words(filled):
    text = distill("cache", "info", filled).out
    for words in (str(filled / "cache"), "rows: 72", "views: 0, 1", "logits.colour: [3] float16", "depends on"):
        assert words in text
    assert f"  teacher: {read_json(filled / 'teacher/manifest.json')['fingerprint']}" in text.splitlines()
    assert "rows: 30" in text[text.index("transfer set") :]


def test_info_and_verify_import_no_torch(filled):
    for command in ("info", "verify"):
        arguments = ["cache", command, str(filled)]
        shown = "print('torch' in sys.modules, 'numpy' in sys.modules)"
        out = run_python(f"import sys; from distill.cli import main\ntry: main({arguments!r})\nfinally: {shown}")
        assert out.splitlines()[-1] == "False False"


def test_a_whole_cache_is_verified(filled):
    answer = distill("cache", "verify", filled)
    found = json.loads(distill("cache", "verify", filled / "cache", "--json").out)
    assert found["ok"] and found["damaged"] == {} and found["rows"] == 72 and found["views"] == [0, 1]
    assert found["bytes"] == sum(read_json(path)["bytes"] for path in (filled / "cache").rglob("cache.json"))
    assert answer.code == 0 and answer.err == ""
    assert answer.out == f"ok: 72 rows, views 0, 1, {found['bytes']:,} bytes in {found['files']} files\n"
    assert found["files"] == len(read_json(filled / "cache/manifest.json")["files"])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "shard-view1-00000.safetensors": (flip, "other content"),
    "transfer/shard-view-1-00000.safetensors": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "instead of"),
    "shard-view0-00000.json": (lambda path: path.unlink(), "absent"),
    "index.safetensors": (flip, "other content"),
    "transfer/index.safetensors": (lambda path: path.unlink(), "absent"),
    "cache.json": (lambda path: path.write_text("{"), "not readable"),
    "transfer/cache.json": (lambda path: path.unlink(), "absent"),
    "manifest.json": (lambda path: path.write_text("[]"), "not readable"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damaged_file_is_named(broken, name):
    damage, reason = DAMAGE[name]
    damage(broken / "cache" / name)
    flip(broken / "cache/shard-view0-00000.safetensors")  # a second one does not hide it
    answer = distill("cache", "verify", broken)
    assert answer.code == 1 and "2 of" in answer.err and answer.err.count("\n") == 1
    lines = answer.out.splitlines()
    assert len(lines) == 2 and any(name in line and reason in line for line in lines)
    answer = distill("cache", "verify", broken, "--json")
    assert answer.code == 1
    assert set(json.loads(answer.out)["damaged"]) == {name, "shard-view0-00000.safetensors"}


def test_a_cache_without_a_stage_is_checked_by_its_own_manifest(broken):
    (broken / "cache/manifest.json").unlink()
    assert inventory.verify(broken)["ok"]
    flip(broken / "cache/transfer/shard-view-1-00000.safetensors")
    assert list(inventory.verify(broken)["damaged"]) == ["transfer/shard-view-1-00000.safetensors"]
    flip(broken / "cache/index.safetensors")
    assert "index.safetensors" in inventory.verify(broken)["damaged"]


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_folder_that_is_no_cache_is_refused(filled, tmp_path, command):
    for folder in (tmp_path, tmp_path / "absent", filled / "teacher", filled / "cache/cache.json"):
        assert "holds no finished teacher cache; give the folder" in refusal(distill("cache", command, folder))


def test_info_of_a_cache_without_its_manifest_says_so(broken):
    (broken / "cache/cache.json").write_text("{}")
    with pytest.raises(UserError, match=r"cache\.json is absent or not readable; `distill cache RECIPE`"):
        inventory.describe(broken)
