"""Losses on logits and other outputs, each against its formula written out, and what it is blind to."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import losses
from distill.contracts import IGNORE

NAN = float("nan")


def logits(rows=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def softmax(row, temperature=1.0):
    powers = [math.exp(z / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def test_dkd_of_two_classes_is_the_target_part_alone():
    student, teacher, labels = logits(classes=2), logits(classes=2, seed=1), torch.tensor([0, 1, 1, 0, 1, 0])
    expected = losses.kd(student, teacher, temperature=2.0)  # which class is the target tells all
    for beta in (0.0, 8.0):
        value = losses.dkd(student, teacher, labels, alpha=1.0, beta=beta, temperature=2.0)
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("gap", [10.0, 5e3])
def test_dkd_leaves_the_target_out_however_far_ahead_it_is(gap):
    """Taking 1000 off its logit, as the published code does, leaves it the largest."""
    student, teacher = torch.tensor([[gap, 1.0, 2.0]]).double(), torch.tensor([[gap, 3.0, 1.0]]).double()
    expected = losses.kd(student[:, 1:], teacher[:, 1:], temperature=1.0)
    value = losses.dkd(student - gap, teacher - gap, torch.tensor([0]), alpha=0.0, beta=1.0, temperature=1.0)
    torch.testing.assert_close(value, expected)


def test_nkd_written_out():
    student, teacher, labels = logits(), logits(seed=1), [0, 4, IGNORE, 2, 2, 1]
    expected = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels, strict=True):
        if label == IGNORE:
            continue
        rest = [index for index in range(5) if index != label]
        soft, own = (softmax([row[index] for index in rest], 3.0) for row in (t, s))
        others = sum(p * math.log(q) for p, q in zip(soft, own, strict=True))
        expected.append(-softmax(t)[label] * math.log(softmax(s)[label]) - 1.5 * 9 * others)
    value = losses.nkd(student, teacher, torch.tensor(labels), gamma=1.5, temperature=3.0)
    assert value.item() == pytest.approx(sum(expected) / 5, rel=1e-12)


def test_nkd_of_two_classes_and_of_none_labelled():
    student, teacher, labels = logits(classes=2), logits(classes=2, seed=1), torch.tensor([0, 1, 1, 0, 1, 0])
    weights = F.softmax(teacher, dim=-1).gather(1, labels[:, None])[:, 0]
    expected = (weights * F.cross_entropy(student, labels, reduction="none")).mean()
    torch.testing.assert_close(losses.nkd(student, teacher, labels, gamma=7.0), expected)
    student.requires_grad_()
    value = losses.nkd(student, teacher, torch.full((6,), IGNORE))
    value.backward()
    assert value == 0 and student.grad.abs().max() == 0


def pearson(one, other):
    a, b = ([x - sum(values) / len(values) for x in values] for values in (one, other))
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_dist_written_out():
    student, teacher = logits(), logits(seed=1)
    one, other = ([softmax(row, 2.0) for row in x.tolist()] for x in (student, teacher))
    rows = sum(1 - pearson(s, t) for s, t in zip(one, other, strict=True)) / 6
    columns = sum(1 - pearson([r[c] for r in one], [r[c] for r in other]) for c in range(5)) / 5
    value = losses.dist(student, teacher, beta=0.5, gamma=2.0, temperature=2.0)
    assert value.item() == pytest.approx(4 * (0.5 * rows + 2 * columns), rel=1e-6)
    assert losses.dist(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-6)


def test_dist_finds_no_correlation_where_nothing_varies():
    flat = torch.full((6, 10), 0.3, dtype=torch.float64, requires_grad=True)
    value = losses.dist(flat, logits(classes=10), beta=1.0, gamma=0.0)
    value.backward()
    assert value == 1 and flat.grad.abs().max() == 0


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.1, 10), shift=st.floats(-20, 20), seed=st.integers(0, 99))
def test_standardized_logits_are_blind_to_scale_and_shift(scale, shift, seed):
    student, teacher = logits(seed=seed), logits(seed=seed + 1)
    value = losses.logit_standardized_kd(student, teacher)
    for one, other in ((scale * student + shift, teacher), (student, scale * teacher + shift)):
        torch.testing.assert_close(losses.logit_standardized_kd(one, other), value, rtol=1e-5, atol=1e-9)
    assert losses.logit_standardized_kd(scale * teacher + shift, teacher).abs() < 1e-9


def test_multilabel_kd_written_out():
    student, teacher = logits(), logits(seed=1)
    known = torch.zeros(6, 5)
    known[0, 1], known[2] = NAN, IGNORE
    expected = 0.0
    for b in (0, 1, 3, 4, 5):
        for c in range(5):
            if (b, c) != (0, 1):
                p, q = (1 / (1 + math.exp(-x[b, c].item() / 2)) for x in (teacher, student))
                expected += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    value = losses.multilabel_kd(student, teacher, known, temperature=2.0)
    assert value.item() == pytest.approx(4 * expected / 5, rel=1e-9)
    assert losses.multilabel_kd(student, teacher, torch.full((6, 5), NAN)) == 0
    whole = torch.full((6, 5), IGNORE)
    whole[0] = 1
    torch.testing.assert_close(
        losses.multilabel_kd(student, teacher, whole), losses.multilabel_kd(student[:1], teacher[:1])
    )


@settings(max_examples=30, deadline=None)
@given(temperature=st.floats(0.5, 10), seed=st.integers(0, 99))
def test_multilabel_kd_of_a_class_is_kd_of_its_two_outcomes(temperature, seed):
    student, teacher = logits(seed=seed), logits(seed=seed + 1)
    pairs = [torch.stack([x.flatten(), torch.zeros(30)], dim=1) for x in (student, teacher)]
    expected = 5 * losses.kd(*pairs, temperature=temperature)
    torch.testing.assert_close(losses.multilabel_kd(student, teacher, temperature=temperature), expected)
    assert losses.multilabel_kd(teacher, teacher, temperature=temperature).abs() < 1e-12


def test_multilabel_kd_stays_exact_where_probabilities_round_to_one():
    student, teacher = torch.tensor([[30.0]]), torch.tensor([[-30.0]])
    assert losses.multilabel_kd(student, teacher).item() == pytest.approx(30, rel=1e-6)


def test_regression_kd_written_out():
    """Row 0 is worse than the teacher, 1 better, 2 better by less than the margin; 3 has no target, 4 one of two."""
    target = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [NAN, NAN], [1.0, NAN]])
    student = torch.tensor([[2.0, 1.0], [1.0, 0.0], [1.0, 1.0], [9.0, 9.0], [3.0, 9.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0], [2.0, 0.0], [1.5, 0.0], [0.0, 0.0], [2.0, 0.0]])
    value = losses.regression_kd(student, teacher, target, margin=0.5)
    assert value.item() == pytest.approx((5 + 0 + 2 + 4) / 4)
    value.backward()
    expected = torch.tensor([[4.0, 2.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [4.0, 0.0]]) / 4
    torch.testing.assert_close(student.grad, expected)
    assert losses.regression_kd(student, teacher, torch.full_like(target, NAN)) == 0


def test_regression_kd_of_single_numbers_and_its_limits():
    student, teacher, target = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]), torch.zeros(2)
    assert losses.regression_kd(student, teacher, target).item() == pytest.approx(9 / 2)
    everything = losses.regression_kd(student, teacher, target, margin=100.0)
    torch.testing.assert_close(everything, F.mse_loss(student, target))
    assert losses.regression_kd(teacher, teacher, target) == 0  # as good as the teacher is good enough


def test_ctkd_at_a_fixed_temperature_is_kd():
    student, teacher = logits(), logits(seed=1)
    for temperature in (torch.tensor(3.0), torch.tensor([3.0]), torch.full((6,), 3.0), torch.full((6, 1), 3.0)):
        value = losses.ctkd(student, teacher, temperature.double())
        torch.testing.assert_close(value, losses.kd(student, teacher, temperature=3.0))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_ctkd_s_temperature_climbs_and_its_student_descends(strength):
    student, teacher = logits().requires_grad_(), logits(seed=1)
    temperature = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64, requires_grad=True)
    losses.ctkd(student, teacher, temperature, strength=strength).backward()
    step = 1e-6
    for row in range(6):
        t = temperature[row].item()
        ends = [losses.kd(student[row : row + 1], teacher[row : row + 1], temperature=t + d) for d in (step, -step)]
        slope = (ends[0] - ends[1]).item() / (2 * step) / 6
        assert temperature.grad[row].item() == pytest.approx(-strength * slope, rel=1e-5, abs=1e-9)
    again = logits().requires_grad_()
    losses.ctkd(again, teacher, temperature.detach()).backward()
    torch.testing.assert_close(student.grad, again.grad)


def test_a_reversed_gradient():
    start = torch.tensor([1.0, -2.0], requires_grad=True)
    value = losses.reverse_gradient(start, 0.5)
    assert torch.equal(value, start)
    (value**2).sum().backward()
    assert start.grad.tolist() == [-1.0, 2.0]
