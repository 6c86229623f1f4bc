"""Where a step of the student's training goes: data, teacher, student, loss, backward, optimizer, checkpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill import engine, stages
from distill.workspace import Workspace

PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer")
WARM_UP = 3  # steps
CHECKPOINT = "checkpoint"
OFTEN = 0.5 / 60  # minutes between two checkpoints while profiling


def profile_student(work: Workspace, steps: int) -> dict[str, Any]:
    """Train the student for some steps in the real engine and take the time of their parts.

    The run's folder stays as it is.

    Args:
        work: with all that the ``student`` stage reads.
        steps: how many, after three that are not counted.

    Returns:
        ``steps``, ``batch_size``, ``step_ms``, ``parts`` (name -> milliseconds a step; "data" is what a step waits for
        its batch, which is made ahead, and for a cached teacher's answers; "other" is the engine's own),
        ``checkpoint_ms`` of one checkpoint and ``checkpoint_share`` of the time that checkpoints take as often as the
        recipe wants them.
    """
    clock = _Clock()
    job = stages.student_job(work, Path())
    _fit(job, clock, WARM_UP + steps, OFTEN)
    if not clock.longest_save:  # none was due
        aside = _Clock()
        _fit(job, aside, 1, 0.0)
        clock.longest_save = aside.longest_save
    clock.seconds.setdefault(CHECKPOINT, 0.0)
    step_ms = 1000 * (clock.ended - clock.began - clock.seconds[CHECKPOINT]) / steps
    parts = {name: 1000 * clock.seconds.get(name, 0.0) / steps for name in PARTS}
    checkpoint_ms = 1000 * clock.longest_save
    return {
        "steps": steps,
        "batch_size": job.config.batch_size,
        "step_ms": step_ms,
        "parts": {**parts, "other": max(0.0, step_ms - sum(parts.values()))},
        "checkpoint_ms": checkpoint_ms,
        "checkpoint_share": checkpoint_ms / (60_000 * job.config.checkpoint_minutes),
    }


def _fit(job: engine.Job, clock: _Clock, steps: int, minutes: float) -> None:
    """Train for some steps in a folder that is thrown away, with a checkpoint every so many minutes."""
    changes = {"max_steps": steps, "epochs": steps, "patience": None, "max_minutes": None}
    config = job.config.model_copy(update={**changes, "checkpoint_minutes": minutes})
    validate = {job.select: 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        changed = replace(job, folder=Path(temporary), config=config, validate=lambda model: validate)
        engine.fit(replace(changed, report=clock.report, watch=clock.watch))


def render(found: dict[str, Any]) -> list[str]:
    """The profile as lines."""
    step_ms = found["step_ms"]
    lines = [f"a step of {found['batch_size']} rows takes {step_ms:.2f} ms (mean of {found['steps']})"]
    lines += [f"  {name:<10} {value:8.2f} ms {value / step_ms:6.1%}" for name, value in found["parts"].items()]
    share = f"{found['checkpoint_share']:.1%} of the time"
    return [*lines, f"a checkpoint takes {found['checkpoint_ms']:.1f} ms, {share} at train.checkpoint_minutes"]


class _Clock:
    """Adds up seconds by part, from the last step of the warm-up on."""

    def __init__(self) -> None:
        self.began = self.ended = self.longest_save = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def watch(self, part: str) -> Iterator[None]:
        began = _now()
        yield
        taken = _now() - began
        self.seconds[part] = self.seconds.get(part, 0.0) + taken
        if part == CHECKPOINT:
            self.longest_save = max(self.longest_save, taken)

    def report(self, done: int, total: int, note: str = "") -> None:
        self.ended = _now()
        if done == WARM_UP:
            self.seconds.clear()
            self.began = self.ended


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
