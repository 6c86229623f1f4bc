"""Progress: lines at most every ten seconds where nobody watches, a bar on a terminal, nothing when quiet."""

import io
import sys

import pytest

from distill import progress as module
from distill.progress import PLAIN_SECONDS, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_are_rare_and_the_last_always_shows(clock, capsys):
    with progress("fit teacher") as report:
        for step in range(1, 31):
            clock[0] = float(step)
            report(step, 30, f"loss {1 / step:.2f}")
        report(30, 30)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "fit teacher: 10/30 (1.0/s, 10 s, 20 s left) loss 0.10",
        "fit teacher: 20/30 (1.0/s, 20 s, 10 s left) loss 0.05",
        "fit teacher: 30/30 (1.0/s, 30 s) loss 0.03",
    ]


def test_short_work_is_one_line(clock, capsys):
    with progress("quantize") as report:
        report(0, 1)
        clock[0] = PLAIN_SECONDS / 2
        report(1, 1)
    assert capsys.readouterr().err == "quantize: 1/1 (0.2/s, 5 s)\n"


def test_no_time_has_passed(clock, capsys):
    with progress("evaluate") as report:
        report(2, 2)
    assert capsys.readouterr().err == "evaluate: 2/2 (0.0/s, 0 s)\n"


def test_quiet(capsys):
    with progress("evaluate", quiet=True) as report:
        report(1, 1, "note")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_counts_and_the_last_note(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    with progress("distil student") as report:
        report(1, 4, "loss 2.5")
        report(4, 4)
    shown = terminal.getvalue()
    assert "distil student" in shown and "4/4" in shown and "loss 2.5" in shown and "left" in shown


def test_an_error_ends_the_bar_and_passes(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ValueError, match="mine"), progress("prune") as report:
        report(1, 4)
        raise ValueError("mine")
    assert "1/4" in terminal.getvalue()
