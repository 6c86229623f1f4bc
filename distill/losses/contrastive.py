"""Contrastive image-text losses (CLIP): batch-relational, so rows of all ranks are gathered before the call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.numeric import upcast


def clip_infonce(student_img: Tensor, student_txt: Tensor, *, logit_scale: float | Tensor = 20.0) -> Tensor:
    """Symmetric InfoNCE: each image finds its text in the batch and back (Radford et al. 2021, arXiv 2103.00020).

    Args:
        student_img: L2-normalised embeddings [B, D]; row i pairs with text i.
        student_txt: L2-normalised embeddings [B, D].
        logit_scale: inverse temperature.

    Returns:
        A scalar, the mean of both directions.
    """
    logits = logit_scale * upcast(student_img) @ upcast(student_txt).T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
