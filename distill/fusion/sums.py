"""Fusion by a sum of pooled vectors: plain, or weighted by one learned number a modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.dropout import Dropout
from distill.fusion.base import check_sizes


class SumFusion(nn.Module):
    """The sum of the pooled vectors of the modalities that are present: ``sum_m x_m``.

    Nothing stands for an absent modality, and a row without any gets zeros. It has no parameters.

    Args:
        modalities: names.
        dim: width of each modality's pooled vector and of the result.
        dropout: probability of dropping a feature of the result in training.

    Raises:
        ValueError: ``dim`` is below 1.
    """

    reads_tokens = False
    plain = False

    def __init__(self, modalities: Sequence[str], dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_sizes(modalities, 1, dim=dim)
        self.modalities = tuple(modalities)
        self.dropout = Dropout(dropout)

    def forward(
        self, tokens: dict[str, Tensor], masks: dict[str, Tensor], pooled: dict[str, Tensor], present: dict[str, Tensor]
    ) -> Tensor:
        """Fuse one vector a modality.

        Args:
            tokens: not read; may be empty.
            masks: modality -> bool [B, T]; not read.
            pooled: modality -> [B, dim].
            present: modality -> bool [B].

        Returns:
            [B, dim].
        """
        there = torch.stack([present[name] for name in self.modalities], dim=1)
        vectors = torch.stack([pooled[name] for name in self.modalities], dim=1)
        vectors = torch.where(there[..., None], vectors, 0.0)
        return self.dropout((vectors * self.weights(there)[..., None].to(vectors.dtype)).sum(1))

    def weights(self, present: Tensor) -> Tensor:
        """What each modality counts, [B, M], given which are present, bool [B, M]."""
        return present.float()


class WeightedSumFusion(SumFusion):
    """The mean of the pooled vectors that are present, weighted by one learned number a modality.

    ``sum_m softmax(w)_m x_m``, the softmax over the modalities that a row has: its weights always add up to 1. At first
    they are equal. Nothing stands for an absent modality, and a row without any gets zeros.

    Args:
        modalities: names.
        dim: width of each modality's pooled vector and of the result.
        dropout: probability of dropping a feature of the result in training.

    Raises:
        ValueError: ``dim`` is below 1.
    """

    def __init__(self, modalities: Sequence[str], dim: int, *, dropout: float = 0.0) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        self.scores = nn.Parameter(torch.zeros(len(self.modalities)))

    def weights(self, present: Tensor) -> Tensor:
        """What each modality counts, [B, M], given which are present, bool [B, M]."""
        return (self.scores + (~present).to(self.scores.dtype) * -1e4).softmax(dim=1)
