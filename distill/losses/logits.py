"""Losses on logits: pure functions of tensors, computed in float32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import IGNORE
from distill.losses.numeric import upcast


def cross_entropy(student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the hard labels, averaged over the rows that have one.

    Args:
        student_logits: [B, C].
        labels: int64 [B]; rows with ``IGNORE`` take no part.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567).

    Returns:
        A scalar; 0 (with a gradient of 0) when no row has a label.
    """
    total = F.cross_entropy(
        upcast(student_logits), labels, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != IGNORE).sum().clamp(min=1)


def logit_adjusted(
    student_logits: Tensor, labels: Tensor, class_counts: Tensor, *, tau: float = 1.0, label_smoothing: float = 0.0
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
    logits = upcast(student_logits)
    counts = class_counts.to(logits).clamp(min=1)
    return cross_entropy(logits + tau * (counts / counts.sum()).log(), labels, label_smoothing=label_smoothing)


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Soft-label distillation: KL(teacher || student) at a temperature, times T².

    ``T² · mean_b Σ_c p_t log(p_t / p_s)`` with ``p = softmax(logits / T)`` (Hinton et al. 2015, arXiv 1503.02531).
    The mean is over rows only: implementations that average over classes too are C times smaller.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        temperature: T > 0.

    Returns:
        A scalar.
    """
    student = F.log_softmax(upcast(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(upcast(teacher_logits.detach()) / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def mse_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of raw logits (Ba & Caruana 2014, arXiv 1312.6184).

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.

    Returns:
        A scalar, averaged over rows and classes.
    """
    return F.mse_loss(upcast(student_logits), upcast(teacher_logits.detach()))


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679).

    ``alpha · KL(target vs rest) + beta · KL(among the non-target classes)``, both times T²; the paper's code
    sums the second over classes and averages both over rows, as here.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient flows into it.
        labels: int64 [B]; rows with ``IGNORE`` take no part.
        alpha: weight of the target-class part.
        beta: weight of the non-target part.
        temperature: T > 0.

    Returns:
        A scalar.
    """
    keep = labels != IGNORE
    target = F.one_hot(labels.clamp(min=0), student_logits.shape[-1]).bool()

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = upcast(logits) / temperature
        log_p = F.log_softmax(scaled, dim=-1)
        log_target = log_p.masked_select(target)
        log_rest = torch.logsumexp(log_p.masked_fill(target, -torch.inf), dim=-1)
        rest = F.log_softmax(scaled.masked_fill(target, -1e9), dim=-1)
        return torch.stack([log_target, log_rest], dim=-1), rest

    student_binary, student_rest = split(student_logits)
    teacher_binary, teacher_rest = split(teacher_logits.detach())
    per_row = alpha * F.kl_div(student_binary, teacher_binary, reduction="none", log_target=True).sum(-1)
    rest = F.kl_div(student_rest, teacher_rest, reduction="none", log_target=True).masked_fill(target, 0.0)
    per_row = per_row + beta * rest.sum(-1)
    return (per_row * keep).sum() / keep.sum().clamp(min=1) * temperature**2
