"""Losses on outputs other than one softmax: independent classes, numbers, and a temperature that is learned."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import IGNORE, UserError
from distill.losses.bounds import AtLeastOne, AtLeastZero, PartShare, Positive, Temperature
from distill.losses.numeric import full_precision, need_one_shape

LEAST = 1e-8  # of a probability that is raised to a power: a root of 0 has no gradient


@full_precision
def bce(
    student_logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    *,
    positive_weight: Literal["one", "balanced"] = "one",
    most: AtLeastOne = 20.0,
) -> Tensor:
    """Binary cross-entropy of several labels a row: the mean over a row's known labels, then over rows.

    ``-w_k y log p - (1 - y) log(1 - p)`` with ``p = sigmoid(z)``; "balanced" weighs a label's positive rows with
    ``w_k = negatives / positives`` of the training rows, at most ``most``, so that rare labels count as much as the
    rows without them.

    Args:
        student_logits: [B, K].
        labels: [B, K], 0 or 1; NaN entries take no part, and rows of such alone do not count.
        class_counts: [2, K], the training rows without and with each label.
        positive_weight: "one" or "balanced".
        most: largest weight.

    Returns:
        A scalar; 0 (with a gradient of 0) when nothing takes part.

    Raises:
        UserError: labels and logits have not one shape.
    """
    need_one_shape("bce", student=student_logits, labels=labels)
    known = _known(labels)
    weight = None
    if positive_weight == "balanced":
        without, having = class_counts.to(student_logits).clamp(min=1)
        weight = (without / having).clamp(max=most)
    truth = torch.where(known, labels, 0.0).to(student_logits)
    each = F.binary_cross_entropy_with_logits(student_logits, truth, pos_weight=weight, reduction="none")
    return _mean_of_known(each, known)


@full_precision
def asymmetric(
    student_logits: Tensor,
    labels: Tensor,
    *,
    gamma_negative: AtLeastZero = 4.0,
    gamma_positive: AtLeastZero = 0.0,
    margin: PartShare = 0.05,
) -> Tensor:
    """Asymmetric loss of several labels a row, of which most do not hold (ASL: Ridnik et al. 2021, arXiv 2009.14119).

    ``-(1 - p)^γ+ log p`` where a label holds and ``-q^γ- log(1 - q)`` with ``q = max(p - m, 0)`` where it does not:
    easy negatives count for little, and very easy ones for nothing. Both γ and m at 0 are :func:`bce`. The authors sum
    over labels; here a row is the mean over those that are known.

    Args:
        student_logits: [B, K].
        labels: [B, K], 0 or 1; NaN entries take no part, and rows of such alone do not count.
        gamma_negative: γ-.
        gamma_positive: γ+.
        margin: m.

    Returns:
        A scalar; 0 (with a gradient of 0) when nothing takes part.

    Raises:
        UserError: labels and logits have not one shape.
    """
    need_one_shape("asymmetric", student=student_logits, labels=labels)
    known = _known(labels)
    holds = torch.where(known, labels, 0.0) == 1
    probability = student_logits.sigmoid()
    shifted, rest = (value.clamp(min=LEAST) for value in (probability - margin, 1 - probability))
    missed = -F.logsigmoid(student_logits) * rest**gamma_positive
    wrong = -torch.log1p(-shifted) if margin else -F.logsigmoid(-student_logits)
    return _mean_of_known(torch.where(holds, missed, wrong * shifted**gamma_negative), known)


@full_precision
def mse(student_values: Tensor, targets: Tensor) -> Tensor:
    """Squared error of numbers: the mean over a row's known ones, then over rows.

    Args:
        student_values: [B, K].
        targets: [B, K], standardised; NaN entries take no part, and rows of such alone do not count.

    Returns:
        A scalar; 0 (with a gradient of 0) when nothing takes part.

    Raises:
        UserError: values and targets have not one shape.
    """
    need_one_shape("mse", student=student_values, targets=targets)
    known = _known(targets)
    return _mean_of_known((student_values - torch.where(known, targets, 0.0)) ** 2, known)


@full_precision
def smooth_l1(student_values: Tensor, targets: Tensor, *, beta: Positive = 1.0) -> Tensor:
    """Error of numbers, squared where it is small: the mean over a row's known ones, then over rows.

    ``e² / 2β`` below an error of β and ``|e| - β / 2`` beyond it (Girshick 2015, arXiv 1504.08083; Huber's loss divided
    by β): outliers pull no harder than others. A small β is the absolute error.

    Args:
        student_values: [B, K].
        targets: [B, K], standardised; NaN entries take no part, and rows of such alone do not count.
        beta: β, in standard deviations of the target.

    Returns:
        A scalar; 0 (with a gradient of 0) when nothing takes part.

    Raises:
        UserError: values and targets have not one shape.
    """
    need_one_shape("smooth_l1", student=student_values, targets=targets)
    known = _known(targets)
    filled = torch.where(known, targets, 0.0).to(student_values)
    return _mean_of_known(F.smooth_l1_loss(student_values, filled, beta=beta, reduction="none"), known)


@full_precision
def multilabel_kd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, temperature: Temperature = 1.0
) -> Tensor:
    """KD for independent classes: the KL of each class's two outcomes (Yang et al. 2023, arXiv 2308.06453).

    ``T² · mean_b Σ_c [p_t log(p_t / p_s) + (1 - p_t) log((1 - p_t) / (1 - p_s))]`` with ``p = sigmoid(z / T)``: the
    paper's logits part at T = 1. Summed over classes and averaged over rows; averages over classes are C times smaller.
    Logarithms are taken of logits: clamping probabilities to ``[1e-8, 1 - 1e-8]`` leaves a 0 in float32.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        labels: [B, C] or None; where given, entries with NaN or ``IGNORE`` take no part, and rows of such alone do not
            count. The other values are not read.
        temperature: T > 0.

    Returns:
        A scalar; 0 (with a gradient of 0) when nothing takes part.

    Raises:
        UserError: what is compared has not one shape.
    """
    told = {} if labels is None else {"labels": labels}
    need_one_shape("multilabel_kd", student=student_logits, teacher=teacher_logits, **told)
    student, teacher = student_logits / temperature, teacher_logits.detach() / temperature
    on, off = F.logsigmoid(teacher), F.logsigmoid(-teacher)
    each = on.exp() * (on - F.logsigmoid(student)) + off.exp() * (off - F.logsigmoid(-student))
    known = torch.ones_like(each, dtype=torch.bool) if labels is None else _known(labels)
    rows = known.any(dim=-1).sum().clamp(min=1)
    return each.masked_fill(~known, 0.0).sum() / rows * temperature**2


@full_precision
def regression_kd(
    student_values: Tensor, teacher_values: Tensor, targets: Tensor, *, margin: AtLeastZero = 0.0
) -> Tensor:
    """Regression bounded by the teacher: no loss where the student is better than the teacher by a margin.

    ``mean_b (e_s if e_s + margin > e_t else 0)`` with the squared errors against the *targets*,
    ``e_s = ||student - target||²`` and ``e_t = ||teacher - target||²``: the teacher-bounded part of the regression loss
    of Chen et al. (NeurIPS 2017, "Learning Efficient Object Detection Models with Knowledge Distillation", without an
    arXiv number), which adds it, times 0.5, to a smooth L1 on the targets. The teacher is a bound and never a target,
    since a regression's outputs may be wrong without limit; re-implementations that regress on the teacher's values,
    or compare element by element and not by row, are other losses.

    Args:
        student_values: [B] or [B, K].
        teacher_values: the same shape; no gradient flows into it.
        targets: the same shape; NaN entries take no part, in neither error.
        margin: m, in squared units of the targets.

    Returns:
        A scalar, averaged over the rows that have a target; 0 (with a gradient of 0) when none has.

    Raises:
        UserError: the targets are classes, or the three have not one shape.
    """
    _need_numbers(student_values, teacher_values, targets)
    known = ~targets.isnan()
    filled = torch.where(known, targets, 0.0).to(student_values)
    own, bound = (
        (values - filled).masked_fill(~known, 0.0).square().reshape(len(values), -1).sum(-1)
        for values in (student_values, teacher_values.detach())
    )
    rows = known.reshape(len(known), -1).any(dim=-1).sum()
    return own.masked_fill(own + margin <= bound, 0.0).sum() / rows.clamp(min=1)


@full_precision
def ctkd(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor, *, strength: AtLeastZero = 1.0) -> Tensor:
    """KD at a learned temperature that makes the task harder (CTKD: Li et al. 2023, arXiv 2211.16231).

    ``mean_b T_b² · KL(softmax(t_b / T_b) || softmax(s_b / T_b))``, minimised by the student and, through
    :func:`reverse_gradient`, maximised by the temperature. Its gradient comes from the teacher's distribution and from
    T² as well as from the student's; re-implementations that detach the teacher's *distribution* lose a part.
    The curriculum raises ``strength`` from 0 to 1 over the first epochs (the authors: a cosine over 10). What T is made
    of is the caller's: theirs is ``1 + 20 · sigmoid(parameter)``, one for all rows or a small network's for each.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        temperature: T > 0, one number or one a row ([B] or [B, 1]), with a gradient.
        strength: λ ≥ 0 by which the temperature's gradient is multiplied and reversed.

    Returns:
        A scalar; with a constant temperature that of :func:`kd`.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("ctkd", student=student_logits, teacher=teacher_logits)
    scale = reverse_gradient(temperature, strength).reshape(-1, 1)
    student = F.log_softmax(student_logits / scale, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / scale, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return (divergence * scale.squeeze(-1) ** 2).mean()


def reverse_gradient(tensor: Tensor, strength: float = 1.0) -> Tensor:
    """Return a tensor as it is, with a gradient multiplied by ``-strength`` (Ganin & Lempitsky 2015, arXiv 1409.7495).

    Args:
        tensor: any shape.
        strength: λ; 0 stops the gradient.

    Returns:
        The same values.
    """
    reversed_: Tensor = _Reversal.apply(tensor, strength)
    return reversed_


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * -ctx.strength, None


def _need_numbers(student: Tensor, teacher: Tensor, targets: Tensor) -> None:
    """Classes are integers, and shapes that only broadcast would compare each row with all others."""
    shapes = [list(tensor.shape) for tensor in (student, teacher, targets)]
    if not targets.is_floating_point():
        raise UserError(
            f"regression_kd reads targets that are numbers, NaN where missing, got {targets.dtype} {shapes[2]}; "
            "use kd for classes, or convert them"
        )
    if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        raise UserError(
            f"regression_kd compares values of one shape, got {shapes[0]} of the student, {shapes[1]} of the teacher "
            f"and targets {shapes[2]}; give each output a target, NaN where it is missing"
        )


def _mean_of_known(each: Tensor, known: Tensor) -> Tensor:
    """Of [B, K] the mean over each row's known entries, and of these over the rows that have any."""
    counts = known.sum(dim=-1)
    rows = each.masked_fill(~known, 0.0).sum(dim=-1) / counts.clamp(min=1)
    return rows.sum() / (counts > 0).sum().clamp(min=1)


def _known(labels: Tensor) -> Tensor:
    return ~(labels.isnan() | (labels == IGNORE))
