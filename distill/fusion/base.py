"""What fusion blocks have in common: learned stand-ins for absent modalities, and means over tokens that are there.

What an absent modality holds is replaced before anything reads it, so that not even NaN gets through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.dropout import Dropout


class VectorFusion(nn.Module):
    """Base of blocks that read one vector a modality, which is a learned one where the modality is absent.

    Args:
        modalities: names, in the order in which they are read.
        dim: width of each modality's pooled vector and of the result.
        dropout: probability of dropping a feature of the result in training.

    Raises:
        ValueError: fewer than ``least`` modalities, or a size below 1.
    """

    reads_tokens = False
    plain = False
    least = 1

    def __init__(self, modalities: Sequence[str], dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_sizes(modalities, self.least, dim=dim)
        self.modalities = tuple(modalities)
        self.missing = nn.ParameterDict({name: nn.Parameter(torch.zeros(dim)) for name in self.modalities})
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
        vectors = [torch.where(present[m][:, None], pooled[m], self.missing[m]) for m in self.modalities]
        return self.dropout(self.fuse(vectors))

    def fuse(self, vectors: list[Tensor]) -> Tensor:
        """Fuse vectors [B, dim], one a modality, to [B, dim]."""
        raise NotImplementedError


class TokenFusion(nn.Module):
    """Base of blocks that read tokens; a learned token a modality stays readable when the modality is absent.

    Args:
        modalities: names.
        dim: width of tokens and of the result.
        dropout: probability of dropping a feature of the result in training.

    Attributes:
        joins_tokens: blocks read the tokens of several modalities in one row, so that pruning leaves their width.

    Raises:
        ValueError: fewer than ``least`` modalities, or a size below 1.
    """

    reads_tokens = True
    plain = False
    joins_tokens = False
    least = 1

    def __init__(self, modalities: Sequence[str], dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_sizes(modalities, self.least, dim=dim)
        self.modalities = tuple(modalities)
        self.missing = nn.ParameterDict({m: nn.Parameter(torch.randn(dim) * 0.02) for m in self.modalities})
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
            there = masks[name] & present[name][:, None]
            missing = self.missing[name].expand(tokens[name].shape[0], 1, -1)
            states[name] = torch.cat([missing, torch.where(there[..., None], tokens[name], 0.0)], dim=1)
            valid[name] = F.pad(there, (1, 0), value=True)
        return self.dropout(self.fuse(states, valid))

    def fuse(self, states: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        """Fuse states [B, 1 + T, dim], the learned token first, under masks bool [B, 1 + T], to [B, dim]."""
        raise NotImplementedError


def masked_mean(states: Tensor, valid: Tensor) -> Tensor:
    """The mean of tokens [B, T, D] that bool [B, T] says are there: [B, D]."""
    weights = valid.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def mean_of_modalities(states: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> Tensor:
    """The mean of :func:`masked_mean` over modalities, so that one of many tokens counts no more than others."""
    return torch.stack([masked_mean(states[name], valid[name]) for name in states]).mean(0)


def check_sizes(modalities: Sequence[str], least: int, **sizes: int) -> None:
    """Check how many modalities there are, and that sizes are positive.

    Raises:
        ValueError: too few, or a size below 1.
    """
    if len(modalities) < least:
        raise ValueError(f"it needs at least two modalities, got {', '.join(modalities)}; use concat")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected at least 1")
