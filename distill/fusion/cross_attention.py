"""Attention fusion: each modality's tokens attend to the tokens of all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.dropout import Dropout


class CrossAttention(nn.Module):
    """Multi-head attention of queries over a masked context, with separate q, k, v and o projections.

    Separate linear layers, unlike ``nn.MultiheadAttention``'s packed one, lower to int8 on every runtime.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Attend: queries [B, T, D], context [B, S, D], mask bool [B, S] (True = may be read) -> [B, T, D]."""
        q, k, v = (self._split(layer(x)) for layer, x in ((self.q, queries), (self.k, context), (self.v, context)))
        bias = (~mask).to(q.dtype)[:, None, None, :] * -1e4
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP, both residual."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_query, self.norm_context, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = CrossAttention(dim, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), Dropout(dropout), nn.Linear(2 * dim, dim), Dropout(dropout)
        )

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Update x [B, T, D] from context [B, S, D] under mask bool [B, S]."""
        x = x + self.attention(self.norm_query(x), self.norm_context(context), mask)
        return x + self.mlp(self.norm_mlp(x))


class CrossAttentionFusion(nn.Module):
    """Each modality's tokens attend to the others' (ViLBERT-style co-attention, Lu et al. 2019, arXiv 1908.02265).

    A learned token a modality stays readable when the modality is absent, so any subset of modalities works.

    Args:
        modalities: names, at least two.
        dim: width of tokens and of the result.
        heads: attention heads; divides ``dim``.
        depth: number of rounds.
        dropout: probability of dropping a feature or an attention weight in training.

    Raises:
        ValueError: fewer than two modalities, or ``heads`` does not divide ``dim``.
    """

    reads_tokens = True
    plain = False

    def __init__(
        self, modalities: Sequence[str], dim: int, *, heads: int = 4, depth: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"cross-attention needs at least two modalities, got {list(modalities)}; use concat")
        if dim % heads:
            raise ValueError(f"heads {heads} does not divide dim {dim}")
        self.modalities = tuple(modalities)
        self.missing = nn.ParameterDict({m: nn.Parameter(torch.randn(dim) * 0.02) for m in self.modalities})
        self.blocks = nn.ModuleList(
            nn.ModuleDict({m: CrossBlock(dim, heads, dropout) for m in self.modalities}) for _ in range(depth)
        )
        self.out = nn.Sequential(
            nn.LayerNorm(dim * len(self.modalities)), nn.Linear(dim * len(self.modalities), dim), nn.GELU()
        )
        self.dropout = Dropout(dropout)

    def forward(
        self, tokens: dict[str, Tensor], masks: dict[str, Tensor], pooled: dict[str, Tensor], present: dict[str, Tensor]
    ) -> Tensor:
        """Fuse the tokens of all modalities.

        Args:
            tokens: modality -> [B, T, dim].
            masks: modality -> bool [B, T], True where there is a token.
            pooled: modality -> [B, dim]; not read.
            present: modality -> bool [B].

        Returns:
            [B, dim].
        """
        states, valid = {}, {}
        for name in self.modalities:
            batch = tokens[name].shape[0]
            missing = self.missing[name].expand(batch, 1, -1)
            states[name] = torch.cat([missing, tokens[name]], dim=1)
            valid[name] = F.pad(masks[name] & present[name][:, None], (1, 0), value=True)
        for block in self.blocks:
            states = {name: self._attend(block, name, states, valid) for name in self.modalities}
        means = [_masked_mean(states[name], valid[name]) for name in self.modalities]
        return self.dropout(self.out(torch.cat(means, dim=-1)))

    def _attend(self, block: nn.Module, name: str, states: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        others = [m for m in self.modalities if m != name]
        context = torch.cat([states[m] for m in others], dim=1)
        mask = torch.cat([valid[m] for m in others], dim=1)
        return block[name](states[name], context, mask)  # type: ignore[index]


def _masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
