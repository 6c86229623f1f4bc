"""Late fusion of pooled vectors by concatenation and a small MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.dropout import Dropout


class ConcatFusion(nn.Module):
    """Concatenate the pooled vectors, absent ones replaced by a learned vector, then one hidden layer.

    Args:
        modalities: names, in the order of concatenation.
        dim: width of each modality's pooled vector and of the result.
        dropout: probability of dropping a feature in training.
    """

    reads_tokens = False
    plain = False

    def __init__(self, modalities: Sequence[str], dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.missing = nn.ParameterDict({name: nn.Parameter(torch.zeros(dim)) for name in self.modalities})
        self.linear = nn.Linear(dim * len(self.modalities), dim)
        self.activation = nn.ReLU()
        self.dropout = Dropout(dropout)

    def forward(
        self, tokens: dict[str, Tensor], masks: dict[str, Tensor], pooled: dict[str, Tensor], present: dict[str, Tensor]
    ) -> Tensor:
        """Fuse one vector a modality.

        Args:
            tokens: not read; may be empty.
            masks: modality -> bool [B, T]; not read.
            pooled: modality -> [B, dim].
            present: modality -> bool [B].

        Returns:
            [B, dim].
        """
        parts = [torch.where(present[m][:, None], pooled[m], self.missing[m]) for m in self.modalities]
        return self.dropout(self.activation(self.linear(torch.cat(parts, dim=-1))))
