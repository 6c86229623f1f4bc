"""Losses on logits: pure functions of tensors, computed in float32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import IGNORE, UserError
from distill.losses.bounds import AtLeastZero, Share, Temperature
from distill.losses.numeric import full_precision, need_one_shape


@full_precision
def cross_entropy(student_logits: Tensor, labels: Tensor, *, label_smoothing: Share = 0.0) -> Tensor:
    """Cross-entropy with the hard labels, averaged over the rows that have one.

    Args:
        student_logits: [B, C].
        labels: int64 [B]; rows with ``IGNORE`` take no part.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567).

    Returns:
        A scalar; 0 (with a gradient of 0) when no row has a label.
    """
    total = F.cross_entropy(
        student_logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != IGNORE).sum().clamp(min=1)


@full_precision
def weighted_cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    *,
    power: AtLeastZero = 1.0,
    label_smoothing: Share = 0.0,
) -> Tensor:
    """Cross-entropy in which rows of rare classes count more.

    The mean over rows of ``w_c · cross_entropy`` with ``w_c ∝ n_c^-power`` and a mean of 1 over the training rows:
    power 1 gives all classes one weight in sum ("balanced"), 0.5 its square root, 0 is plain cross-entropy. Classes
    without rows count as one row. A weighted mean that divides by the batch's own weights (torch's) makes a row count
    by which others it meets; this one does not.

    Args:
        student_logits: [B, C].
        labels: int64 [B]; rows with ``IGNORE`` take no part.
        class_counts: [C], the training rows of each class.
        power: strength.
        label_smoothing: as in :func:`cross_entropy`.

    Returns:
        A scalar; 0 (with a gradient of 0) when no row has a label.
    """
    counts = class_counts.to(student_logits).clamp(min=1)
    weights = counts**-power
    weights = weights * counts.sum() / (weights * counts).sum()
    each = F.cross_entropy(
        student_logits, labels, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing
    )
    return _labelled_mean(each * weights[labels.clamp(min=0)], labels)


@full_precision
def logit_adjusted(
    student_logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    *,
    tau: AtLeastZero = 1.0,
    label_smoothing: Share = 0.0,
) -> Tensor:
    """Cross-entropy in which frequent classes need not be learnt from their frequency (long-tailed data).

    ``cross_entropy(logits + tau · log(n_c / n))`` (Menon et al. 2021, arXiv 2007.07314; with tau = 1 the balanced
    softmax of Ren et al. 2020, arXiv 2007.10740): what the counts explain is added in training and missing afterwards,
    so rare classes win more often. Classes without rows count as one row.

    Args:
        student_logits: [B, C].
        labels: int64 [B]; rows with ``IGNORE`` take no part.
        class_counts: [C], the training rows of each class.
        tau: strength; 0 is plain cross-entropy, 1 aims at the balanced error.
        label_smoothing: as in :func:`cross_entropy`.

    Returns:
        A scalar; 0 (with a gradient of 0) when no row has a label.
    """
    counts = class_counts.to(student_logits).clamp(min=1)
    adjusted = student_logits + tau * (counts / counts.sum()).log()
    return cross_entropy(adjusted, labels, label_smoothing=label_smoothing)


@full_precision
def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 4.0) -> Tensor:
    """Soft-label distillation: KL(teacher || student) at a temperature, times T².

    ``T² · mean_b Σ_c p_t log(p_t / p_s)`` with ``p = softmax(logits / T)`` (Hinton et al. 2015, arXiv 1503.02531).
    The mean is over rows only: implementations that average over classes too are C times smaller.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        temperature: T > 0.

    Returns:
        A scalar.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("kd", student=student_logits, teacher=teacher_logits)
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    return _kl(teacher, student).mean() * temperature**2


@full_precision
def mse_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of raw logits (Ba & Caruana 2014, arXiv 1312.6184).

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.

    Returns:
        A scalar, averaged over rows and classes.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("mse_logits", student=student_logits, teacher=teacher_logits)
    return F.mse_loss(student_logits, teacher_logits.detach())


