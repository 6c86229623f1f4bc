"""Losses on outputs other than one softmax: independent classes, numbers, and a temperature that is learned."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import IGNORE, UserError
from distill.losses.bounds import AtLeastZero, Temperature
from distill.losses.numeric import full_precision, need_one_shape


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


def _known(labels: Tensor) -> Tensor:
    return ~(labels.isnan() | (labels == IGNORE))
