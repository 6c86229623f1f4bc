"""The fork server, and a finished run of the tiny project that tests copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer
from tiny_project import make_project


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Forks children that have everything imported."""
    started = ForkServer()
    yield started
    started.close()


@pytest.fixture(scope="session")
def finished(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run was never broken."""
    folder = tmp_path_factory.mktemp("finished")
    make_project(folder)
    child = server.start("distill", folder / "out.txt", cwd=folder, arguments=["run", "recipe.yaml"])
    assert child.wait() == 0, child.text()
    return folder
