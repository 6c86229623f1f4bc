"""A training run that is killed at any moment goes on to the weights, and over the rows, of one that was not."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import tiny
from fork_server import Child, ForkServer

from distill.runs import sha256_file

pytestmark = [pytest.mark.fault, pytest.mark.slow]

TRIALS, INSIDE_A_SAVE = 50, 14  # of which this many die by their own hand at a known touch of the disk
STEPS, TOUCHES = 25, 11  # touches of the disk in a save


class Run:
    """A training run in a folder of its own, in as many processes as it takes."""

    def __init__(self, server: ForkServer, shared: Path, folder: Path) -> None:
        self.server, self.shared, self.folder = server, shared, folder
        folder.mkdir()

    def start(self, name: str, die: list[int] | None = None) -> Child:
        arguments = {
            "data": str(self.shared / "data"),
            "tokenizer": str(self.shared / "tokenizer.json"),
            "folder": str(self.folder),
            "log": str(self.folder.with_suffix(f".{name}.log")),
            "die": die,
        }
        return self.server.start("train", self.folder.with_suffix(".out"), **arguments)

    def log(self, name: str) -> list[str]:
        path = self.folder.with_suffix(f".{name}.log")
        return path.read_text().splitlines() if path.exists() else []

    def rows(self, name: str) -> list[str]:
        return [line for line in self.log(name) if line.startswith("rows ")]

    def weights(self) -> str:
        return sha256_file(self.folder / "model.safetensors")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    tiny.write_prepared(folder / "data")
    tiny.write_wordpiece(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def whole(server: ForkServer, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, float]:
    """The run that nobody broke, and the seconds of a step."""
    run = Run(server, shared, tmp_path_factory.mktemp("whole") / "run")
    child = run.start("first")
    while not run.rows("first"):
        time.sleep(0.001)
    began = time.monotonic()
    assert child.wait() == 0, child.text()
    assert len(run.rows("first")) == STEPS and run.log("first").count("saved") == STEPS
    return run, (time.monotonic() - began) / STEPS


def kill(run: Run, trial: int, step_seconds: float) -> Child:
    """Start a run and kill it at a moment that the trial's number decides."""
    moment = random.Random(trial)
    step = moment.randrange(1, STEPS - 2)
    if trial < INSIDE_A_SAVE:
        return run.start("first", [step, 1 + trial % TOUCHES])
    child, delay = run.start("first"), moment.random() * step_seconds
    while len(run.rows("first")) < step:
        time.sleep(0.001)
    time.sleep(delay)
    child.send(signal.SIGKILL)
    return child


def test_killed_runs_go_on_to_the_same_weights_over_the_same_rows(
    server: ForkServer, shared: Path, whole: tuple[Run, float], tmp_path: Path
) -> None:
    unbroken, step_seconds = whole
    inside = resumed = 0
    for trial in range(TRIALS):
        run = Run(server, shared, tmp_path / f"run{trial}")
        child = kill(run, trial, step_seconds)
        assert child.wait() == -signal.SIGKILL, child.text()
        inside += [line for line in run.log("first") if line.startswith("save")][-1:] == ["save"]
        again = run.start("again")
        assert again.wait() == 0, f"trial {trial}: {again.text()}"
        kept = STEPS - len(run.rows("again"))
        resumed += kept > 0
        assert run.rows("first")[:kept] + run.rows("again") == unbroken.rows("first"), f"trial {trial}"
        assert run.weights() == unbroken.weights(), f"trial {trial}"
        assert sorted(path.name for path in run.folder.iterdir()) == ["metrics.jsonl", "model.safetensors"]
    print(f"{TRIALS} kills, {inside} inside a save, {resumed} resumed from a checkpoint, 0 rows repeated or missed")
    assert inside >= 10 and resumed >= TRIALS - 5
