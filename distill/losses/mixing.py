"""Several teachers in one term on logits: how much each counts in each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config import MixConfig
from distill.contracts import IGNORE
from distill.losses.numeric import upcast
from distill.losses.parts import Part


class Mixed(Part):
    """A loss on logits of several teachers, in which each counts by its weight in the row.

    Weights of a row add up to 1 over the teachers that can read it. ``by`` says where they come from:

    - "weights": the recipe gives them; equal ones by default (You et al. 2017, "Learning from Multiple Teacher
      Networks", averages what teachers predict so).
    - "confidence": from each teacher's error in the row, :func:`confidence_weights`.
    - "learned": a softmax of numbers that are trained with the student, but by an objective of their own,
      :func:`pool_loss`: how well the mixture of the teachers' predictions says the label. The term's gradient is kept
      from them, since the loss is linear in the weights: minimised over them it is least at a corner, with all weight
      on the teacher that is easiest to imitate, however wrong, and nothing keeps weights from it that the distillation
      loss trains (as in AMTML-KD: Liu et al. 2020, arXiv 2103.04062). The likelihood of the mixture is concave in the
      weights and drops a teacher only if the others predict the labels better without it (stacking: Yao et al. 2018,
      arXiv 1704.02030). It is measured on training rows, so a teacher that knows these by heart gets more than it
      deserves. Rows without a label train nothing and are weighed like the others.

    ``average`` says what is weighed. "losses": the loss's value of each teacher in the row; of a loss that compares
    rows, each teacher's value over the rows that it reads, by its mean weight over all rows. "probabilities": what the
    teachers predict at temperature 1; the logarithm of that mixture is then the logits of the one teacher that the loss
    reads. For :func:`~distill.losses.kd` at T = 1 both have the same gradient.

    Args:
        loss: student logits [B, C], teacher logits [B, C], and labels [B] if it reads them -> scalar.
        config: the mix.
        num_teachers: K.
        relational: the loss compares rows with each other.
        reads_labels: it reads labels, and averages over the rows that have one.

    Attributes:
        learns: whether the weights are trained.
        shares: [K], the weights of the last call in a row that all teachers read; None where rows differ.
    """

    scores: Tensor
    fixed: Tensor

    def __init__(
        self,
        loss: Callable[..., Tensor],
        config: MixConfig,
        num_teachers: int,
        *,
        relational: bool = False,
        reads_labels: bool = False,
    ) -> None:
        super().__init__()
        self._loss, self._by, self._average = loss, config.by, config.average
        self._relational, self._reads_labels = relational, reads_labels
        scores = torch.tensor(config.weights or [1.0] * num_teachers).log()
        self.learns = config.by == "learned"
        self.register_parameter("scores", nn.Parameter(scores) if self.learns else None)
        self.register_buffer("fixed", None if self.learns else scores, persistent=False)
        self.shares: Tensor | None = None if config.by == "confidence" else scores.softmax(-1)

    def forward(self, student: Tensor, *given: Tensor, **params: Any) -> Tensor:
        """Return the loss, a scalar.

        Args:
            student: logits [B, C].
            given: logits [B, C] of each teacher; int64 [B], labels or ``IGNORE``; bool [B, K], which teacher can read
                which row, each row at least one.
            params: the loss's.
        """
        *several, labels, reads = given
        teachers = torch.stack([upcast(logits.detach()) for logits in several], dim=1)
        weights = self._weights(teachers, labels, reads)
        told = (labels,) if self._reads_labels else ()
        if self._average == "probabilities":
            value = self._loss(student, pooled_logits(teachers, weights), *told, **params)
        elif self._relational:
            value = self._by_teacher(student, teachers, weights, reads, params)
        else:
            each = _row_values(self._loss, student, teachers, told, params)
            value = (weights * each).sum() / self._counted(labels)
        if not self.learns:
            return value
        learning = pool_loss(self.scores, teachers, labels, reads).sum() / self._counted(labels)
        return value + (learning - learning.detach())  # its gradient, without its value

    def _weights(self, teachers: Tensor, labels: Tensor, reads: Tensor) -> Tensor:
        if self._by == "confidence":
            return confidence_weights(teachers, labels, reads)
        scores = upcast((self.scores if self.learns else self.fixed).detach())
        self.shares = scores.softmax(-1)
        return scores.masked_fill(~reads, -torch.inf).softmax(-1)

    def _by_teacher(
        self, student: Tensor, teachers: Tensor, weights: Tensor, reads: Tensor, params: dict[str, Any]
    ) -> Tensor:
        values = [
            share * self._loss(student[rows], logits[rows], **params)
            for share, logits, rows in zip(weights.mean(0), teachers.unbind(1), reads.unbind(1), strict=True)
            if bool(rows.any())
        ]
        return torch.stack(values).sum()

    def _counted(self, labels: Tensor) -> Tensor | int:
        """How many rows the term averages over."""
        return (labels != IGNORE).sum().clamp(min=1) if self._reads_labels else len(labels)


def confidence_weights(teachers: Tensor, labels: Tensor, reads: Tensor) -> Tensor:
    """What each teacher counts in each row by its error there (CA-MKD: Zhang et al. 2022, arXiv 2201.00007).

    ``w_k = (1 - exp(L_k) / Σ_j exp(L_j)) / (K - 1)`` with ``L_k`` the cross-entropy of teacher k's logits with the
    row's label; K and the sum are over the teachers that can read the row, and one that is alone has the weight 1. A
    row without a label has equal weights: how sure a teacher is of itself says nothing about its being right, which is
    what the paper holds against weights from the teachers' entropies. The weights add up to 1, as in the paper; the
    authors' code divides the loss by K once more. Their second part, on features, is not built.

    Args:
        teachers: logits [B, K, C].
        labels: int64 [B], or ``IGNORE``.
        reads: bool [B, K].

    Returns:
        [B, K]; rows add up to 1, and what cannot be read has 0.
    """
    others = reads.sum(-1, keepdim=True) - 1
    share_of_error = (-_log_p_of(labels, teachers)).masked_fill(~reads, -torch.inf).softmax(-1)
    weights = (1 - share_of_error) / others.clamp(min=1)
    equal = (labels == IGNORE)[:, None] | (others == 0)
    return torch.where(equal, 1 / (others + 1).to(weights), weights).masked_fill(~reads, 0.0)


def pool_loss(scores: Tensor, teachers: Tensor, labels: Tensor, reads: Tensor) -> Tensor:
    """The cross-entropy of the labels with the teachers' mixture: ``-log Σ_k w_k softmax(t_k)[y]``, ``w = softmax``.

    Args:
        scores: [K], of which the weights are the softmax over the teachers that can read a row.
        teachers: logits [B, K, C].
        labels: int64 [B], or ``IGNORE``.
        reads: bool [B, K].

    Returns:
        [B]; 0 (with a gradient of 0) in rows without a label.
    """
    weights = scores.masked_fill(~reads, -torch.inf).log_softmax(-1)
    return -(weights + _log_p_of(labels, teachers)).logsumexp(-1).masked_fill(labels == IGNORE, 0.0)


def pooled_logits(teachers: Tensor, weights: Tensor) -> Tensor:
    """The logarithm of the teachers' mixed predictions, ``log Σ_k w_k softmax(t_k)``.

    Args:
        teachers: logits [B, K, C].
        weights: [B, K]; rows add up to 1.

    Returns:
        [B, C], of which the softmax is the mixture.
    """
    return (weights.log()[..., None] + F.log_softmax(teachers, dim=-1)).logsumexp(dim=1)


def _log_p_of(labels: Tensor, teachers: Tensor) -> Tensor:
    """Log-probability of each row's label, [B, K]; of the first class where there is no label."""
    wanted = labels.clamp(min=0)[:, None, None].expand(-1, teachers.shape[1], 1)
    return F.log_softmax(teachers, dim=-1).gather(-1, wanted).squeeze(-1)


def _row_values(
    loss: Callable[..., Tensor], student: Tensor, teachers: Tensor, told: Sequence[Tensor], params: dict[str, Any]
) -> Tensor:
    """The loss of each row alone with each teacher, [B, K]."""

    def of_row(*row: Tensor) -> Tensor:
        return loss(*(tensor[None] for tensor in row), **params)

    count = teachers.shape[1]  # one level of vmap: two of them, over rows and teachers, fail in mse_loss
    beside = [tensor.repeat_interleave(count, dim=0) for tensor in (student, *told)]
    found: Tensor = torch.vmap(of_row)(beside[0], teachers.flatten(0, 1), *beside[1:])
    return found.unflatten(0, (-1, count))
