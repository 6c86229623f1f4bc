"""Mixed precision with scaled gradients, on torch's scaler for CPUs: bad steps, and runs that are continued."""

from types import SimpleNamespace

import pytest
import torch
from tiny_job import assert_same, stopped_and_continued, weights

from distill import engine
from distill.engine import fit

INITIAL = 2.0**18  # of the scale: the first three steps overflow


@pytest.fixture
def scalers(monkeypatch):
    """Every training gets a scaler; they are listed."""
    made = []

    def accelerator_for(precision):
        made.append(torch.amp.GradScaler("cpu", init_scale=INITIAL, growth_interval=4))
        return SimpleNamespace(device=torch.device("cpu"), scaler=made[-1])

    monkeypatch.setattr(engine, "accelerator_for", accelerator_for)
    return made


class Half(torch.autograd.Function):
    """What makes a gradient pass through fp16, where more than 65,504 is infinite."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().float()


def through_half(job, bad=()):
    """The job with such gradients, and a loss that is not finite in some calls."""
    inner, calls = job.objective.forward, []

    def forward(student, teacher, batch, shares=None, ranks=None):
        loss, values = inner(student, teacher, batch, shares, ranks)
        calls.append(0)
        return Half.apply(loss * torch.nan if len(calls) in bad else loss), values

    job.objective.forward = forward
    return job


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_step_is_left_out_and_the_next_one_made(make_job, scalers, policy):
    job = through_half(make_job(not_finite=policy), bad=(4, 5))
    assert fit(job)["steps"] == 15
    assert all(bool(torch.isfinite(value).all()) for value in weights(job).values())


def test_a_continued_run_has_the_scale_of_the_one_that_was_not_stopped(make_job, scalers):
    def make(name, **settings):
        return through_half(make_job(name, **settings))

    whole = make("whole", ema=0.9)
    fit(whole)
    again = stopped_and_continued(make, 8, ema=0.9)
    assert len(scalers) == 3 and scalers[0].get_scale() == scalers[2].get_scale() != INITIAL
    assert_same(weights(again), weights(whole))
