"""The budget of a tiny job, and how tests stop it and read what it wrote; ``make_job`` is a fixture."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from distill.engine import fit
from distill.interrupts import InterruptedRunError

EPOCHS = 3
BUDGET = {"epochs": EPOCHS, "batch_size": 16, "lr": 0.02}


def weights(job):
    return load_file(job.folder / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def lines(job):
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


def without_times(info):
    return {name: value for name, value in info.items() if name != "seconds"}


def interrupt_at(step, signum=signal.SIGINT):
    def report(done, total, note):
        if done == step:
            os.kill(os.getpid(), signum)

    return report


def stopped_and_continued(make_job, step, **settings):
    """A job that was stopped behind a step, and one of the same folder that went on to the end, which is returned."""
    job = make_job("stopped", **settings)
    job.report = interrupt_at(step)
    with pytest.raises(InterruptedRunError):
        fit(job)
    again = make_job("stopped", **settings)
    fit(again)
    return again
