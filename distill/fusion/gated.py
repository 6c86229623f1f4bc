"""Gated fusion: what is read of each modality depends on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.fusion.base import VectorFusion


class GatedFusion(VectorFusion):
    """The gated multimodal unit (Arevalo et al. 2017, arXiv 1702.01992), for any number of modalities.

    ``sum_m z_m * tanh(V_m x_m)`` with gates ``z_m = sigmoid(W_m [x_1, ..., x_M])``, one a feature and modality. The
    paper's variant for two modalities ties the second gate to the first, ``1 - z``; here each has its own, which is the
    paper's general form. A learned vector stands for an absent modality.

    Args:
        modalities: names.
        dim: width of each modality's pooled vector and of the result.
        dropout: probability of dropping a feature of the result in training.

    Raises:
        ValueError: ``dim`` is below 1.
    """

    def __init__(self, modalities: Sequence[str], dim: int, *, dropout: float = 0.0) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        total = dim * len(self.modalities)
        self.values = nn.ModuleDict({name: nn.Linear(dim, dim) for name in self.modalities})
        self.gates = nn.Sequential(nn.Linear(total, total), nn.Sigmoid())

    def fuse(self, vectors: list[Tensor]) -> Tensor:
        """Fuse vectors [B, dim], one a modality, to [B, dim]."""
        gates = self.gates(torch.cat(vectors, dim=-1)).chunk(len(vectors), dim=-1)
        values = [self.values[name](x).tanh() for name, x in zip(self.modalities, vectors, strict=True)]
        return torch.stack([gate * value for gate, value in zip(gates, values, strict=True)]).sum(0)
