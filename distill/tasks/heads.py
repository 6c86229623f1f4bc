"""Heads: from a pooled vector to a task's outputs."""

from __future__ import annotations

from torch import Tensor, nn

from distill.dropout import Dropout


class LinearHead(nn.Module):
    """Dropout and a linear layer.

    Args:
        in_dim: width of the pooled vector.
        num_outputs: K, of classes, labels or numbers.
        dropout: probability of dropping a feature in training.
    """

    reads_tokens = False

    def __init__(self, in_dim: int, num_outputs: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(in_dim, num_outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map [B, D] to logits, or numbers, [B, K]."""
        return self.linear(self.dropout(pooled))
