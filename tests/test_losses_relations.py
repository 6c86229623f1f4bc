"""Losses on relations between rows, each against its formula written out, and what it is blind to."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import losses


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(*shape, seed=0):
    return F.normalize(draw(*shape, seed=seed), dim=-1)


def rotation(width, seed=0):
    return torch.linalg.qr(draw(width, width, seed=seed))[0]


def huber(difference):
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


@pytest.mark.parametrize("squared", [False, True])
def test_rkd_written_out(squared):
    student, teacher = draw(4, 3), draw(4, 5, seed=1)
    distances, angles = [], []
    for rows in (student, teacher):
        found = {
            (i, j): (rows[j] - rows[i]).norm().item() ** (1 + squared) for i, j in itertools.product(range(4), repeat=2)
        }
        mean = sum(found.values()) / 12
        distances.append({pair: value / mean for pair, value in found.items()})
        corners = {}
        for i, j, k in itertools.product(range(4), repeat=3):
            one, other = rows[j] - rows[i], rows[k] - rows[i]
            corners[i, j, k] = 0.0 if i in (j, k) else F.cosine_similarity(one, other, dim=0).item()
        angles.append(corners)
    by_distance = sum(huber(distances[0][pair] - distances[1][pair]) for pair in distances[0]) / 16
    by_angle = sum(huber(angles[0][corner] - angles[1][corner]) for corner in angles[0]) / 64
    value = losses.rkd(student, teacher, distance_weight=2.0, angle_weight=3.0, squared=squared)
    assert value.item() == pytest.approx(2 * by_distance + 3 * by_angle, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_relations_do_not_change_with_rotation_scale_and_order(scale, seed):
    student, teacher = draw(6, 4, seed=seed), draw(6, 5, seed=seed + 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    moved = scale * student @ rotation(4, seed)
    for loss in (losses.rkd, losses.sp, losses.pkt):
        value = loss(student, teacher)
        torch.testing.assert_close(loss(moved, teacher), value, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(loss(student[order], teacher[order]), value)
        assert loss(scale * teacher @ rotation(5, seed), teacher).item() == pytest.approx(0, abs=1e-9)
        assert value > 0
    torch.testing.assert_close(losses.rkd(student + 3, teacher), losses.rkd(student, teacher))
    one, other = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    torch.testing.assert_close(losses.cckd(one @ rotation(4, seed), other), losses.cckd(one, other))


def test_near_rows_far_from_zero_keep_their_distances_in_float32():
    """Squared lengths less twice the product would leave noise."""
    rows = 1e-2 * draw(6, 8)
    far, near = (losses.rkd((rows + shift).float(), draw(6, 8, seed=1).float()) for shift in (100.0, 0.0))
    torch.testing.assert_close(far, near, rtol=1e-2, atol=0)


@pytest.mark.parametrize("rounding", [0.0, 2e-16])
def test_rows_that_coincide_get_no_gradient_and_the_others_do(rounding):
    student = draw(5, 4)
    student[1] = student[0] * (1 + rounding)
    student.requires_grad_()
    losses.rkd(student, draw(5, 6, seed=1)).backward()
    assert 0 < student.grad.abs().max() < 1e3
    apart = draw(5, 4)
    apart[1] = apart[0] + 1e-4 * draw(4, seed=2)
    apart.requires_grad_()
    losses.rkd(apart, draw(5, 6, seed=1)).backward()
    assert apart.grad.abs().max() > 1e3  # what the slope is next to it


def test_sp_written_out():
    student, teacher = draw(4, 2, 3, 3), draw(4, 5, seed=1)
    grams = []
    for rows in (student.flatten(1), teacher):
        gram = [[(rows[i] @ rows[j]).item() for j in range(4)] for i in range(4)]
        grams.append([[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in gram])
    expected = sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    assert losses.sp(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_pkt_is_the_kl_of_neighbourhoods():
    student, teacher = draw(4, 3), draw(4, 5, seed=1)
    probabilities = []
    for rows in (student, teacher):
        similar = (F.cosine_similarity(rows[:, None], rows[None], dim=-1) + 1) / 2
        probabilities.append(similar / similar.sum(dim=1, keepdim=True))
    q, p = probabilities
    expected = (p * (p / q).log()).sum() / 16
    torch.testing.assert_close(losses.pkt(student, teacher), expected, rtol=1e-5, atol=0)


def test_cckd_tends_to_the_gaussian_kernel():
    student, teacher = directions(5, 4), directions(5, 6, seed=1)
    kernels = [torch.exp(-0.4 * torch.cdist(x, x) ** 2) for x in (student, teacher)]
    expected = (kernels[0] - kernels[1]).norm() / 25
    torch.testing.assert_close(losses.cckd(student, teacher, gamma=0.4, max_p=12), expected, rtol=1e-6, atol=0)
    squared = losses.cckd(student, teacher, gamma=0.4, max_p=12, squared=True)
    torch.testing.assert_close(squared, 25 * expected**2, rtol=1e-6, atol=0)
    assert losses.cckd(teacher, teacher) == 0


def test_cckd_written_out():
    student, teacher = directions(3, 4), directions(3, 6, seed=1)
    total = 0.0
    for i, j in itertools.product(range(3), repeat=2):
        one, other = (
            math.exp(-0.6) * sum(0.6**p / math.factorial(p) * (x[i] @ x[j]).item() ** p for p in range(4))
            for x in (student, teacher)
        )
        total += (one - other) ** 2
    assert losses.cckd(student, teacher, gamma=0.3, max_p=3).item() == pytest.approx(math.sqrt(total) / 9, rel=1e-12)


def test_crd_written_out():
    student, teacher = directions(3, 4), directions(3, 4, seed=1)
    banks = directions(3, 6, 4, seed=2), directions(3, 6, 4, seed=3)
    noise, eps = 5 / 40, 1e-7
    total = 0.0
    for anchors, bank, constant in ((student, banks[1], 50.0), (teacher, banks[0], 60.0)):
        for b in range(3):
            h = [math.exp((anchors[b] @ bank[b, k]).item() / 0.1) / constant for k in range(6)]
            total -= math.log(h[0] / (h[0] + noise + eps))
            total -= sum(math.log(noise / (value + noise + eps)) for value in h[1:])
    named = {"num_rows": 40, "student_constant": 50.0, "teacher_constant": torch.tensor(60.0), "temperature": 0.1}
    assert losses.crd(student, teacher, *banks, **named).item() == pytest.approx(total / 3, rel=1e-9)


def test_crd_s_constant_makes_similarities_a_distribution_over_all_rows():
    """n times the mean of h is 1, as for probabilities of n rows."""
    anchors, bank = directions(3, 4), directions(3, 6, 4, seed=1)
    constant = losses.crd_constant(anchors, bank, num_rows=40, temperature=0.1)
    h = torch.exp(torch.einsum("bd,bkd->bk", anchors, bank) / 0.1) / constant
    assert 40 * h.mean().item() == pytest.approx(1)


def test_crd_prefers_the_row_s_own_entry_and_no_similarity_is_too_large():
    teacher = directions(4, 8)
    bank = directions(4, 6, 8, seed=1)
    bank[:, 0] = teacher
    named = {"num_rows": 100, "student_constant": 200.0, "teacher_constant": 200.0}
    away = losses.crd(-teacher, teacher, bank, bank, **named)
    assert (
        losses.crd(teacher, teacher, bank, bank, **named) < losses.crd(bank[:, 1], teacher, bank, bank, **named) < away
    )
    cold = losses.crd(teacher.float(), teacher.float(), bank.float(), bank.float(), temperature=1e-3, **named)
    assert cold.isfinite()  # exp(1000) is not


def test_queue_kl_is_seed_s_cross_entropy_less_the_teacher_s_entropy():
    student, teacher, queue = directions(3, 4).requires_grad_(), directions(3, 4, seed=1), directions(7, 4, seed=2)
    total, entropy = 0.0, 0.0
    for b in range(3):
        stored = torch.cat([teacher[b : b + 1], queue])
        p, log_q = F.softmax(stored @ teacher[b] / 0.1, dim=0), F.log_softmax(stored @ student[b] / 0.2, dim=0)
        total, entropy = total - (p * log_q).sum() / 3, entropy - (p * p.log()).sum() / 3
    value = losses.queue_kl(student, teacher, queue, student_temperature=0.2, teacher_temperature=0.1)
    torch.testing.assert_close(value, total - entropy)
    slopes = [torch.autograd.grad(x, student)[0] for x in (value, total)]
    torch.testing.assert_close(*slopes)
    same = losses.queue_kl(teacher, teacher, queue, student_temperature=0.1, teacher_temperature=0.1)
    assert same.abs() < 1e-12


def test_queue_kl_does_not_change_with_the_queue_s_order_or_a_common_rotation():
    student, teacher, queue = directions(3, 4), directions(3, 4, seed=1), directions(7, 4, seed=2)
    value = losses.queue_kl(student, teacher, queue)
    turn = rotation(4, 3)
    torch.testing.assert_close(losses.queue_kl(student @ turn, teacher @ turn, queue.flip(0) @ turn), value)
