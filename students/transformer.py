"""A small transformer for texts, trained from scratch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from distill.dropout import Dropout
from distill.exchange import HIDDEN, HIDDEN_MASK, Hidden
from distill.fusion.attention import CrossAttention
from distill.fusion.base import masked_mean
from distill.multimodal import Encoded
from students.sizes import check_sizes
from students.text import TextEncoder, cleared


class Block(nn.Module):
    """Pre-norm self-attention and MLP, both residual: ``x + A(LN x)``, then ``x + MLP(LN x)``."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CrossAttention(dim, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Update x [B, L, D] under mask bool [B, L]."""
        y = self.norm_attention(x)
        x = x + self.dropout(self.attention(y, y, mask))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class SmallTransformer(TextEncoder):
    """A transformer encoder (Vaswani et al. 2017, arXiv 1706.03762) with learned positions and norms before its layers.

    Norms stand where Xiong et al. 2020 (arXiv 2002.04745) put them, and a last one behind the blocks, so that it learns
    from scratch without a long warm-up. Tokens are the last states, zero at padding; the pooled vector is their mean.
    A text without tokens gives zeros.

    Args:
        tokenizer_file: the ``tokenizer.json`` whose ids index the table.
        vocab_size: rows of the table.
        dim: width of the table and of all states: D.
        max_length: tokens a text is cut to, closing token included; there are as many positions.
        depth: number of blocks.
        heads: attention heads; divides ``dim``.
        mlp_ratio: width of an MLP's hidden layer, as a multiple of ``dim``.
        dropout: probability of dropping a feature or an attention weight in training.

    Raises:
        ValueError: ``heads`` does not divide ``dim``, or a size is not positive.
    """

    def __init__(
        self,
        *,
        tokenizer_file: str | Path,
        vocab_size: int,
        dim: int,
        max_length: int = 32,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(tokenizer_file, vocab_size, dim, max_length)
        inner = round(dim * mlp_ratio)
        check_sizes(depth=depth, mlp_ratio=inner)
        self.positions = nn.Embedding(max_length, dim)
        nn.init.normal_(self.positions.weight, std=dim**-0.5)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, inner, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.stage_widths = (dim,) * depth

    def begin(self, inputs: dict[str, Tensor]) -> Hidden:
        """As :meth:`Encoder.begin`; a stage is a block."""
        mask = inputs["text_mask"]
        places = torch.arange(mask.shape[1], device=mask.device)
        return Hidden(self.dropout(self.table(inputs["text"]) + self.positions(places)), mask)

    def advance(self, stage: int, hidden: Hidden) -> Hidden:
        """As :meth:`Encoder.advance`."""
        return hidden._replace(values=self.blocks[stage](*hidden))

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Read ``text`` int64 [B, L] under ``text_mask`` bool [B, L], L at most ``max_length``.

        Returns:
            tokens [B, L, D], the mask, pooled [B, D].
        """
        if HIDDEN in inputs:
            x, mask = inputs[HIDDEN], inputs[HIDDEN_MASK]
        else:
            x, mask = self.begin(inputs)
            for block in self.blocks:
                x = block(x, mask)
        states = cleared(self.norm(x), mask)
        return Encoded(states, mask, self.dropout(masked_mean(states, mask)))
