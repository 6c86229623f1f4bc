"""Freed memory stays in the process, so that asking for it again clears no pages."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from distill.resources import cpu_seconds, keep_freed_memory

AGAIN = """
import resource, sys
import numpy as np
from distill.resources import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    blocks = [np.ones(3 << 20) for _ in range(3)]  # 24 MiB each
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", AGAIN, how]
    return int(subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_what_a_step_frees_is_there_for_the_next_one() -> None:
    assert 10 * faults("keep") < faults("not")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


def test_cpu_seconds_grow_with_work() -> None:
    before = cpu_seconds()
    sum(range(10**6))
    assert cpu_seconds() > before
