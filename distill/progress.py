"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

PLAIN_SECONDS = 10.0  # between two plain lines


class Progress(Protocol):
    """What a stage calls: how much is done, of how much, and a short note."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report progress."""


def silent(done: int, total: int, note: str = "") -> None:
    """A :class:`Progress` that shows nothing."""


@contextmanager
def progress(label: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Yield a reporter for one piece of work, written to standard error.

    Args:
        label: what is being done.
        quiet: show nothing.
    """
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bar(label) as report:
            yield report
    else:
        yield _Lines(label)


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            fields: dict[str, Any] = {"note": note} if note else {}
            bar.update(task, completed=done, total=total, **fields)

        yield report


class _Lines:
    """A line when work starts, then at most one every ten seconds, and one at the end."""

    def __init__(self, label: str) -> None:
        self.label, self.started, self.shown, self.finished = label, time.monotonic(), 0.0, False

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        last = done >= total and not self.finished
        if not last and now - max(self.shown, self.started) < PLAIN_SECONDS:
            return
        self.shown, self.finished = now, self.finished or last
        elapsed = now - self.started
        rate = done / elapsed if elapsed > 0 else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
        line = f"{self.label}: {done}/{total} ({rate:.1f}/s, {elapsed:.0f} s{left}) {note}"
        print(line.rstrip(), file=sys.stderr, flush=True)
