"""A process that has imported everything and forks a child for each call, as fault tests start hundreds of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
PATIENCE = 300.0  # seconds


@dataclass
class Child:
    """A call of a function of ``tasks.py`` in a process of its own.

    Attributes:
        server: who forked it.
        pid: its process.
        out: file that takes its standard output and error.
    """

    server: ForkServer
    pid: int
    out: Path

    def text(self) -> str:
        """What it has printed so far."""
        return self.out.read_text(encoding="utf-8")

    def send(self, signum: int) -> None:
        """Send a signal; a child that has ended keeps its pid until it is waited for."""
        os.kill(self.pid, signum)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Exit code, or minus the number of the signal that ended it; AssertionError if it is still at work."""
        code = self.server.ask({"wait": self.pid, "timeout": timeout})
        assert code is not None, f"still running after {timeout} s:\n{self.text()}"
        return int(code)

    def wait_for(self, words: str) -> None:
        """Return when it has printed a line that begins with these words; AssertionError if it ends without."""
        until = time.monotonic() + PATIENCE
        while not any(line.startswith(words) for line in self.text().splitlines()):
            assert time.monotonic() < until and self.server.ask({"wait": self.pid, "timeout": 0}) is None, self.text()
            time.sleep(0.002)


class ForkServer:
    """Forks children; closes with the test session."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "faults")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, task: str, out: Path, *, cwd: Path = TESTS, **arguments: Any) -> Child:
        """Call a function of ``tasks.py`` in a child; arguments are JSON values."""
        out.write_bytes(b"")
        pid = self.ask({"start": task, "out": str(out), "cwd": str(cwd), "arguments": arguments})
        return Child(self, int(pid), out)

    def ask(self, request: dict[str, Any]) -> Any:
        """Send one request and return the answer."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


def serve() -> None:
    """Answer requests, one JSON line each, until standard input ends."""
    import tasks

    tasks.warm_up()
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer = _fork(tasks, request) if "start" in request else _wait(ended, request["wait"], request["timeout"])
        sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


def _wait(ended: dict[int, int], pid: int, timeout: float) -> int | None:
    until = time.monotonic() + timeout
    while pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= until:
            return None
        else:
            time.sleep(0.002)
    return ended[pid]


def _fork(tasks: Any, request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(request["out"], os.O_WRONLY | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (handle, 1), (handle, 2)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        # torch makes its thread pool anew behind a fork, and two threads that do so at once break it
        tasks.torch.set_num_threads(1)
        getattr(tasks, request["start"])(**request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
