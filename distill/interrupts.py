"""Signals that ask a run to stop: noted, so that the run ends at a step whose state can be saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ECHO_SECONDS = 2.0  # within which a signal comes twice that a job system sends to a launcher and to its workers


class InterruptedRunError(RuntimeError):
    """A signal asked the run to stop; its state was saved.

    Attributes:
        exit_code: 128 + the signal's number.
    """

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; state saved in {folder}, run again to go on")
        self.exit_code = 128 + signum


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM; another one, later than its echo, takes its usual effect."""
    received: list[int] = []
    before: dict[int, Any] = {}
    first = 0.0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
            received.append(signum)
        elif time.monotonic() - first > ECHO_SECONDS:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.raise_signal(signum)

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, note)
    except ValueError:  # only the main thread may set handlers; elsewhere the caller handles signals
        before.clear()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
