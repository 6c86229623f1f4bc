"""Bottleneck fusion: modalities exchange what they know through a few shared tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.fusion.attention import CrossBlock, read_out
from distill.fusion.base import TokenFusion, check_sizes, mean_of_modalities


class BottleneckFusion(TokenFusion):
    """Attention bottlenecks (MBT, Nagrani et al. 2021, arXiv 2107.00135), for any number of modalities.

    In each round a modality's own block reads its tokens x_m and the shared tokens b: ``[x_m, b_m] = Block_m([x_m,
    b])``; then ``b = mean_m b_m``. The result is ``GELU(W LayerNorm(mean_m mean(x_m)))``, over all tokens where the
    paper takes a class token each. What one modality writes reaches another in the next round, so there are at least
    two; the last one updates no shared tokens, as nobody would read them. A learned token a modality stays readable
    when the modality is absent.

    Args:
        modalities: names, at least two.
        dim: width of tokens and of the result.
        heads: attention heads; divides ``dim``.
        depth: number of rounds, at least two.
        num_tokens: shared tokens.
        dropout: probability of dropping a feature or an attention weight in training.

    Raises:
        ValueError: fewer than two modalities or rounds, ``heads`` does not divide ``dim``, or a size is below 1.
    """

    least = 2

    def __init__(
        self,
        modalities: Sequence[str],
        dim: int,
        *,
        heads: int = 4,
        depth: int = 2,
        num_tokens: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(modalities, dim, dropout=dropout)
        check_sizes(modalities, self.least, num_tokens=num_tokens)
        if depth < 2:
            raise ValueError(
                f"depth is {depth}, expected at least 2, as shared tokens are read one round after writing"
            )
        self.bottleneck = nn.Parameter(torch.randn(num_tokens, dim) * 0.02)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({m: CrossBlock(dim, heads, dropout) for m in self.modalities}) for _ in range(depth)
        )
        self.out = read_out(dim, dim)

    def fuse(self, states: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        """Fuse states [B, 1 + T, dim] of each modality, under masks bool [B, 1 + T], to [B, dim]."""
        count = len(self.bottleneck)
        shared = self.bottleneck.expand(states[self.modalities[0]].shape[0], -1, -1)
        masks = {name: F.pad(valid[name], (count, 0), value=True) for name in self.modalities}
        *rounds, last = self.blocks
        for block in rounds:
            both = {name: torch.cat([shared, states[name]], dim=1) for name in self.modalities}
            both = {name: block[name](x, x, masks[name]) for name, x in both.items()}  # type: ignore[index]
            shared = torch.stack([x[:, :count] for x in both.values()]).mean(0)
            states = {name: x[:, count:] for name, x in both.items()}
        read = {name: torch.cat([shared, x], dim=1) for name, x in states.items()}
        states = {name: last[name](x, read[name], masks[name]) for name, x in states.items()}  # type: ignore[index]
        return self.out(mean_of_modalities(states, valid))
