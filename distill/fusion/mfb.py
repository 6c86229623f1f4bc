"""Factorized bilinear fusion of every pair of modalities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.dropout import Dropout
from distill.fusion.base import VectorFusion, check_sizes

SOFTENING = 1e-4
"""Makes the slope of the signed root finite at 0, where rounding would otherwise show in every digit."""


class MfbFusion(VectorFusion):
    """Multimodal factorized bilinear pooling (Yu et al. 2017, arXiv 1708.01471), the mean over all pairs.

    Of a pair: ``s = sum_f (U_m x_m)_f * (U_n x_n)_f`` over the factors f of each feature, then the signed root
    ``s / sqrt(|s| + 1e-4)``, then length 1. The paper has two modalities; with more, a modality's ``U`` serves all its
    pairs. A learned vector stands for an absent modality.

    Args:
        modalities: names, at least two.
        dim: width of each modality's pooled vector and of the result.
        factors: how many products are summed for a feature of the result (the paper's k).
        dropout: probability of dropping a product in training.

    Raises:
        ValueError: fewer than two modalities, or a size is below 1.
    """

    least = 2
    splits_channels = True

    def __init__(self, modalities: Sequence[str], dim: int, *, factors: int = 5, dropout: float = 0.0) -> None:
        super().__init__(modalities, dim)
        check_sizes(modalities, self.least, factors=factors)
        self.factors = factors
        self.expand = nn.ModuleDict({name: nn.Linear(dim, dim * factors) for name in self.modalities})
        self.product_dropout = Dropout(dropout)

    def fuse(self, vectors: list[Tensor]) -> Tensor:
        """Fuse vectors [B, dim], one a modality, to [B, dim]."""
        wide = [self.expand[name](x) for name, x in zip(self.modalities, vectors, strict=True)]
        products = torch.stack([one * other for one, other in combinations(wide, 2)], dim=1)
        sums = self.product_dropout(products).unflatten(-1, (-1, self.factors)).sum(-1).float()
        return F.normalize(sums / (sums.abs() + SOFTENING).sqrt(), dim=-1).mean(1)
