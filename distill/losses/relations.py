"""Losses on how rows relate to each other, in a batch or against stored ones: widths of both models may differ.

Those of a batch are batch-relational: rows of all ranks are gathered before the call. One row alone has no relations:
it gives 0 with a gradient of 0, so the last batch of an epoch may be that small.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.bounds import AtLeastZero, Count, Positive, Temperature
from distill.losses.numeric import full_precision, need_one_shape, unit


@full_precision
def rkd(
    student_vec: Tensor,
    teacher_vec: Tensor,
    *,
    distance_weight: AtLeastZero = 25.0,
    angle_weight: AtLeastZero = 50.0,
    squared: bool = False,
    eps: Positive = 1e-12,
) -> Tensor:
    """Relational KD: distances between pairs and angles in triples of rows (Park et al. 2019, arXiv 1904.05068).

    ``distance_weight · mean_ij h(d_ij / d̄) + angle_weight · mean_ijk h(cos ∠(x_j, x_i, x_k))``, each against the
    teacher's, with the Huber loss h at 1 and each side's own mean distance d̄ over pairs of different rows. The means
    run over all B² pairs and B³ triples, those with equal indices included, which are 0. Distances are those of
    differences: squared lengths less twice the product, as in common code, lose near pairs in float32. Rows that
    coincide, as those of equal texts do, have a distance of sqrt(eps), no angle, and no gradient: the direction of what
    rounding leaves between them is noise, and its slope is without limit.

    Args:
        student_vec: [B, D] or any shape that is flattened to it; B³ numbers are held.
        teacher_vec: [B, D']; no gradient flows into it.
        distance_weight: the authors' is 25 beside 50 for angles.
        angle_weight: see there.
        squared: compare squared distances.
        eps: least squared distance.

    Returns:
        A scalar, blind to rotation, shift and scale of either side.
    """
    if len(student_vec) < 2:
        return (student_vec * 0).sum()
    student, teacher = (_apart(x.flatten(1)) for x in (student_vec, teacher_vec.detach()))
    distances, their_distances = (_relative_distances(x, squared, eps) for x in (student, teacher))
    angles, their_angles = (unit(x) @ unit(x).mT for x in (student, teacher))
    off = F.smooth_l1_loss(distances, their_distances), F.smooth_l1_loss(angles, their_angles)
    return distance_weight * off[0] + angle_weight * off[1]


@full_precision
def sp(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Similarity-preserving KD: which rows of a batch are alike (Tung & Mori 2019, arXiv 1907.09682).

    ``1/B² · ||N(S Sᵀ) - N(T Tᵀ)||²`` (Frobenius) with each row of features flattened and N dividing each *row* of the
    matrix by its length; dividing the matrix by its own length, as some code does, is another loss.

    Args:
        student_map: [B, ...], flattened to [B, D].
        teacher_map: [B, ...]; no gradient flows into it.

    Returns:
        A scalar, blind to rotation and scale of either side.
    """
    one, other = (unit(x @ x.T) for x in (student_map.flatten(1), teacher_map.detach().flatten(1)))
    return F.mse_loss(one, other)


@full_precision
def pkt(student_vec: Tensor, teacher_vec: Tensor, *, eps: Positive = 1e-7) -> Tensor:
    """Probabilistic knowledge transfer: KL between distributions over neighbours (Passalis & Tefas 2018, arXiv
    1803.10837).

    ``mean_ij p_ij · log((p_ij + eps) / (q_ij + eps))`` with ``p`` the teacher's and ``q`` the student's: cosines
    brought to [0, 1] by (1 + cos) / 2 and divided by their sum over j. As in the authors' code it is a mean over B², B
    times smaller than a mean of rows' KLs, and a row is its own neighbour.

    Args:
        student_vec: [B, D] or any shape that is flattened to it.
        teacher_vec: [B, D']; no gradient flows into it.
        eps: added to lengths and to probabilities.

    Returns:
        A scalar, blind to the scale of each row but for ``eps``.
    """

    def neighbours(rows: Tensor) -> Tensor:
        directions = unit(rows.flatten(1), eps)
        similarity = (directions @ directions.T + 1) / 2
        return similarity / similarity.sum(dim=1, keepdim=True)

    student, teacher = neighbours(student_vec), neighbours(teacher_vec.detach())
    return (teacher * ((teacher + eps) / (student + eps)).log()).mean()


@full_precision
def cckd(
    student_vec: Tensor, teacher_vec: Tensor, *, gamma: AtLeastZero = 0.4, max_p: Count = 2, squared: bool = False
) -> Tensor:
    """Correlation congruence: Gaussian kernels between rows (Peng et al. 2019, arXiv 1904.01802).

    ``1/B² · ||K(student) - K(teacher)||`` (Frobenius) with the kernel's Taylor series,
    ``K_ij = exp(-2γ) · Σ_{p=0..P} (2γ)^p / p! · <x_i, x_j>^p``. The paper's formula squares the length (``squared``);
    code in use takes the length or, by way of a mean squared error, the square. Some "correlation" losses of benchmarks
    compare neighbouring rows only and have nothing in common with it.

    Args:
        student_vec: L2-normalised [B, D]: the series stands for a Gaussian for such alone.
        teacher_vec: L2-normalised [B, D']; no gradient flows into it.
        gamma: γ of ``exp(-γ · ||x - y||²)``.
        max_p: P, the order of the series.
        squared: square the Frobenius length.

    Returns:
        A scalar.
    """

    def kernel(rows: Tensor) -> Tensor:
        products = rows @ rows.T
        terms = [(2 * gamma) ** p / math.factorial(p) * products**p for p in range(1, max_p + 1)]
        return math.exp(-2 * gamma) * torch.stack([torch.ones_like(products), *terms]).sum(dim=0)

    difference = kernel(student_vec) - kernel(teacher_vec.detach())
    length = difference.square().sum() if squared else torch.linalg.vector_norm(difference)
    return length / len(student_vec) ** 2


@full_precision
def crd(
    student_vec: Tensor,
    teacher_vec: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    *,
    num_rows: int,
    student_constant: float | Tensor,
    teacher_constant: float | Tensor,
    temperature: Temperature = 0.07,
    eps: AtLeastZero = 1e-7,
) -> Tensor:
    """Contrastive representation distillation against memory banks (Tian et al. 2020, arXiv 1910.10699).

    Sum of two parts: the student's embedding against the teacher's stored ones, and the teacher's against the
    student's. Of one part, with ``h = exp(<x, m> / T) / Z``, K negatives and n rows of training data,
    ``-mean_b [log h_0 / (h_0 + K/n + eps) + Σ_{k=1..K} log (K/n) / (h_k + K/n + eps)]``. This is binary (NCE), not
    InfoNCE: Z is a constant (:func:`crd_constant`, set in the first step and kept), and the positive too is the bank's
    entry of the row, not the other model's embedding of now. Computed from logarithms, so no similarity is too large.

    What the negatives are is the caller's. The authors' code asks for labels: negatives are rows of *other classes*,
    without repetition where these suffice, and the positive is the row itself (``exact``, their default) or a row
    of its class (``relax``). Its memory alone draws from all rows, the row itself included, with repetition.
    :class:`~distill.losses.memories.Crd` is ``exact`` and needs no labels: from all rows but the row itself, with
    repetition, so that rows of its class are among the negatives.

    Args:
        student_vec: L2-normalised [B, D], behind a learned projection.
        teacher_vec: L2-normalised [B, D], behind a learned projection of its own. That projection learns from the
            second part, so this is not detached: detach the teacher's features before it.
        student_bank: L2-normalised [B, 1 + K, D], entries of the student's bank: the row's own, then negatives, drawn
            alike for both banks; no gradient flows into it.
        teacher_bank: [B, 1 + K, D], the same entries of the teacher's bank; no gradient flows into it.
        num_rows: n.
        student_constant: Z of the student's embeddings against the teacher's bank.
        teacher_constant: Z of the teacher's embeddings against the student's bank.
        temperature: T > 0.
        eps: of the authors' code.

    Returns:
        A scalar.
    """
    noise = (student_bank.shape[1] - 1) / num_rows

    def part(anchors: Tensor, bank: Tensor, constant: float | Tensor) -> Tensor:
        scores = _against(anchors, bank, temperature) - torch.as_tensor(constant).to(anchors).log()
        largest = torch.logaddexp(scores, torch.full_like(scores, math.log(noise + eps)))
        negatives = (math.log(noise) - largest[:, 1:]).sum(dim=1) if noise else 0.0
        return -(scores[:, 0] - largest[:, 0] + negatives).mean()

    own = part(student_vec, teacher_bank, student_constant)
    return own + part(teacher_vec, student_bank, teacher_constant)


@full_precision
def crd_constant(anchors: Tensor, bank: Tensor, *, num_rows: int, temperature: Temperature = 0.07) -> Tensor:
    """The constant Z of :func:`crd`: ``n · mean exp(<x, m> / T)`` over the first batch and its entries of the bank.

    Args:
        anchors: L2-normalised [B, D] of one model.
        bank: L2-normalised [B, 1 + K, D] of the other.
        num_rows: n, rows of training data.
        temperature: T > 0.

    Returns:
        A scalar without a gradient.
    """
    return num_rows * _against(anchors.detach(), bank, temperature).exp().mean()


@full_precision
def queue_kl(
    student_vec: Tensor,
    teacher_vec: Tensor,
    queue: Tensor,
    *,
    student_temperature: Temperature = 0.2,
    teacher_temperature: Temperature = 0.01,
) -> Tensor:
    """SEED: how alike a row is to stored embeddings of the teacher (Fang et al. 2021, arXiv 2101.04731).

    ``mean_b KL(softmax(<t, Q> / T_t) || softmax(<s, Q> / T_s))`` with Q the queue and in front of it the teacher's own
    embedding of the row, for which the teacher's score is 1. The paper writes a cross-entropy: larger by the entropy of
    the teacher's distribution, same gradient. The queue gets the teacher's embeddings *after* the call; with those of
    this batch in it already the positive would stand there twice.

    Args:
        student_vec: L2-normalised [B, D].
        teacher_vec: L2-normalised [B, D]; no gradient flows into it.
        queue: L2-normalised [N, D], the teacher's embeddings of other rows; no gradient flows into it.
        student_temperature: T_s > 0.
        teacher_temperature: T_t > 0; the paper's 0.01 is nearly one-hot, as is the 1e-4 of its code.

    Returns:
        A scalar.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("queue_kl", student=student_vec, teacher=teacher_vec)
    teacher, stored = teacher_vec.detach(), queue.detach()

    def over_queue(rows: Tensor, temperature: float) -> Tensor:
        scores = torch.cat([(rows * teacher).sum(dim=1, keepdim=True), rows @ stored.T], dim=1)
        return F.log_softmax(scores / temperature, dim=1)

    student, target = over_queue(student_vec, student_temperature), over_queue(teacher, teacher_temperature)
    return F.kl_div(student, target, reduction="batchmean", log_target=True)


def _apart(rows: Tensor) -> Tensor:
    """Differences of all pairs of [B, D], [B, B, D]; 0 where only rounding tells two rows apart."""
    differences, lengths = rows[None] - rows[:, None], rows.detach().norm(dim=1)
    rounding = 8 * torch.finfo(rows.dtype).eps * (lengths[None] + lengths[:, None])
    alike = differences.detach().norm(dim=-1) <= rounding
    return differences.masked_fill(alike[..., None], 0.0)


def _relative_distances(apart: Tensor, squared: bool, eps: float) -> Tensor:
    """Distances of all pairs from their differences [B, B, D], divided by their mean over pairs of different rows."""
    rows = len(apart)
    distances = apart.square().sum(dim=-1).clamp(min=eps)
    distances = (distances if squared else distances.sqrt()) * (1 - torch.eye(rows).to(apart))
    return distances / (distances.sum() / (rows * (rows - 1)))


def _against(anchors: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """Scores of each anchor [B, D] against its entries of a bank [B, N, D]."""
    return (bank.detach() @ anchors[:, :, None]).squeeze(-1) / temperature
