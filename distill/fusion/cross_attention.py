"""Cross-attention fusion: each modality's tokens attend to the tokens of all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.fusion.attention import CrossBlock, read_out
from distill.fusion.base import TokenFusion, check_sizes, masked_mean


class CrossAttentionFusion(TokenFusion):
    """Each modality's tokens attend to the others' (ViLBERT's co-attention, Lu et al. 2019, arXiv 1908.02265).

    For any number of modalities, each round gives ``x_m = Block_m(x_m, context=[x_n for n != m])``, and the result is
    ``GELU(W LayerNorm([mean(x_1), ..., mean(x_M)]))``. A learned token a modality stays readable when the modality is
    absent, so any subset of modalities works.

    Args:
        modalities: names, at least two.
        dim: width of tokens and of the result.
        heads: attention heads; divides ``dim``.
        depth: number of rounds.
        dropout: probability of dropping a feature or an attention weight in training.

    Raises:
        ValueError: fewer than two modalities, or ``heads`` does not divide ``dim``.
    """

    least = 2
    joins_tokens = True

    def __init__(
        self, modalities: Sequence[str], dim: int, *, heads: int = 4, depth: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        check_sizes(modalities, self.least, depth=depth)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({m: CrossBlock(dim, heads, dropout) for m in self.modalities}) for _ in range(depth)
        )
        self.out = read_out(dim * len(self.modalities), dim)

    def fuse(self, states: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        """Fuse states [B, 1 + T, dim] of each modality, under masks bool [B, 1 + T], to [B, dim]."""
        for block in self.blocks:
            states = {name: self._attend(block, name, states, valid) for name in self.modalities}
        means = [masked_mean(states[name], valid[name]) for name in self.modalities]
        return self.out(torch.cat(means, dim=-1))

    def _attend(self, block: nn.Module, name: str, states: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        others = [m for m in self.modalities if m != name]
        context = torch.cat([states[m] for m in others], dim=1)
        mask = torch.cat([valid[m] for m in others], dim=1)
        return block[name](states[name], context, mask)  # type: ignore[index]
