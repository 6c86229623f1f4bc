"""What encoders tell each other between their stages: modalities that meet in the middle, at several depths.

A stage's output is squeezed to one vector a row, so encoders of any shape can exchange, and the rows of each are those
that have its modality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.builders import build_part, check_part
from distill.config import ModelConfig
from distill.contracts import UserError
from distill.fusion.base import masked_mean

HIDDEN, HIDDEN_MASK = "hidden", "hidden_mask"
"""Inputs under which an encoder is given what its last stage made, to go on from there."""


class Hidden(NamedTuple):
    """What is between two stages of an encoder.

    Attributes:
        values: a map [B, C, H, T], or tokens [B, T, C].
        mask: bool [B, T], True where there is something; of all columns of a map where it has no end.
    """

    values: Tensor
    mask: Tensor

    @classmethod
    def of_map(cls, values: Tensor) -> Hidden:
        """A map [B, C, H, W] that is there as a whole."""
        return cls(values, torch.ones(values.shape[0], values.shape[3], dtype=torch.bool, device=values.device))


def squeezed(hidden: Hidden) -> Tensor:
    """The mean over the positions that are there: [B, C]."""
    values = hidden.values
    return masked_mean(values.mean(2).transpose(1, 2) if values.ndim == 4 else values, hidden.mask)


def excited(hidden: Hidden, gates: Tensor) -> Hidden:
    """The same with each channel times its gate, [B, C]."""
    gates = gates.to(hidden.values.dtype)
    own = gates[:, :, None, None] if hidden.values.ndim == 4 else gates[:, None]
    return hidden._replace(values=hidden.values * own)


class Exchange(nn.Module):
    """Base of exchanges: gates for the channels of every modality from what all of them have at one depth.

    Attributes:
        at: behind which stages, counted from 1, in rising order.
    """

    at: tuple[int, ...]

    def forward(self, number: int, told: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return gates [B, C] of the modalities that have been told.

        Args:
            number: of the exchange, counted from 0.
            told: modality -> [B, C], what :func:`squeezed` gives; without those that no row has.
            present: modality -> bool [B], of all.
        """
        raise NotImplementedError


class MMTM(Exchange):
    """The multimodal transfer module (MMTM: Joze et al. 2020, arXiv 1911.08670), at several depths.

    ``z = ReLU(W [s_1, ..., s_M])`` of the squeezed stages ``s_m = mean over positions``, and the channels of each
    modality are multiplied with ``2 sigmoid(V_m z)``. z is as wide as all s together, divided by ``ratio``; the paper
    has 4. V begins at zero, so the encoders begin as they are without exchange. A learned vector stands for an absent
    modality, and begins at zero too.

    Args:
        stages: modality -> channels behind each of its stages.
        at: behind which stages they exchange, counted from 1, in rising order.
        ratio: how much narrower z is.

    Raises:
        ValueError: there is no such stage, none is named, they do not rise, or ``ratio`` is below 1.
    """

    def __init__(self, stages: Mapping[str, Sequence[int]], at: Sequence[int], *, ratio: int = 4) -> None:
        super().__init__()
        if not at or at[0] < 1 or any(later <= earlier for earlier, later in pairwise(at)):
            raise ValueError(f"at is {list(at)}, expected one or more rising numbers of stages from 1 on")
        for name, widths in stages.items():
            if at[-1] > len(widths):
                raise ValueError(
                    f"at is {list(at)}, and {name} has {len(widths)} stages; name none beyond, or add some"
                )
        if ratio < 1:
            raise ValueError(f"ratio is {ratio}, expected at least 1")
        self.at, self.modalities = tuple(at), tuple(stages)
        depths = [{name: widths[stage - 1] for name, widths in stages.items()} for stage in at]
        joined = [sum(widths.values()) for widths in depths]
        inner = [max(1, width // ratio) for width in joined]
        self.joints = nn.ModuleList(
            nn.Sequential(nn.Linear(*sizes), nn.ReLU()) for sizes in zip(joined, inner, strict=True)
        )
        self.gates = nn.ModuleList(
            nn.ModuleDict({name: _silent(width, wide) for name, wide in widths.items()})
            for width, widths in zip(inner, depths, strict=True)
        )
        self.missing = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name, width in widths.items()})
            for widths in depths
        )

    def forward(self, number: int, told: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`Exchange.forward`."""
        missing: Any = self.missing[number]
        gates: Any = self.gates[number]
        vectors = []
        for name in self.modalities:
            there = present[name][:, None]
            vectors.append(torch.where(there, told.get(name, missing[name]), missing[name]))
        joint = self.joints[number](torch.cat(vectors, dim=1))
        return {name: 2 * gates[name](joint).sigmoid() for name in told}


def _silent(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear layer that gives zeros at first."""
    linear = nn.Linear(in_dim, out_dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


EXCHANGES: dict[str, type[Exchange]] = {"mmtm": MMTM}


def check_exchange(config: ModelConfig, encoders: Mapping[str, Callable[..., Any]], where: str) -> None:
    """Check that a model's encoders can exchange what a recipe asks for, as far as its config tells.

    Args:
        config: the model.
        encoders: encoder type -> class.
        where: dotted path of the model in the recipe.

    Raises:
        UserError: an unknown exchange, one encoder alone or one without stages, or several members.
    """
    if config.exchange is None:
        return
    place = f"{where}.exchange"
    check_part(EXCHANGES, config.exchange, place, ("stages",))
    if len(config.encoders) < 2:
        raise UserError(f"{place}: there is one encoder, {min(config.encoders)!r}, and nobody to tell; leave it out")
    for name, part in config.encoders.items():
        if not has_stages(encoders[part.type]):
            able = [kind for kind, builder in encoders.items() if has_stages(builder) and builder.reads == name]  # type: ignore[attr-defined]
            raise UserError(
                f"{place}: {part.type}, which reads {name}, cannot stop between stages; use "
                f"{' or '.join(able) or 'another modality'}, or leave the exchange out"
            )
    if getattr(config, "members", 1) > 1:
        raise UserError(
            f"{place}: members of an ensemble share encoders, and each drops other modalities; set {where}.members to 1"
        )


def has_stages(builder: Any) -> bool:
    """Whether encoders of a class can stop between their stages."""
    return "begin" in vars(builder)


def build_exchange(config: ModelConfig, encoders: Mapping[str, Any], where: str) -> Exchange | None:
    """Build the exchange of a model's encoders, if it has one.

    Raises:
        UserError: the builder refuses a value, such as a stage that an encoder lacks.
    """
    if config.exchange is None:
        return None
    stages = {name: encoder.stage_widths for name, encoder in encoders.items()}
    exchange: Exchange = build_part(EXCHANGES, config.exchange, f"{where}.exchange", stages=stages)
    return exchange
