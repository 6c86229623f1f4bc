"""Losses on captions, token by token, each under the true tokens before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import IGNORE, UserError
from distill.losses.bounds import Share, Temperature
from distill.losses.numeric import full_precision, need_one_shape


@full_precision
def token_cross_entropy(student_logits: Tensor, targets: Tensor, *, label_smoothing: Share = 0.0) -> Tensor:
    """Cross-entropy with the true tokens: the mean over a caption's tokens, then over rows.

    Args:
        student_logits: [B, L, V].
        targets: int64 [B, L]; positions with ``IGNORE`` take no part, and rows of such alone do not count.
        label_smoothing: share of the target spread evenly over all tokens (Szegedy et al. 2016, arXiv 1512.00567).

    Returns:
        A scalar; 0 (with a gradient of 0) when no row has a caption.

    Raises:
        UserError: there is not one target a position.
    """
    _need_positions("token_cross_entropy", targets, student_logits)
    flat = F.cross_entropy(
        student_logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return _mean_over_captions(flat.view_as(targets), targets)


@full_precision
def token_kd(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """Word-level distillation of captions (Kim & Rush 2016, arXiv 1606.07947): KD at each true token's position.

    ``mean_b 1/L_b Σ_l T² · KL(softmax(t_bl / T) || softmax(s_bl / T))``. The authors take T = 1 and sum over positions.

    Args:
        student_logits: [B, L, V].
        teacher_logits: [B, L, V], under the same tokens; no gradient flows into it.
        targets: int64 [B, L]; positions with ``IGNORE`` take no part, and rows of such alone do not count.
        temperature: T > 0.

    Returns:
        A scalar; 0 (with a gradient of 0) when no row has a caption.

    Raises:
        UserError: student and teacher have not one shape, or there is not one target a position.
    """
    need_one_shape("token_kd", student=student_logits, teacher=teacher_logits)
    _need_positions("token_kd", targets, student_logits)
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return _mean_over_captions(each, targets) * temperature**2


def _mean_over_captions(each: Tensor, targets: Tensor) -> Tensor:
    """Of [B, L] the mean over each row's tokens, and of these over the rows that have any."""
    known = targets != IGNORE
    counts = known.sum(dim=1)
    rows = torch.where(known, each, 0.0).sum(dim=1) / counts.clamp(min=1)
    return rows.sum() / (counts > 0).sum().clamp(min=1)


def _need_positions(loss: str, targets: Tensor, logits: Tensor) -> None:
    if targets.shape != logits.shape[:2]:
        raise UserError(
            f"{loss} reads one token a position, got targets {list(targets.shape)} for logits {list(logits.shape)}; "
            "give [B, L]"
        )
