"""Masked multi-head attention, which the fusion blocks that read tokens share."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from distill.dropout import Dropout


class CrossAttention(nn.Module):
    """Multi-head attention of queries over a masked context, with separate q, k, v and o projections.

    Separate linear layers, unlike ``nn.MultiheadAttention``'s packed one, lower to int8 on every runtime.

    Raises:
        ValueError: ``heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads {heads} does not divide dim {dim}")
        self.heads, self.dropout, self.scale = heads, dropout, 1 / math.sqrt(dim // heads)  # pruning keeps the scale
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Attend: queries [B, T, D], context [B, S, D], mask bool [B, S] (True = may be read) -> [B, T, D]."""
        bias = (~mask).to(queries.dtype)[:, None, None, :] * -1e4
        return self.attend(queries, *self.remember(context), bias)

    def remember(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a context [B, S, D], each [B, heads, S, D / heads]."""
        return self._split(self.k(context)), self._split(self.v(context))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attend: queries [B, T, D] to keys and values [B, heads, S, D / heads], whose scores get a bias -> [B, T, D].

        The bias is 0 where a key may be read and very negative elsewhere, of any shape that broadcasts to [B, heads,
        T, S].
        """
        dropout = self.dropout if self.training else 0.0
        q = self._split(self.q(queries))
        bias = bias.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, dropout_p=dropout, scale=self.scale)
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


def read_out(in_dim: int, dim: int) -> nn.Sequential:
    """Normalise, project and activate what attention gave: [..., in_dim] to [..., dim]."""
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim), nn.GELU())
