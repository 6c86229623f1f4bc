"""Fusion by products of all modalities at once: the whole outer product, or a low-rank form of its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.fusion.base import VectorFusion, check_sizes

MAX_PRODUCTS = 2**16
"""Entries of the outer product, each of which has ``dim`` weights: 67 million in a fusion of width 1024."""


class TensorFusion(VectorFusion):
    """Tensor fusion (Zadeh et al. 2017, arXiv 1707.07250): all products of features of different modalities.

    ``ReLU(W vec([y_1, 1] ⊗ ... ⊗ [y_M, 1]) + b)`` with ``y_m = V_m x_m`` of a small width. The ones keep products of
    fewer modalities, down to each alone. There are (width + 1)^M products, at most 65,536: widths of up to 255, 39 and
    15 for two, three and four modalities. A learned vector stands for an absent modality.

    Args:
        modalities: names.
        dim: width of each modality's pooled vector and of the result.
        width: of the vectors whose outer product is made.
        dropout: probability of dropping a feature of the result in training.

    Raises:
        ValueError: there are more than 65,536 products, or a size is below 1.
    """

    def __init__(self, modalities: Sequence[str], dim: int, *, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        check_sizes(modalities, self.least, width=width)
        products = (width + 1) ** len(self.modalities)
        if products > MAX_PRODUCTS:
            raise ValueError(
                f"the outer product of {len(self.modalities)} modalities of width {width} and a one has {products:,} "
                f"entries, more than {MAX_PRODUCTS:,}; lower width, or use low_rank"
            )
        self.narrow = nn.ModuleDict({name: nn.Linear(dim, width) for name in self.modalities})
        self.linear = nn.Linear(products, dim)
        self.activation = nn.ReLU()

    def fuse(self, vectors: list[Tensor]) -> Tensor:
        """Fuse vectors [B, dim], one a modality, to [B, dim]."""
        narrow = [self.narrow[name](x) for name, x in zip(self.modalities, vectors, strict=True)]
        return self.activation(self.linear(outer_product(narrow)))


class LowRankFusion(VectorFusion):
    """Low-rank multimodal fusion (Liu et al. 2018, arXiv 1806.00064): tensor fusion that never makes the tensor.

    ``ReLU(sum_r prod_m (U_rm [x_m, 1]) + b)``, which is tensor fusion of whole vectors with weights
    ``W = sum_r U_r1 ⊗ ... ⊗ U_rM`` for each feature of the result. Its size is linear in the number of modalities. The
    factors of the ones start at 1 or -1, as products of many small numbers would vanish. A learned vector stands for an
    absent modality.

    Args:
        modalities: names.
        dim: width of each modality's pooled vector and of the result.
        rank: how many products are summed.
        dropout: probability of dropping a feature of the result in training.

    Raises:
        ValueError: a size is below 1.
    """

    splits_channels = True

    def __init__(self, modalities: Sequence[str], dim: int, *, rank: int = 4, dropout: float = 0.0) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        check_sizes(modalities, self.least, rank=rank)
        self.rank = rank
        factors = {name: nn.Linear(dim, rank * dim) for name in self.modalities}
        for factor in factors.values():
            nn.init.constant_(factor.bias, 1.0).data.mul_(torch.randint(2, (rank * dim,)) * 2 - 1)
        self.factors = nn.ModuleDict(factors)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.activation = nn.ReLU()

    def fuse(self, vectors: list[Tensor]) -> Tensor:
        """Fuse vectors [B, dim], one a modality, to [B, dim]."""
        product, *others = (self.factors[name](x) for name, x in zip(self.modalities, vectors, strict=True))
        for other in others:
            product = product * other
        return self.activation(product.unflatten(-1, (self.rank, -1)).sum(1) + self.bias)


def outer_product(vectors: Sequence[Tensor]) -> Tensor:
    """All products of one entry of each vector, to which a one is added: [B, D_m] each -> [B, prod(D_m + 1)]."""
    first, *others = (F.pad(vector, (0, 1), value=1.0) for vector in vectors)
    for other in others:
        first = (first[:, :, None] * other[:, None, :]).flatten(1)
    return first
