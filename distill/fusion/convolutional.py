"""Convolutional fusion: a 1-D convolution over the stack of modality vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.fusion.base import VectorFusion, check_sizes


class ConvolutionalFusion(VectorFusion):
    """A 1-D convolution over modalities, features being channels (after Feichtenhofer et al. 2016, arXiv 1604.06573).

    ``mean_m ReLU(b + sum_k W_k x_{m+k})`` with k from -(kernel // 2) to kernel // 2, zeros beyond the ends. The filters
    are shared over places, so parameters do not grow with the number of modalities, ``kernel`` neighbours in their
    order mix, and the order matters. A learned vector stands for an absent modality.

    Args:
        modalities: names, in the order of the stack.
        dim: width of each modality's pooled vector and of the result.
        kernel: how many neighbouring modalities a filter reads, itself included; odd.
        dropout: probability of dropping a feature of the result in training.

    Raises:
        ValueError: ``kernel`` is even, or a size is below 1.
    """

    def __init__(self, modalities: Sequence[str], dim: int, *, kernel: int = 3, dropout: float = 0.0) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        check_sizes(modalities, self.least, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}, expected an odd number, whose middle is a modality")
        self.convolution = nn.Conv1d(dim, dim, kernel, padding=kernel // 2)
        self.activation = nn.ReLU()

    def fuse(self, vectors: list[Tensor]) -> Tensor:
        """Fuse vectors [B, dim], one a modality, to [B, dim]."""
        return self.activation(self.convolution(torch.stack(vectors, dim=-1))).mean(-1)
