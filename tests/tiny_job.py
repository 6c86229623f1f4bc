"""The budget of a tiny job, and how tests stop it and read what it wrote; ``make_job`` is a fixture."""

import json
import os
import signal

import torch
from safetensors.torch import load_file

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