@full_precision
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: AtLeastZero = 1.0,
    beta: AtLeastZero = 8.0,
    temperature: Temperature = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679).

    ``alpha · KL(target vs rest) + beta · KL(among the non-target classes)``, both times T²; the paper's code
    sums the second over classes and averages both over rows, as here. That code takes 1000 off the target's logit,
    which leaves a large one in its place; here the target is left out. With two classes the second part is 0.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        labels: int64 [B]; rows with ``IGNORE`` take no part.
        alpha: weight of the target-class part.
        beta: weight of the non-target part.
        temperature: T > 0.

    Returns:
        A scalar; 0 (with a gradient of 0) when no row has a label.

    Raises:
        UserError: the logits have one class or two shapes, or a label is none of the classes.
    """
    _need_two_classes("dkd", student_logits)
    need_one_shape("dkd", student=student_logits, teacher=teacher_logits)
    _need_classes("dkd", labels, student_logits)
    target = _target(labels, student_logits)

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = logits / temperature
        log_p = F.log_softmax(scaled, dim=-1)
        log_target = _of_target(log_p, labels)
        log_rest = torch.logsumexp(log_p.masked_fill(target, -torch.inf), dim=-1)
        return torch.stack([log_target, log_rest], dim=-1), _among_the_rest(scaled, target)

    student_binary, student_rest = split(student_logits)
    teacher_binary, teacher_rest = split(teacher_logits.detach())
    per_row = alpha * _kl(teacher_binary, student_binary) + beta * _kl(teacher_rest, student_rest)
    return _labelled_mean(per_row, labels) * temperature**2


@full_precision
def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: AtLeastZero = 1.5,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Normalized knowledge distillation (Yang et al. 2023, arXiv 2303.13005).

    ``mean_b [-t_y log s_y - gamma · T² · Σ_{i≠y} t̂_i log ŝ_i]``, where y is the label, ``s, t`` are softmax at
    temperature 1, and ``ŝ, t̂`` are softmax at T over the classes other than y, so that both add up to 1. Only the
    second part has a temperature. It is a cross-entropy and not a KL: equal logits do not give 0, and code that takes
    the teacher's entropy off has the same gradient and another value.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        labels: int64 [B]; rows with ``IGNORE`` take no part.
        gamma: weight of the non-target part, which is 0 with two classes.
        temperature: T > 0.

    Returns:
        A scalar; 0 (with a gradient of 0) when no row has a label.

    Raises:
        UserError: the logits have one class or two shapes, or a label is none of the classes.
    """
    _need_two_classes("nkd", student_logits)
    need_one_shape("nkd", student=student_logits, teacher=teacher_logits)
    _need_classes("nkd", labels, student_logits)
    target, teacher = _target(labels, student_logits), teacher_logits.detach()
    soft_target = _of_target(F.softmax(teacher, dim=-1), labels)
    of_target = soft_target * _of_target(F.log_softmax(student_logits, dim=-1), labels)
    student_rest, teacher_rest = (_among_the_rest(x / temperature, target) for x in (student_logits, teacher))
    of_rest = (teacher_rest.exp() * student_rest).sum(-1)
    return -_labelled_mean(of_target + gamma * temperature**2 * of_rest, labels)


