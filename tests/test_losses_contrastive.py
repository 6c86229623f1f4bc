"""Losses on image-text pairs, each against its formula written out, and what it is blind to."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from distill import losses
from distill.contracts import UserError

ROWS = 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(width=6, seed=0):
    return tuple(F.normalize(draw(ROWS, width, seed=2 * seed + side), dim=-1) for side in (0, 1))


def test_clip_infonce_knows_its_perfect_and_its_blind_value():
    identity = torch.eye(4, dtype=torch.float64)
    perfect = losses.clip_infonce(identity, identity, logit_scale=20.0)
    assert perfect.item() == pytest.approx(math.log(1 + 3 * math.exp(-20)), rel=1e-6)
    same = identity[:1].expand(4, 4)
    assert losses.clip_infonce(same, same, logit_scale=20.0).item() == pytest.approx(math.log(4))
    apart = identity[[1, 0, 3, 2]]
    assert losses.clip_infonce(identity, apart) > losses.clip_infonce(same, same)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_siglip_written_out():
    img, txt = pair()
    total = 0.0
    for i, j in itertools.product(range(ROWS), repeat=2):
        sign = 1 if i == j else -1
        total -= math.log(sigmoid(sign * (8 * (img[i] @ txt[j]).item() - 3)))
    assert losses.siglip(img, txt, logit_scale=8.0, logit_bias=-3.0).item() == pytest.approx(total / ROWS, rel=1e-12)


def test_siglip_relational_written_out_and_with_a_certain_teacher():
    (img, txt), (their_img, their_txt) = pair(), pair(9, 1)
    total = 0.0
    for i, j in itertools.product(range(ROWS), repeat=2):
        p, q = sigmoid(6 * (their_img[i] @ their_txt[j]).item() - 1), sigmoid(8 * (img[i] @ txt[j]).item() - 3)
        total -= p * math.log(q) + (1 - p) * math.log(1 - q)
    scales = {"student_scale": 8.0, "student_bias": -3.0, "teacher_scale": 6.0, "teacher_bias": -1.0}
    value = losses.siglip_relational(img, txt, their_img, their_txt, **scales)
    assert value.item() == pytest.approx(total / ROWS, rel=1e-12)
    certain = torch.eye(ROWS, dtype=torch.float64)
    value = losses.siglip_relational(
        img, txt, certain, certain, **{**scales, "teacher_scale": 200.0, "teacher_bias": -100.0}
    )
    torch.testing.assert_close(value, losses.siglip(img, txt, logit_scale=8.0, logit_bias=-3.0))


def test_relational_kl_is_the_cross_entropy_less_the_teacher_s_entropy():
    student, teacher = [x.requires_grad_() for x in pair()], pair(9, 1)
    scales = {"student_scale": 10.0, "teacher_scale": 30.0}
    entropy = 0.0
    for logits in (30 * teacher[0] @ teacher[1].T, 30 * teacher[1] @ teacher[0].T):
        p = F.softmax(logits, dim=1)
        entropy -= (p * p.log()).sum() / ROWS / 2
    ce, kl = (
        losses.clip_relational_ce(*student, *teacher, **scales),
        losses.clip_relational_kl(*student, *teacher, **scales),
    )
    torch.testing.assert_close(ce - kl, entropy)
    for one, other in zip(torch.autograd.grad(ce, student), torch.autograd.grad(kl, student), strict=True):
        torch.testing.assert_close(one, other)
    same = losses.clip_relational_kl(*teacher, *teacher, student_scale=30.0, teacher_scale=30.0)
    assert same.abs() < 1e-12


@pytest.mark.parametrize("loss", [losses.clip_relational_ce, losses.clip_relational_kl, losses.siglip_relational])
def test_relations_between_modalities_survive_rotation_and_order(loss):
    student, teacher, order = pair(), pair(9, 1), torch.tensor([3, 0, 4, 1, 2])
    value = loss(*student, *teacher)
    turn = torch.linalg.qr(draw(6, 6, seed=9))[0]
    torch.testing.assert_close(loss(*(x @ turn for x in student), *teacher), value)
    torch.testing.assert_close(loss(*(x[order] for x in (*student, *teacher))), value)
    torch.testing.assert_close(loss(*student[::-1], *teacher[::-1]), value)


def test_clip_icl_with_the_student_as_its_teacher_is_infonce():
    student = pair()
    torch.testing.assert_close(
        losses.clip_icl(*student, *student, scale=7.0), losses.clip_infonce(*student, logit_scale=7.0)
    )


def test_clip_fd_by_hand():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert losses.clip_fd(one, one, other, one).item() == 1.0
    assert losses.clip_fd(one, one, one, one) == 0
    cosines = [(a * b).sum(dim=1).mean() for a, b in zip(pair(), pair(seed=1), strict=True)]
    torch.testing.assert_close(losses.clip_fd(*pair(), *pair(seed=1)), (4 - 2 * cosines[0] - 2 * cosines[1]) / 6)


def test_clip_gd_compares_what_autograd_finds():
    student, teacher = pair(), pair(seed=1)
    found = []
    for (img, txt), scale in ((student, 5.0), (teacher, 8.0)):
        leaves = [x.clone().requires_grad_() for x in (img, txt)]
        logits, labels = scale * leaves[0] @ leaves[1].T, torch.arange(ROWS)
        ways = F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)
        found.append([slope for way in ways for slope in torch.autograd.grad(way, leaves, retain_graph=True)])
    expected = sum(F.mse_loss(one, other) for one, other in zip(*found, strict=True))
    value = losses.clip_gd(*student, *teacher, student_scale=5.0, teacher_scale=8.0)
    torch.testing.assert_close(value, expected)
    assert losses.clip_gd(*teacher, *teacher, student_scale=8.0, teacher_scale=8.0).abs() < 1e-20


def test_clip_afd_fuses_and_contrasts():
    (img, txt), (their_img, their_txt) = pair(), pair(9, 1)
    weights = draw(4, 15, seed=5), draw(4, seed=6), draw(4, 15, seed=7), draw(4, seed=8)
    fused = []
    for own, given, weight, bias in ((img, their_img, *weights[:2]), (txt, their_txt, *weights[2:])):
        rows = [weight @ torch.cat([own[i], given[i]]) + bias for i in range(ROWS)]
        fused.append(torch.stack([row / row.norm() for row in rows]))
    value = losses.clip_afd(img, txt, their_img, their_txt, *weights, scale=9.0)
    torch.testing.assert_close(value, losses.clip_infonce(*fused, logit_scale=9.0))
    only_student = [torch.eye(6, 15, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)] * 2
    value = losses.clip_afd(img, txt, their_img, their_txt, *only_student, scale=9.0)
    torch.testing.assert_close(value, losses.clip_infonce(img, txt, logit_scale=9.0))


def test_an_ensemble_teaches_its_mean_probabilities():
    student, one, other = pair(), pair(9, 1), pair(4, 2)
    value = losses.clip_ensemble_ce(*student, *one, *other, student_scale=10.0, teacher_scales=(30.0, 50.0))
    each = [
        losses.clip_relational_ce(*student, *teacher, student_scale=10.0, teacher_scale=scale)
        for teacher, scale in ((one, 30.0), (other, 50.0))
    ]
    torch.testing.assert_close(value, sum(each) / 2)
    expected = 0.0
    for way in (1, -1):
        log_q = F.log_softmax(10 * student[::way][0] @ student[::way][1].T, dim=1)
        p = sum(F.softmax(scale * t[::way][0] @ t[::way][1].T, dim=1) for t, scale in ((one, 30.0), (other, 50.0))) / 2
        expected -= (p * log_q).sum() / ROWS / 2
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("scales", [(), (30.0,), (30.0, 50.0, 60.0)])
def test_an_ensemble_needs_a_scale_for_each_teacher(scales):
    with pytest.raises(UserError, match=f"a scale for it, got 4 tensors and {len(scales)} scales"):
        losses.clip_ensemble_ce(*pair(), *pair(9, 1), *pair(4, 2), teacher_scales=scales)
