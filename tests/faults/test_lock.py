"""Two runs on one folder: one proceeds, the other is told so; one that was killed blocks nobody."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from fork_server import ForkServer
from tiny_project import make_project

pytestmark = [pytest.mark.fault, pytest.mark.slow]

TRIALS = 20
REFUSED = "error: run folder runs/tiny is in use by another process; wait for it to end or choose another name=..."


def test_of_two_runs_on_one_folder_one_proceeds_and_a_killed_one_blocks_nobody(
    server: ForkServer, tmp_path: Path
) -> None:
    make_project(tmp_path)
    call = {"arguments": ["cache", "recipe.yaml", "teacher.train.epochs=500"]}
    for trial in range(TRIALS):
        at = time.time() + 0.2  # the holder that the trial before killed still has its files there
        pair = [server.start("distill", tmp_path / f"{trial}.{n}", cwd=tmp_path, **call, at=at) for n in range(2)]
        codes: dict[int, int | None] = {}
        while not any(code is not None for code in codes.values()):
            codes = {n: server.ask({"wait": child.pid, "timeout": 0.01}) for n, child in enumerate(pair)}
        (loser,) = [n for n, code in codes.items() if code is not None]
        assert codes[loser] == 2 and pair[loser].text().splitlines() == [REFUSED], f"trial {trial}: {codes}"
        holder = pair[1 - loser]
        holder.wait_for("teacher: ")  # the lock is held, and work goes on
        holder.send(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL and REFUSED not in holder.text()
    last = server.start("distill", tmp_path / "last", cwd=tmp_path, arguments=["cache", "recipe.yaml", "name=tiny"])
    assert last.wait() == 0, last.text()
