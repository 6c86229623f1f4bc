"""Exporters run in processes of their own.

Lowering takes up to minutes and much memory, and the packages set thread counts, attention and logging for the whole
process. An exporter is a module with a ``convert`` and, for ``python -m distill.export.NAME SOURCE OUT ARGUMENTS``, a
last line that gives it to :func:`answer`; the arguments are a JSON object of its keywords.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from distill.contracts import UserError
from distill.progress import Progress, silent
from distill.runtimes.base import one_line

Feeds = Mapping[str, NDArray[Any]]
SECONDS = 1.0
"""Between two reports of progress."""


class ExportError(RuntimeError):
    """An exporter cannot convert a model."""


def run_exporter(
    name: str, source: Path, out: Path, arguments: Mapping[str, Any], *, report: Progress = silent
) -> dict[str, Any]:
    """Convert a model in a fresh process.

    Args:
        name: the module below ``distill.export``.
        source: the file to convert.
        out: the file to write.
        arguments: the exporter's keywords, JSON values.
        report: told every second how long it has taken.

    Returns:
        What the exporter's ``convert`` returns.

    Raises:
        UserError: the exporter's, such as a missing package.
        ExportError: it failed; with the last thing that it said.
    """
    command = [sys.executable, "-m", f"distill.export.{name}", str(source), str(out), json.dumps(arguments)]
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": log}
        with subprocess.Popen(command, env=_environment(), **options) as process:
            try:
                said = None
                while said is None:
                    try:
                        said, _ = process.communicate(timeout=SECONDS)
                    except subprocess.TimeoutExpired:
                        report(0, 1, f"{name}, {time.monotonic() - started:.0f} s")
            finally:
                process.kill()  # an interrupt ends it too
        log.seek(0)
        noise = log.read().decode(errors="replace").strip().splitlines()
    if not said:
        how = f"signal {signal.Signals(-process.returncode).name}" if process.returncode < 0 else "an error"
        raise ExportError(f"the exporter {name} was ended by {how}: {noise[-1] if noise else 'it said nothing'}")
    content = json.loads(said)
    if "wrong" in content:
        raise UserError(content["wrong"])
    if "failed" in content:
        raise ExportError(f"{name} cannot convert the model: {content['failed']}")
    report(1, 1, name)
    return dict(content["made"])


def answer(convert: Callable[..., dict[str, Any]]) -> None:
    """Run an exporter with the command line's arguments; standard output is its answer alone, one JSON object."""
    source, out, arguments = sys.argv[1:]
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as stdout:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever the packages print
        said: dict[str, Any]
        try:
            said = {"made": convert(Path(source), Path(out), **json.loads(arguments))}
        except UserError as error:
            said = {"wrong": str(error)}
        except Exception as error:  # the packages' exceptions share no base class; the trace goes to the log
            traceback.print_exc()
            said = {"failed": f"{type(error).__name__}: {one_line(error)}"[:1000]}
        json.dump(said, stdout)


def write_feeds(path: Path, feeds: Iterable[Feeds]) -> Path:
    """Write batches of a graph's inputs for an exporter to calibrate with."""
    named = {f"{number}.{name}": array for number, batch in enumerate(feeds) for name, array in batch.items()}
    if not named:
        raise UserError("quantization got no calibration rows; give it some of the training split")
    save_file({name: np.ascontiguousarray(array) for name, array in named.items()}, path)
    return path


def read_feeds(path: str | Path) -> list[dict[str, NDArray[Any]]]:
    """Read what :func:`write_feeds` wrote."""
    batches: dict[int, dict[str, NDArray[Any]]] = {}
    for key, array in load_file(path).items():
        number, _, name = key.partition(".")
        batches.setdefault(int(number), {})[name] = array
    return [batches[number] for number in sorted(batches)]


def _environment() -> dict[str, str]:
    """This process's, in which the child finds this package."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
