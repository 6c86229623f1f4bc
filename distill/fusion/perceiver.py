"""Perceiver fusion: a few learned latents read the tokens of all modalities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.fusion.attention import CrossBlock, read_out
from distill.fusion.base import TokenFusion, check_sizes


class PerceiverFusion(TokenFusion):
    """A resampler with learned latents (Perceiver, Jaegle et al. 2021, arXiv 2103.03206).

    Latents z read all tokens, each with its modality's learned embedding, and themselves, as in Flamingo (Alayrac et
    al. 2022, arXiv 2204.14198): ``z = Block(z, context=[z, x_1, ..., x_M])`` in each round, and the result is
    ``GELU(W LayerNorm(mean(z)))``. The cost is linear in the number of tokens. A learned token a modality stays
    readable when the modality is absent.

    Args:
        modalities: names.
        dim: width of tokens and of the result.
        heads: attention heads; divides ``dim``.
        depth: number of rounds.
        num_latents: learned latents.
        dropout: probability of dropping a feature or an attention weight in training.

    Raises:
        ValueError: ``heads`` does not divide ``dim``, or a size is below 1.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        dim: int,
        *,
        heads: int = 4,
        depth: int = 2,
        num_latents: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        check_sizes(modalities, self.least, depth=depth, num_latents=num_latents)
        self.embeddings = nn.ParameterDict({m: nn.Parameter(torch.randn(dim) * 0.02) for m in self.modalities})
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * 0.02)
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, dropout) for _ in range(depth))
        self.out = read_out(dim, dim)

    def fuse(self, states: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        """Fuse states [B, 1 + T, dim] of each modality, under masks bool [B, 1 + T], to [B, dim]."""
        merged = torch.cat([states[m] + self.embeddings[m] for m in self.modalities], dim=1)
        mask = torch.cat([valid[m] for m in self.modalities], dim=1)
        mask = F.pad(mask, (len(self.latents), 0), value=True)
        latents = self.latents.repeat(merged.shape[0], 1, 1)  # no view: the FLOP counter fails on parameters'
        for block in self.blocks:
            latents = block(latents, torch.cat([latents, merged], dim=1), mask)
        return self.out(latents.mean(1))
