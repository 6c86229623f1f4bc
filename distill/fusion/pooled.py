"""No fusion: a model of one modality whose heads read its encoder's pooled vector, as image classifiers do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PooledFusion(nn.Module):
    """The pooled vector of the only modality, zero where it is absent.

    Nothing lies between encoder and head: no neck, no projection of embeddings, which are the pooled vector.

    Args:
        modalities: the one.

    Raises:
        ValueError: there are several.
    """

    reads_tokens = False
    plain = True

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__()
        if len(modalities) != 1:
            raise ValueError(f"it reads one modality, and there are {', '.join(modalities)}; use concat")
        (self.modality,) = modalities

    def forward(
        self, tokens: dict[str, Tensor], masks: dict[str, Tensor], pooled: dict[str, Tensor], present: dict[str, Tensor]
    ) -> Tensor:
        """Give the pooled vector.

        Args:
            tokens: not read; may be empty.
            masks: modality -> bool [B, T]; not read.
            pooled: modality -> [B, D].
            present: modality -> bool [B].

        Returns:
            [B, D].
        """
        return torch.where(present[self.modality][:, None], pooled[self.modality], 0.0)