@full_precision
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: AtLeastZero = 1.0,
    gamma: AtLeastZero = 1.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """DIST: correlation in place of KL, within rows and within classes (Huang et al. 2022, arXiv 2205.10536).

    ``T² · [beta · mean_b (1 - ρ(s_b, t_b)) + gamma · mean_c (1 - ρ(s_c, t_c))]``, Pearson's ρ of ``softmax(z / T)``:
    ``s_b`` is a row and ``s_c`` a class over the batch. The second part compares rows: splitting a batch changes it;
    of one row it is the constant gamma. As in the authors' code 1e-8 is added to the product of the lengths, which
    matters for nearly uniform probabilities. A row or class without variance has no correlation: it counts as ρ = 0 and
    gets no gradient, where dividing by the 1e-8 would give one of 1e8.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        beta: weight of the relation between the classes of a row.
        gamma: weight of the relation between the rows of a class.
        temperature: T > 0.

    Returns:
        A scalar in [0, 2 · (beta + gamma) · T²].

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("dist", student=student_logits, teacher=teacher_logits)
    student = F.softmax(student_logits / temperature, dim=-1)
    teacher = F.softmax(teacher_logits.detach() / temperature, dim=-1)
    between_classes = 1 - _correlation(student, teacher).mean()
    between_rows = 1 - _correlation(student.T, teacher.T).mean()
    return (beta * between_classes + gamma * between_rows) * temperature**2


@full_precision
def logit_standardized_kd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: Temperature = 2.0, eps: AtLeastZero = 1e-7
) -> Tensor:
    """KD on z-scores, so that the student need not match the teacher's scale (Sun et al. 2024, arXiv 2403.01427).

    ``kd(z(student), z(teacher))`` with ``z(x) = (x - mean) / (std + eps)`` over the classes of a row, and ``kd`` the
    KL at T times T². The standard deviation is the unbiased one (C - 1), as in the authors' code; the formula of the
    paper divides by C. A row whose logits are all equal has z-scores of 0 and gets no gradient.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        temperature: T > 0; the paper's is 2, as z-scores differ less than logits do.
        eps: added to the standard deviation.

    Returns:
        A scalar, blind to scale and shift of either side's rows.

    Raises:
        UserError: the logits have one class, or two shapes.
    """
    _need_two_classes("logit_standardized_kd", student_logits)
    need_one_shape("logit_standardized_kd", student=student_logits, teacher=teacher_logits)
    scores = [_standardized(x, eps) for x in (student_logits, teacher_logits)]
    return kd(*scores, temperature=temperature)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities, summed over classes; ``F.kl_div`` cannot go through ``vmap``."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def _need_two_classes(loss: str, logits: Tensor) -> None:
    if logits.shape[-1] < 2:
        raise UserError(
            f"{loss} compares classes with each other and needs logits of two or more, got {logits.shape[-1]}; "
            "use mse_logits or multilabel_kd for a single output"
        )


def _need_classes(loss: str, labels: Tensor, logits: Tensor) -> None:
    """Refuse labels that name no class, or are not one a row; under transforms of ``torch.func`` nobody can look."""
    if labels.shape != logits.shape[:1]:
        raise UserError(
            f"{loss} reads one label a row, got labels {list(labels.shape)} for logits {list(logits.shape)}; give [B]"
        )
    if torch._C._are_functorch_transforms_active():
        return
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= logits.shape[-1]))
    if bool(wrong.any()):
        raise UserError(
            f"{loss}: the label {int(labels[wrong][0])} is no class of {logits.shape[-1]} logits; give 0 to "
            f"{logits.shape[-1] - 1}, or {IGNORE} where there is none"
        )


def _target(labels: Tensor, logits: Tensor) -> Tensor:
    """Where the label's class is, bool [B, C]; the first class where there is no label."""
    return F.one_hot(labels.clamp(min=0), logits.shape[-1]).bool()


def _of_target(values: Tensor, labels: Tensor) -> Tensor:
    """The label's entry of each row, [B]; the first class's where there is no label."""
    return values.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)


def _among_the_rest(scaled: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities among the classes other than the target, [B, C], and 0 in the target's place."""
    return F.log_softmax(scaled.masked_fill(target, -1e9), dim=-1).masked_fill(target, 0.0)


def _labelled_mean(per_row: Tensor, labels: Tensor) -> Tensor:
    keep = labels != IGNORE
    return (per_row * keep).sum() / keep.sum().clamp(min=1)


def _standardized(logits: Tensor, eps: float) -> Tensor:
    """Z-scores of each row; 0 without a gradient where only rounding tells a row's logits apart."""
    std = logits.std(dim=-1, keepdim=True)
    largest = logits.detach().abs().amax(dim=-1, keepdim=True)
    equal = std <= 4 * torch.finfo(logits.dtype).eps * largest
    return ((logits - logits.mean(dim=-1, keepdim=True)) / (std + eps)).masked_fill(equal, 0.0)


def _correlation(one: Tensor, other: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation of each row of [N, M] with the other's; 0 where one of them has no variance."""
    centred = []
    for rows in (one, other):
        offsets = rows - rows.mean(dim=-1, keepdim=True)
        rounding = 8 * torch.finfo(rows.dtype).eps * rows.detach().norm(dim=-1, keepdim=True)
        centred.append(offsets.masked_fill(offsets.detach().norm(dim=-1, keepdim=True) <= rounding, 0.0))
    first, second = centred
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1) + eps)
