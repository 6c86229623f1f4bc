"""Self-attention fusion: the tokens of all modalities in one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.fusion.attention import CrossBlock, read_out
from distill.fusion.base import TokenFusion, check_sizes, mean_of_modalities


class SelfAttentionFusion(TokenFusion):
    """A transformer over the merged tokens of all modalities (as in ViLT, Kim et al. 2021, arXiv 2102.03334).

    Each token gets its modality's learned embedding; ``x = Block(x, context=x)`` in each round, and the result is
    ``GELU(W LayerNorm(mean_m mean(x of modality m)))``. A learned token a modality stays readable when the modality is
    absent. The cost grows with the square of the number of tokens: bottleneck and perceiver bound it.

    Args:
        modalities: names.
        dim: width of tokens and of the result.
        heads: attention heads; divides ``dim``.
        depth: number of rounds.
        dropout: probability of dropping a feature or an attention weight in training.

    Raises:
        ValueError: ``heads`` does not divide ``dim``, or a size is below 1.
    """

    joins_tokens = True

    def __init__(
        self, modalities: Sequence[str], dim: int, *, heads: int = 4, depth: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        check_sizes(modalities, self.least, depth=depth)
        self.embeddings = nn.ParameterDict({m: nn.Parameter(torch.randn(dim) * 0.02) for m in self.modalities})
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, dropout) for _ in range(depth))
        self.out = read_out(dim, dim)

    def fuse(self, states: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        """Fuse states [B, 1 + T, dim] of each modality, under masks bool [B, 1 + T], to [B, dim]."""
        merged = torch.cat([states[m] + self.embeddings[m] for m in self.modalities], dim=1)
        mask = torch.cat([valid[m] for m in self.modalities], dim=1)
        for block in self.blocks:
            merged = block(merged, merged, mask)
        parts = merged.split([states[m].shape[1] for m in self.modalities], dim=1)
        return self.out(mean_of_modalities(dict(zip(self.modalities, parts, strict=True)), valid))
