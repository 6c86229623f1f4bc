"""Losses on embeddings and pooled or projected features, row by row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.losses.bounds import AtLeastZero
from distill.losses.maps import of_one_size
from distill.losses.numeric import full_precision, need_one_shape


@full_precision
def fitnet(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Hint loss: mean squared difference of features of one shape (Romero et al. 2015, arXiv 1412.6550).

    A projector brings the student's feature to the teacher's shape before the call. Averaged over all elements; the
    paper's ½ is left to the weight.

    Args:
        student_feature: any shape, rows first.
        teacher_feature: the same shape; no gradient flows into it.

    Returns:
        A scalar.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("fitnet", student=student_feature, teacher=teacher_feature)
    return F.mse_loss(student_feature, teacher_feature.detach())


@full_precision
def cosine(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """One minus the cosine between paired embeddings, averaged over rows.

    Args:
        student_embedding: [B, D], or [B, T, D] of T positions, over which the mean goes too.
        teacher_embedding: the same shape; no gradient flows into it.

    Returns:
        A scalar in [0, 2]; an embedding of zeros has a cosine of 0 and gets no gradient.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("cosine", student=student_embedding, teacher=teacher_embedding)
    nothing = (student_embedding == 0).all(dim=-1, keepdim=True)  # would get the gradient of a division by 1e-8
    student = student_embedding.masked_fill(nothing, 0.0)
    return 1 - F.cosine_similarity(student, teacher_embedding.detach(), dim=-1).mean()


@full_precision
def simkd(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Feature alignment for a student that reuses the teacher's classifier (Chen et al. 2022, arXiv 2203.14001).

    ``mean (P(student) - teacher)²`` over all elements, of the last feature map before pooling. The projector P (the
    authors': 1x1, 3x3 and 1x1 convolutions with BatchNorm and ReLU) and the teacher's frozen classifier behind it are
    the caller's: the student predicts through both, and this is its whole loss. In a recipe they are the student's
    heads of type ``reused`` (:mod:`distill.tasks.reused`), on vectors. Re-implementations that add a cross-entropy or
    KD train something else. Maps of unequal size are pooled to the smaller one.

    Args:
        student_map: the projected features, [B, C, H, W] or [B, C].
        teacher_map: [B, C, h, w] or [B, C]; no gradient flows into it.

    Returns:
        A scalar.

    Raises:
        UserError: the features have not one width.
    """
    student, teacher = of_one_size(student_map, teacher_map.detach())
    need_one_shape("simkd", student=student, teacher=teacher)
    return F.mse_loss(student, teacher)


@full_precision
def srrl(student_map: Tensor, teacher_map: Tensor, head_weight: Tensor, *, beta: AtLeastZero = 1.0) -> Tensor:
    """Features that the teacher's classifier reads alike (Yang et al., ICLR 2021, "Knowledge distillation via softmax
    regression representation learning", without an arXiv number).

    ``mean (h_s - h_t)² + beta · mean (W h_s - W h_t)²`` with h the pooled features and W the teacher's classifier; its
    bias cancels. The second mean is over rows and classes of raw logits, as in the authors' code, not of
    probabilities; the first is over rows and channels of *pooled* maps: comparing maps position by position is fitnet.

    Args:
        student_map: projected to the teacher's channels, [B, C, H, W] or pooled [B, C].
        teacher_map: [B, C, h, w] or [B, C]; no gradient flows into it.
        head_weight: W, [num_classes, C]; no gradient flows into it.
        beta: weight of the second part.

    Returns:
        A scalar.

    Raises:
        UserError: the features have not one width.
    """
    student, teacher = (x.flatten(2).mean(dim=-1) if x.ndim > 2 else x for x in (student_map, teacher_map.detach()))
    need_one_shape("srrl", student=student, teacher=teacher)
    difference = student - teacher
    return difference.square().mean() + beta * (difference @ head_weight.detach().T).square().mean()
