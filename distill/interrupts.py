"""Signals that ask a run to stop: noted, so that the run ends at a step whose state can be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


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
    """Collect the first SIGINT or SIGTERM; a second one takes its usual effect."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for number, handler in before.items():
            signal.signal(number, handler)

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
