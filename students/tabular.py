"""A small encoder for tables: numbers and embedded categories through a residual MLP."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from distill.dropout import Dropout
from distill.multimodal import Encoded, Encoder
from students.sizes import check_sizes


class TabularMLP(Encoder):
    """The residual MLP of Gorishniy et al. 2021 (arXiv 2106.11959), "ResNet" there, over a row's columns.

    ``x = W [numbers, flags of missing ones, embeddings of codes]``, blocks ``x + W2 ReLU(W1 LayerNorm(x))``, and the
    pooled vector is ``ReLU(LayerNorm(x))``. The paper has BatchNorm; LayerNorm also learns from one row. Embeddings of
    all categories are one table, in which those of column k begin at row ``k * code_size``.

    Args:
        num_numbers: N of the data.
        num_codes: K of the data.
        code_size: codes that a category may have, 0 for missing or unknown ones included.
        dim: D, width of the blocks and of the result.
        depth: number of blocks.
        hidden: width inside of blocks; 2 D where None.
        code_dim: width of the embedding of a code.
        tokens: "pooled" gives the pooled vector as the only token. "columns" gives N + K tokens, one a column, by the
            paper's feature tokenizer, for fusions that read tokens: ``w_j x_j + m_j missing_j + b_j`` of a number and
            ``V e + b_j`` of a code's embedding e.
        dropout: probability of dropping a feature in training, inside of blocks and of the pooled vector.

    Raises:
        ValueError: there is no column, a size is below 1, or another kind of tokens.
    """

    reads = "tabular"

    def __init__(
        self,
        *,
        num_numbers: int,
        num_codes: int,
        code_size: int,
        dim: int,
        depth: int = 2,
        hidden: int | None = None,
        code_dim: int = 8,
        tokens: Literal["pooled", "columns"] = "pooled",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        check_sizes(dim=dim, depth=depth, hidden=hidden, code_dim=code_dim)
        if min(num_numbers, num_codes) < 0 or num_numbers + num_codes < 1:
            raise ValueError(f"num_numbers is {num_numbers} and num_codes {num_codes}; a table has at least one column")
        if tokens not in ("pooled", "columns"):
            raise ValueError(f"tokens is {tokens!r}; expected pooled or columns")
        self.num_numbers = num_numbers
        self.codes = CodeTable(num_codes, code_size, code_dim) if num_codes else None
        self.stem = nn.Sequential(nn.Linear(2 * num_numbers + num_codes * code_dim, dim))
        self.blocks = nn.Sequential(*(ResidualMLP(dim, hidden, dropout) for _ in range(depth)))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.ReLU())
        self.columns = ColumnTokens(num_numbers, num_codes, code_dim, dim) if tokens == "columns" else None
        self.stem.splits_channels = tokens == "columns"  # type: ignore[assignment]  # tokens are as wide as it
        self.dropout = Dropout(dropout)
        self.out_dim = dim

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``tabular`` float32 [B, 2 N + K]; tokens [B, 1, D] or [B, N + K, D]."""
        table = inputs["tabular"]
        plain = table[:, : 2 * self.num_numbers]
        codes = self.codes(table[:, 2 * self.num_numbers :]) if self.codes is not None else None
        read = plain if codes is None else torch.cat([plain, codes.flatten(1)], dim=1)
        pooled = self.dropout(self.out(self.blocks(self.stem(read))))
        tokens = pooled[:, None] if self.columns is None else self.columns(plain, codes)
        return Encoded(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), pooled)


class ResidualMLP(nn.Module):
    """``x + W2 ReLU(W1 LayerNorm(x))``."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, D] to the same shape."""
        return x + self.layers(x)


class CodeTable(nn.Module):
    """Embeddings of the codes of all categories in one table; a code that is none of them is read as 0, unknown."""

    starts: Tensor

    def __init__(self, num_codes: int, code_size: int, dim: int) -> None:
        super().__init__()
        check_sizes(code_size=code_size)
        self.code_size = code_size
        self.table = nn.Embedding(num_codes * code_size, dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        self.register_buffer("starts", torch.arange(num_codes) * code_size, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Look up whole numbers float32 [B, K]: [B, K, dim]."""
        known = (codes >= 0) & (codes < self.code_size)
        return self.table(torch.where(known, codes, 0.0).to(torch.int64) + self.starts)


class ColumnTokens(nn.Module):
    """A token for each column: the feature tokenizer of Gorishniy et al. 2021 (arXiv 2106.11959), section 3.3."""

    splits_channels = True

    def __init__(self, num_numbers: int, num_codes: int, code_dim: int, dim: int) -> None:
        super().__init__()
        self.weight, self.missing = (nn.Parameter(torch.randn(num_numbers, dim) * dim**-0.5) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(num_numbers + num_codes, dim) * dim**-0.5)
        self.project = nn.Linear(code_dim, dim, bias=False)

    def forward(self, plain: Tensor, codes: Tensor | None) -> Tensor:
        """Make tokens [B, N + K, D] of numbers and flags [B, 2 N] and of embedded codes [B, K, code_dim], if any."""
        numbers, flags = plain[..., None].chunk(2, dim=1)
        tokens = numbers * self.weight + flags * self.missing
        return (tokens if codes is None else torch.cat([tokens, self.project(codes)], dim=1)) + self.bias
