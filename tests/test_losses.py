"""Losses: published reference values of all methods; two ways to the same number of those on logits and labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import losses
from distill.contracts import IGNORE
from distill.losses.terms import LOSSES

REFERENCE = Path(__file__).parent / "data" / "reference"
CASES = {case["name"]: case for case in json.loads((REFERENCE / "cases.json").read_text())}


@pytest.fixture(scope="module")
def arrays():
    with np.load(REFERENCE / "inputs.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def logits(rows=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_published_implementations_gave_the_same_value_and_gradient(name, arrays):
    case = CASES[name]
    inputs = [arrays[key].clone() for key in case["inputs"]]
    for key, tensor in zip(case["inputs"], inputs, strict=True):
        tensor.requires_grad_(key in case["grad_norm"])
    value = getattr(losses, case["function"])(*inputs, **case["params"])
    value.backward()
    assert value.dtype == torch.float64 and value.shape == ()
    assert value.item() == pytest.approx(case["value"], rel=1e-6)
    for key, norm in case["grad_norm"].items():
        assert inputs[case["inputs"].index(key)].grad.norm().item() == pytest.approx(norm, rel=1e-6)


def test_the_registry_s_functions_are_exported():
    plain = {name: entry.function for name, entry in LOSSES.items() if entry.part is None}
    assert plain == {name: getattr(losses, name) for name in plain}
    assert set(LOSSES) - {"review"} < set(losses.__all__)
    assert losses.__all__ == sorted(losses.__all__)


def test_kd_is_the_sum_over_classes_written_out():
    student, teacher, temperature = logits(), logits(seed=1), 3.0
    p_t, p_s = (F.softmax(x / temperature, dim=-1) for x in (teacher, student))
    expected = temperature**2 * (p_t * (p_t / p_s).log()).sum() / len(student)
    torch.testing.assert_close(losses.kd(student, teacher, temperature=temperature), expected)


@settings(max_examples=30, deadline=None)
@given(temperature=st.floats(0.5, 10), shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_kd_is_zero_for_equal_logits_and_blind_to_a_shift(temperature, shift, seed):
    student, teacher = logits(seed=seed), logits(seed=seed + 1)
    value = losses.kd(student, teacher, temperature=temperature)
    assert value > 0
    assert losses.kd(teacher, teacher, temperature=temperature).abs() < 1e-12
    torch.testing.assert_close(losses.kd(student + shift, teacher, temperature=temperature), value)


def test_kd_tends_to_centred_logit_matching_at_high_temperature():
    student, teacher = logits(), logits(seed=1)
    centred = [x - x.mean(dim=-1, keepdim=True) for x in (student, teacher)]
    expected = F.mse_loss(*centred) / 2
    torch.testing.assert_close(losses.kd(student, teacher, temperature=1e3), expected, rtol=1e-2, atol=0)


def test_dkd_with_both_weights_on_the_scale_of_kd_adds_up_to_kd():
    """KD = target part + (1 - teacher's target probability) * non-target part, row by row."""
    student, teacher, labels = logits(1), logits(1, seed=1), torch.tensor([2])
    rest = 1 - F.softmax(teacher / 2, dim=-1)[0, 2].item()
    split = losses.dkd(student, teacher, labels, alpha=1.0, beta=rest, temperature=2.0)
    torch.testing.assert_close(split, losses.kd(student, teacher, temperature=2.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["cross_entropy", "dkd"])
def test_rows_without_a_label_take_no_part(name):
    student, teacher = logits(), logits(seed=1)
    labels = torch.tensor([0, IGNORE, 2, 3, IGNORE, 4])
    kept = labels != IGNORE
    some = [student, labels] if name == "cross_entropy" else [student, teacher, labels]
    loss = getattr(losses, name)
    torch.testing.assert_close(loss(*some), loss(*(tensor[kept] for tensor in some)))
    none = [*some[:-1], torch.full_like(labels, IGNORE)]
    none[0] = none[0].clone().requires_grad_()
    value = loss(*none)
    value.backward()
    assert value.item() == 0 and none[0].grad.abs().max() == 0


def test_cross_entropy_smooths_toward_the_uniform_distribution():
    student, labels = logits(), torch.tensor([0, 1, 2, 3, 4, 0])
    log_p = F.log_softmax(student, dim=-1)
    expected = -(0.9 * log_p.gather(1, labels[:, None]).mean() + 0.1 * log_p.mean(dim=1).mean())
    torch.testing.assert_close(losses.cross_entropy(student, labels, label_smoothing=0.1), expected)


def test_logit_adjustment_is_the_paper_s_and_leaves_the_prior_to_the_counts():
    """Menon et al. 2021, eq. 10: pairs of classes differ by tau times the log ratio of their priors."""
    student, labels, counts = logits(), torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([60, 25, 10, 4, 1])
    prior = counts.double() / 100
    chosen = student.gather(1, labels[:, None])
    margins = student - chosen + 0.7 * (prior / prior[labels][:, None]).log()
    expected = margins.exp().sum(dim=1).log().mean()
    torch.testing.assert_close(losses.logit_adjusted(student, labels, counts, tau=0.7), expected)
    smooth = losses.logit_adjusted(student, labels, counts, tau=0.0, label_smoothing=0.1)
    torch.testing.assert_close(smooth, losses.cross_entropy(student, labels, label_smoothing=0.1))
    blind = torch.zeros(100, 5, dtype=torch.float64, requires_grad=True)  # features that say nothing
    all_labels = torch.repeat_interleave(torch.arange(5), counts)
    losses.logit_adjusted(blind, all_labels, counts).backward()
    assert blind.grad.sum(dim=0).abs().max() < 1e-12  # are at their optimum as they are: the counts explain all


def test_classes_without_rows_count_as_one():
    student, labels = logits(), torch.tensor([0, 1, 2, 3, 4, 0])
    none, one = (torch.tensor([60, 25, 10, 4, count]) for count in (0, 1))
    assert losses.logit_adjusted(student, labels, none) == losses.logit_adjusted(student, labels, one)
