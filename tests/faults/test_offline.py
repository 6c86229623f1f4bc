"""A run whose data and weights are all local needs no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from fork_server import ForkServer
from tiny_project import make_project

from distill.pipeline import NAMES

pytestmark = [pytest.mark.fault, pytest.mark.slow]


def test_the_whole_path_runs_offline_and_tries_no_connection(server: ForkServer, tmp_path: Path) -> None:
    make_project(tmp_path)
    child = server.start("distill_offline", tmp_path / "out.txt", cwd=tmp_path, arguments=["run", "recipe.yaml"])
    assert child.wait() == 0, child.text()
    assert "NETWORK" not in child.text()
    assert all(f"{name}: done in" in child.text() for name in NAMES)


def test_weights_of_the_hub_that_are_not_here_are_refused_offline(server: ForkServer, tmp_path: Path) -> None:
    make_project(tmp_path)
    arguments = ["cache", "recipe.yaml", "teacher.encoders.text.weights=hub:nobody/not-here"]
    child = server.start("distill", tmp_path / "out.txt", cwd=tmp_path, arguments=arguments)
    assert child.wait() == 2, child.text()
    assert "pretrained weights are not there: hub:nobody/not-here: could not be downloaded" in child.text()
