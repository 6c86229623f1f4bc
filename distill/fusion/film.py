"""FiLM fusion: each modality is scaled and shifted by what the others say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.fusion.base import VectorFusion


class FilmFusion(VectorFusion):
    """Feature-wise linear modulation (Perez et al. 2018, arXiv 1709.07871) of each modality by all others.

    The mean over modalities of ``ReLU((1 + g_m) * x_m + b_m)`` with ``[g_m, b_m] = W_m [x_n for n != m]``. Any number
    of modalities from two on: the condition is the others' vectors side by side, and all ``W`` together hold
    2 M (M - 1) dim² weights. A learned vector stands for an absent modality, as what is modulated and in the condition.

    Args:
        modalities: names, at least two.
        dim: width of each modality's pooled vector and of the result.
        dropout: probability of dropping a feature of the result in training.

    Raises:
        ValueError: fewer than two modalities, or ``dim`` is below 1.
    """

    least = 2

    def __init__(self, modalities: Sequence[str], dim: int, *, dropout: float = 0.0) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        others = dim * (len(self.modalities) - 1)
        self.conditions = nn.ModuleDict({name: nn.Linear(others, 2 * dim) for name in self.modalities})
        self.activation = nn.ReLU()

    def fuse(self, vectors: list[Tensor]) -> Tensor:
        """Fuse vectors [B, dim], one a modality, to [B, dim]."""
        modulated = []
        for place, name in enumerate(self.modalities):
            condition = torch.cat([*vectors[:place], *vectors[place + 1 :]], dim=-1)
            scale, shift = self.conditions[name](condition).chunk(2, dim=-1)
            modulated.append(self.activation((1 + scale) * vectors[place] + shift))
        return torch.stack(modulated).mean(0)
