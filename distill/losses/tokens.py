"""Losses on the tokens and attentions of transformers; padding takes no part where a mask says what it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import UserError
from distill.losses.bounds import Count
from distill.losses.numeric import full_precision, need_one_shape, upcast

LEAST = 1e-8
"""Probability of which a logarithm is taken, at least: its slope is 1e8 there, and none below."""


@full_precision
def token_mse(student_tokens: Tensor, teacher_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hidden states token by token (TinyBERT: Jiao et al. 2019, arXiv 1909.10351; the feature map transfer of
    MobileBERT: Sun et al. 2020, arXiv 2004.02984).

    ``mean_b 1/(L_b · D) · Σ_l ||s_bl - t_bl||²`` over the L_b tokens of row b. Common code averages over padding too,
    which weakens the loss of short texts; a linear layer brings the student to the teacher's width before the call.

    Args:
        student_tokens: [B, L, D].
        teacher_tokens: [B, L, D], of the same tokenization; no gradient flows into it.
        mask: bool [B, L], True for tokens; None where all are.

    Returns:
        A scalar, averaged over the rows that have a token.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("token_mse", student=student_tokens, teacher=teacher_tokens)
    each = (student_tokens - teacher_tokens.detach()).square().mean(dim=-1)
    return _mean_over_tokens(each, mask)


@full_precision
def attention_transfer(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL between attention distributions, head by head: MobileBERT's form (Sun et al. 2020, arXiv 2004.02984).

    ``mean_b 1/(A · L_b) · Σ_a Σ_l KL(softmax(t_bal) || softmax(s_bal))``, also the attention part of MiniLM (Wang et
    al. 2020, arXiv 2002.10957). TinyBERT takes the mean squared difference of the *scores* instead (:func:`fitnet` on
    them). Scores and not probabilities are read: the KL's gradient is then a difference of probabilities, where that
    of a logarithm of a probability has no bound. The logarithms of probabilities are scores too (:func:`scores_of`),
    which an objective takes where a tap gives attentions behind their softmax.

    Args:
        student_scores: [B, A, L, L], scaled products of queries and keys before softmax.
        teacher_scores: the same shape, so as many heads; no gradient flows into it.
        mask: bool [B, L], True for tokens; others are neither attended to nor counted. None where all are.

    Returns:
        A scalar, averaged over the rows that have a token.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("attention_transfer", student=student_scores, teacher=teacher_scores)
    return _attention_kl(student_scores, teacher_scores.detach(), mask)


@full_precision
def minilm_relations(
    student_vectors: Tensor, teacher_vectors: Tensor, mask: Tensor | None = None, *, heads: Count = 12
) -> Tensor:
    """Self-attention relations: how the tokens' queries, keys or values relate (MiniLMv2: Wang et al. 2021, arXiv
    2012.15828).

    ``mean_b 1/(A · L_b) · Σ_a Σ_l KL(R^t_bal || R^s_bal)`` with ``R_a = softmax(X_a X_aᵀ / sqrt(d))`` of one kind of
    vectors X, cut into A relation heads of width d. Called once for queries, once for keys and once for values, the sum
    is v2's loss of one layer; :func:`attention_transfer` and this on values are MiniLM's (2020, arXiv 2002.10957). A is
    free of both models' own heads, and widths may differ. Common code sums over heads and tokens, and counts padding.

    Args:
        student_vectors: [B, L, D], all heads side by side.
        teacher_vectors: [B, L, D'], of the same tokenization; no gradient flows into it.
        mask: bool [B, L], True for tokens; None where all are.
        heads: A, which divides both widths; v2 takes 48 for base-size teachers and 64 for large ones.

    Returns:
        A scalar, averaged over the rows that have a token.

    Raises:
        UserError: a width is no multiple of ``heads``.
    """
    widths = student_vectors.shape[-1], teacher_vectors.shape[-1]
    if widths[0] % heads or widths[1] % heads:
        raise UserError(f"minilm_relations: heads={heads} must divide both widths, {widths[0]} and {widths[1]}")

    need_one_shape("minilm_relations", student=student_vectors[..., 0], teacher=teacher_vectors[..., 0])

    def relations(vectors: Tensor) -> Tensor:
        cut = vectors.unflatten(-1, (heads, -1)).transpose(1, 2)
        return cut @ cut.mT / cut.shape[-1] ** 0.5

    return _attention_kl(relations(student_vectors), relations(teacher_vectors.detach()), mask)


def scores_of(probabilities: Tensor) -> Tensor:
    """Scores whose softmax are given attentions: their logarithms, [B, A, L, L]; below ``LEAST`` all are alike."""
    return upcast(probabilities).clamp(min=LEAST).log()


def _attention_kl(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        hidden = ~mask.bool()[:, None, None, :]
        lowest = torch.finfo(student_scores.dtype).min / 2
        student_scores, teacher_scores = (x.masked_fill(hidden, lowest) for x in (student_scores, teacher_scores))
    student, teacher = (F.log_softmax(x, dim=-1) for x in (student_scores, teacher_scores))
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return _mean_over_tokens(each.mean(dim=1), mask)


def _mean_over_tokens(each: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the rows that have a token of each row's mean over its tokens, from [B, L]."""
    tokens = torch.ones_like(each, dtype=torch.bool) if mask is None else mask.bool()
    lengths = tokens.sum(dim=-1)
    rows = each.masked_fill(~tokens, 0.0).sum(dim=-1) / lengths.clamp(min=1)
    return rows.sum() / (lengths > 0).sum().clamp(min=1)
