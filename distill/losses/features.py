"""Losses on embeddings and intermediate features: pure functions of tensors of equal shape."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.losses.numeric import upcast


def fitnet(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Hint loss: mean squared difference of features of one shape (Romero et al. 2015, arXiv 1412.6550).

    A projector brings the student's feature to the teacher's width before the call. Averaged over all elements; the
    paper's ½ is left to the weight.

    Args:
        student_feature: any shape, rows first.
        teacher_feature: the same shape; no gradient flows into it.

    Returns:
        A scalar.
    """
    return F.mse_loss(upcast(student_feature), upcast(teacher_feature.detach()))


def cosine(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """One minus the cosine between paired embeddings, averaged over rows.

    Args:
        student_embedding: [B, D].
        teacher_embedding: [B, D]; no gradient flows into it.

    Returns:
        A scalar in [0, 2].
    """
    return 1 - F.cosine_similarity(upcast(student_embedding), upcast(teacher_embedding.detach()), dim=-1).mean()
