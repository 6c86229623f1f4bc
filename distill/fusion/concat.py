"""Late fusion of pooled vectors by concatenation and a small MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.fusion.base import VectorFusion


class ConcatFusion(VectorFusion):
    """Concatenate the pooled vectors, absent ones replaced by a learned vector, then one hidden layer.

    ``ReLU(W [x_1, ..., x_M] + b)``.

    Args:
        modalities: names, in the order of concatenation.
        dim: width of each modality's pooled vector and of the result.
        dropout: probability of dropping a feature in training.
    """

    def __init__(self, modalities: Sequence[str], dim: int, *, dropout: float = 0.0) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        self.linear = nn.Linear(dim * len(self.modalities), dim)
        self.activation = nn.ReLU()

    def fuse(self, vectors: list[Tensor]) -> Tensor:
        """Fuse vectors [B, dim], one a modality, to [B, dim]."""
        return self.activation(self.linear(torch.cat(vectors, dim=-1)))
