"""Losses on features, maps and tokens, each against its formula written out, and what it is blind to."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import losses
from distill.contracts import UserError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def length(values):
    return math.sqrt(sum(value * value for value in values))


def test_feature_losses_by_hand():
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert losses.cosine(one, other).item() == pytest.approx(1 - 24 / 25)
    assert losses.cosine(one, -5 * one).item() == pytest.approx(2)
    assert losses.cosine(0 * one, one).item() == pytest.approx(1)
    for loss in (losses.fitnet, losses.mse_logits, losses.simkd):
        assert loss(one, other).item() == pytest.approx(1)


def test_simkd_pools_the_larger_map():
    student, teacher = draw(2, 3, 8, 6), draw(2, 3, 4, 3, seed=1)
    torch.testing.assert_close(losses.simkd(student, teacher), F.mse_loss(F.avg_pool2d(student, 2), teacher))
    torch.testing.assert_close(losses.simkd(teacher, student), F.mse_loss(teacher, F.avg_pool2d(student, 2)))


def test_srrl_written_out():
    student, teacher, weight, bias = draw(2, 3, 4, 4), draw(2, 3, 2, 2, seed=1), draw(5, 3, seed=2), draw(5, seed=3)
    own, given_ = (
        [[sum(x[b, c].flatten().tolist()) / x[b, c].numel() for c in range(3)] for b in range(2)]
        for x in (student, teacher)
    )
    features = sum((own[b][c] - given_[b][c]) ** 2 for b in range(2) for c in range(3)) / 6
    answers = [
        [[sum(weight[k, c].item() * row[c] for c in range(3)) + bias[k].item() for k in range(5)] for row in rows]
        for rows in (own, given_)
    ]
    regression = sum((answers[0][b][k] - answers[1][b][k]) ** 2 for b in range(2) for k in range(5)) / 10
    value = losses.srrl(student, teacher, weight, beta=0.7)
    assert value.item() == pytest.approx(features + 0.7 * regression, rel=1e-12)
    pooled = [x.mean(dim=(2, 3)) for x in (student, teacher)]
    torch.testing.assert_close(losses.srrl(*pooled, weight, beta=0.7), value)


def test_at_reads_the_power_and_pools():
    student, teacher = draw(2, 3, 4, 4), draw(2, 5, 2, 2, seed=1)
    expected = 0.0
    for b in range(2):
        attention = []
        for x in (F.avg_pool2d(student, 2), teacher):
            mean = [sum(abs(v) ** 3 for v in x[b, :, i, j].tolist()) for i, j in itertools.product(range(2), repeat=2)]
            attention.append([value / length(mean) for value in mean])
        expected += sum((s - t) ** 2 for s, t in zip(*attention, strict=True))
    assert losses.at(student, teacher, p=3).item() == pytest.approx(expected / 8, rel=1e-12)
    with pytest.raises(UserError, match=r"power p of at least 1, got 0\.5"):
        losses.at(student, teacher, p=0.5)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_at_and_nst_are_blind_to_scale_and_order_of_channels(scale, seed):
    student, teacher = draw(2, 4, 3, 3, seed=seed), draw(2, 6, 3, 3, seed=seed + 1)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    for loss in (losses.at, losses.nst):
        value = loss(student, teacher)
        torch.testing.assert_close(loss(scale * student[:, order], teacher), value)
        torch.testing.assert_close(loss(student, scale * teacher), value)
        assert loss(teacher, teacher).abs() < 1e-12 < value
    each = torch.linspace(0.1, 3, 4, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(losses.nst(each * student, teacher), losses.nst(student, teacher))


def test_nst_written_out():
    student, teacher = draw(2, 3, 2, 2), draw(2, 4, 2, 2, seed=1)

    def kernel(one, other):
        pairs = itertools.product(one.flatten(1).tolist(), other.flatten(1).tolist())
        cosines = [sum(a * b for a, b in zip(x, y, strict=True)) / length(x) / length(y) for x, y in pairs]
        return sum(value**2 for value in cosines) / len(cosines)

    each = [kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in zip(student, teacher, strict=True)]
    assert losses.nst(student, teacher).item() == pytest.approx(sum(each) / 2, rel=1e-12)


def test_fsp_written_out():
    first, second = (draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)), (draw(2, 5, 2, 2, seed=2), draw(2, 5, 2, 2, seed=3))
    total = 0.0
    for b, m, n in itertools.product(range(2), range(3), range(5)):
        one, other = ((F.avg_pool2d(low, 2)[b, m] * high[b, n]).mean() for low, high in zip(first, second, strict=True))
        total += (one - other).item() ** 2
    value = losses.fsp(first[0], second[0], first[1], second[1])
    assert value.item() == pytest.approx(total / 2, rel=1e-12)
    assert losses.fsp(first[0], second[0], first[0], second[0]) == 0
    where = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = [x.flatten(2)[..., where].unflatten(-1, (4, 4)) for x in (first[0], first[1])]  # positions do not matter
    torch.testing.assert_close(
        losses.fsp(moved[0], moved[0], moved[1], moved[1]), losses.fsp(first[0], first[0], first[1], first[1])
    )


def test_vid_is_least_where_its_variance_is_that_of_the_error():
    student, teacher, weight = draw(4, 3, 5, 5), draw(4, 2, 5, 5, seed=1), draw(2, 3, 1, 1, seed=2)
    errors = (torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], student) - teacher).square().mean(dim=(0, 2, 3))
    scale = (errors - 1e-5).expm1().log().requires_grad_()
    value = losses.vid(student, teacher, weight, scale)
    value.backward()
    torch.testing.assert_close(value.item(), (0.5 * (1 + errors.log())).mean().item())
    assert scale.grad.abs().max() < 1e-9


def test_ofd_written_out():
    """Counted: a positive teacher, and a student above what a silent teacher aims at; the rest is free."""
    margin = torch.tensor([-1.0])
    teacher = torch.tensor([2.0, 2.0, -0.5, -0.5, -3.0, -3.0]).reshape(1, 1, 2, 3)
    student = torch.tensor([1.0, 5.0, 0.5, -0.7, 0.0, -2.0]).reshape(1, 1, 2, 3).requires_grad_()
    value = losses.ofd(student, teacher, margin)
    assert value.item() == pytest.approx(1 + 9 + 1 + 0 + 1 + 0)
    value.backward()
    assert student.grad.flatten().tolist() == [-2.0, 6.0, 2.0, 0.0, 2.0, 0.0]
    both = losses.ofd(torch.cat([student, teacher]), torch.cat([teacher, teacher]), margin.reshape(1, 1, 1, 1))
    assert both.item() == pytest.approx(12 / 2)  # averaged over rows; the teacher's own map costs nothing


def test_hcl_leaves_out_levels_that_are_not_smaller():
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    at_two, at_one = (F.mse_loss(*(F.adaptive_avg_pool2d(x, side) for x in (student, teacher))) for side in (2, 1))
    expected = (F.mse_loss(student, teacher) + at_two / 2 + at_one / 4) / 1.75
    torch.testing.assert_close(losses.hcl(student, teacher), expected)
    points = draw(2, 3, 1, 1), draw(2, 3, 1, 1, seed=1)
    torch.testing.assert_close(losses.hcl(*points), F.mse_loss(*points))
    assert losses.hcl(teacher, teacher) == 0


def test_review_fusion_written_out():
    lateral, residual = draw(1, 2, 4, 4), draw(1, 2, 2, 2, seed=1)
    weight, bias = draw(2, 4, 1, 1, seed=2), draw(2, seed=3)
    fused = losses.review_fusion(lateral, residual, weight, bias)
    for i, j in itertools.product(range(4), repeat=2):
        low, high = lateral[0, :, i, j], residual[0, :, i // 2, j // 2]
        shares = torch.sigmoid(weight[:, :, 0, 0] @ torch.cat([low, high]) + bias)
        torch.testing.assert_close(fused[0, :, i, j], shares[0] * low + shares[1] * high)


@settings(max_examples=25, deadline=None)
@given(temperature=st.floats(0.5, 8), shift=st.floats(-30, 30), seed=st.integers(0, 99))
def test_cwd_is_kd_over_positions(temperature, shift, seed):
    student, teacher = draw(2, 3, 4, 4, seed=seed), draw(2, 3, 4, 4, seed=seed + 1)
    value = losses.cwd(student, teacher, temperature=temperature)
    expected = losses.kd(*(x.reshape(6, 16) for x in (student, teacher)), temperature=temperature)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(losses.cwd(student + shift, teacher, temperature=temperature), value)
    assert losses.cwd(teacher, teacher).abs() < 1e-12


def test_mgd_generates_from_what_the_mask_leaves():
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    weights = draw(3, 3, 3, 3, seed=2), draw(3, seed=3), draw(3, 3, 3, 3, seed=4), draw(3, seed=5)
    mask = torch.tensor([1.0, 0.0] * 8).reshape(1, 1, 4, 4)
    generate = torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(3, 3, 3, padding=1)
    )
    for parameter, given_ in zip(generate.double().parameters(), weights, strict=True):
        parameter.data = given_
    expected = (generate(student * mask) - teacher).square().sum() / 2
    value = losses.mgd(student, teacher, mask, *weights)
    torch.testing.assert_close(value, expected)
    other = torch.where(mask.bool(), student, draw(2, 3, 4, 4, seed=6))
    torch.testing.assert_close(losses.mgd(other, teacher, mask, *weights), value)  # what is hidden does not matter
    identity = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    identity[range(3), range(3), 1, 1] = 1
    none = torch.zeros(3, dtype=torch.float64)
    assert losses.mgd(teacher.abs(), teacher.abs(), torch.ones(1), identity, none, identity, none) == 0


@pytest.mark.parametrize("name", ["at", "nst", "hcl", "cwd"])
def test_what_are_no_maps_is_refused(name):
    with pytest.raises(UserError, match=rf"{name} reads feature maps .* got \[2, 3\] of the student"):
        getattr(losses, name)(draw(2, 3), draw(2, 3, 4, 4))


@pytest.mark.parametrize("name", ["hcl", "cwd"])
def test_maps_of_other_shapes_are_refused(name):
    with pytest.raises(UserError, match=rf"{name} compares maps of one shape, got \[2, 3, 4, 4\] of the student and"):
        getattr(losses, name)(draw(2, 3, 4, 4), draw(2, 5, 4, 4))


MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [False] * 4])


def test_token_mse_counts_tokens_and_not_padding():
    student, teacher = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    rows = [F.mse_loss(student[b][MASK[b]], teacher[b][MASK[b]]) for b in (0, 1)]
    torch.testing.assert_close(losses.token_mse(student, teacher, MASK), sum(rows) / 2)
    torch.testing.assert_close(losses.token_mse(student, teacher), F.mse_loss(student, teacher))
    assert losses.token_mse(student, teacher, torch.zeros_like(MASK)) == 0


def attention_kl(student, teacher, mask):
    """Mean over rows of the mean over heads and tokens of the KL over tokens, by loops."""
    rows = []
    for b in range(len(student)):
        there = [index for index in range(4) if mask[b, index]]
        kls = []
        for a, query in itertools.product(range(student.shape[1]), there):
            p, q = (F.softmax(x[b, a, query, there], dim=0) for x in (teacher, student))
            kls.append((p * (p / q).log()).sum())
        rows += [sum(kls) / len(kls)] if kls else []
    return sum(rows) / len(rows)


def test_attention_transfer_written_out():
    student, teacher = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    torch.testing.assert_close(losses.attention_transfer(student, teacher, MASK), attention_kl(student, teacher, MASK))
    everything = torch.ones_like(MASK)
    value = losses.attention_transfer(student, teacher)
    torch.testing.assert_close(value, attention_kl(student, teacher, everything))
    torch.testing.assert_close(losses.attention_transfer(student.log_softmax(-1), teacher), value)
    assert losses.attention_transfer(teacher + 2, teacher).abs() < 1e-12


def test_minilm_relations_written_out():
    student, teacher = draw(3, 4, 6), draw(3, 4, 10, seed=1)

    def scores(vectors):
        parts = vectors.chunk(2, dim=-1)
        return torch.stack([part @ part.mT / math.sqrt(part.shape[-1]) for part in parts], dim=1)

    expected = attention_kl(scores(student), scores(teacher), MASK)
    torch.testing.assert_close(losses.minilm_relations(student, teacher, MASK, heads=2), expected)
    turn = torch.linalg.qr(draw(3, 3, seed=2))[0]
    turned = torch.cat([part @ turn for part in student.chunk(2, dim=-1)], dim=-1)  # within heads, as lengths stay
    torch.testing.assert_close(losses.minilm_relations(turned, teacher, MASK, heads=2), expected)
    assert losses.minilm_relations(teacher, teacher, heads=5).abs() < 1e-12
    with pytest.raises(UserError, match="heads=4 must divide both widths, 6 and 10"):
        losses.minilm_relations(student, teacher, heads=4)


@pytest.mark.parametrize("name", ["token_mse", "attention_transfer", "minilm_relations"])
def test_what_padding_holds_does_not_matter(name):
    student, teacher = (
        draw(3, 2, 4, 4, seed=s) if name == "attention_transfer" else draw(3, 4, 6, seed=s) for s in (0, 1)
    )
    named = {"heads": 3} if name == "minilm_relations" else {}
    value = getattr(losses, name)(student, teacher, MASK, **named)
    padding = ~(MASK[:, None, None, :] & MASK[:, None, :, None]) if name == "attention_transfer" else ~MASK[..., None]
    other = student.masked_fill(padding, 1e3)
    torch.testing.assert_close(getattr(losses, name)(other, teacher, MASK, **named), value)
