"""Losses on labels and numbers: their formulas, what is unknown, and what weights do."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from distill.contracts import UserError
from distill.losses import asymmetric, bce, cross_entropy, mse, smooth_l1, weighted_cross_entropy

NAN = float("nan")
COUNTS = torch.tensor([[90, 50, 100], [10, 50, 0]])


def drawn(seed, rows=8, columns=3):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(rows, columns, generator=generator) < 0.4).double()


def test_without_gaps_they_are_torch_s():
    logits, labels = drawn(0)
    assert bce(logits, labels, COUNTS) == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels).item())
    assert mse(logits, labels) == pytest.approx(F.mse_loss(logits, labels).item())
    assert smooth_l1(logits, labels, beta=0.5) == pytest.approx(F.smooth_l1_loss(logits, labels, beta=0.5).item())


def test_rare_labels_weigh_more_but_not_without_limit():
    logits, labels = torch.zeros(1, 3), torch.ones(1, 3)
    weight = torch.tensor([9.0, 1.0, 20.0])  # 90 / 10, 50 / 50, and at most 20 of 100 / 1
    expected = (weight * torch.log(torch.tensor(2.0))).mean().item()
    assert bce(logits, labels, COUNTS, positive_weight="balanced") == pytest.approx(expected)
    assert bce(logits, 1 - labels, COUNTS, positive_weight="balanced") == pytest.approx(0.6931472)


LOSSES = {"bce": lambda *given: bce(*given, COUNTS), "asymmetric": asymmetric, "mse": mse, "smooth_l1": smooth_l1}


@given(st.integers(0, 2**31), st.sampled_from(sorted(LOSSES)))
def test_what_is_unknown_takes_no_part(seed, name):
    loss, (logits, labels) = LOSSES[name], drawn(seed)
    labels[2], labels[4, 1], labels[5, :2] = NAN, NAN, NAN
    other = torch.where(labels.isnan(), logits + 7, logits)
    logits.requires_grad_()
    value = loss(logits, labels)
    assert value.item() == pytest.approx(loss(other, labels).item())
    each = [loss(logits[[row]], labels[[row]]).item() for row in range(len(labels)) if row != 2]
    assert value.item() == pytest.approx(sum(each) / len(each))  # a row counts once, however much of it is known
    value.backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[labels.isnan()] == 0).all()
    assert loss(logits, torch.full_like(labels, NAN)) == 0


def test_an_asymmetric_loss_without_asymmetry_is_bce():
    logits, labels = drawn(1)
    plain = asymmetric(logits, labels, gamma_negative=0.0, gamma_positive=0.0, margin=0.0)
    assert plain == pytest.approx(bce(logits, labels, COUNTS).item())


def test_asymmetric_by_hand():
    """p = 0.8, m = 0.1: -(0.2)^1 log 0.8 where it holds, -(0.7)^2 log(0.3) where it does not."""
    logits = torch.full((1, 2), 0.8).logit()
    value = asymmetric(logits, torch.tensor([[1.0, 0.0]]), gamma_negative=2.0, gamma_positive=1.0, margin=0.1)
    assert value == pytest.approx((0.2 * 0.2231436 + 0.49 * 1.2039728) / 2, abs=1e-6)


def test_easy_negatives_and_sure_positives_have_finite_gradients_under_roots():
    logits = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    asymmetric(logits, torch.tensor([[0.0, 1.0]]), gamma_negative=0.5, gamma_positive=0.5).backward()
    assert torch.isfinite(logits.grad).all()


def test_weights_of_classes_have_a_mean_of_one_over_the_training_rows_and_balance_them():
    counts = torch.tensor([80, 15, 5])
    labels = torch.repeat_interleave(torch.arange(3), counts)
    logits = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_class = [cross_entropy(logits[labels == c], labels[labels == c]).item() for c in range(3)]
    balanced = weighted_cross_entropy(logits, labels, counts)
    assert balanced == pytest.approx(sum(by_class) / 3)
    assert weighted_cross_entropy(logits, labels, counts, power=0.0) == pytest.approx(
        cross_entropy(logits, labels).item()
    )
    equal = torch.zeros(100, 3)
    assert weighted_cross_entropy(equal, labels, counts, power=0.5) == pytest.approx(
        cross_entropy(equal, labels).item()
    )


def test_shapes_that_only_broadcast_are_refused():
    logits, labels = drawn(2)
    for name, loss in LOSSES.items():
        with pytest.raises(UserError, match=rf"{name} .*needs one shape"):
            loss(logits, labels[:, :1])
