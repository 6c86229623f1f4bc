"""``distill profile``: the parts of a step add up, and the run stays as it was."""

import json

import pytest
from tiny_project import distill, make_project

from distill.profile import PARTS, render


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    recipe = make_project(folder)
    output = f"output={folder / 'runs'}"
    assert distill("cache", recipe, output).code == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "tiny" / "cache").rglob("*")}
    answer = distill("profile", recipe, output, "--steps", "20", "--json")
    return folder, before, answer


def test_the_parts_of_a_step_add_up(profiled):
    _, _, answer = profiled
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["steps"] == 20 and found["batch_size"] == 16 and found["checkpoint_ms"] > 0
    assert list(found["parts"]) == [*PARTS, "other"]
    assert sum(found["parts"].values()) == pytest.approx(found["step_ms"])
    assert all(found["parts"][name] > 0 for name in ("teacher", "student", "loss", "backward", "optimizer"))
    lines = render(found)
    assert lines[0].startswith("a step of 16 rows takes") and lines[-1].startswith("a checkpoint takes")
    assert len(lines) == len(found["parts"]) + 2


def test_the_run_stays_as_it_was(profiled):
    folder, before, _ = profiled
    run = folder / "runs" / "tiny"
    assert {path: path.stat().st_mtime_ns for path in (run / "cache").rglob("*")} == before
    assert not (run / "student").exists()
