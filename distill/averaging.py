"""The trained part of a module as named tensors, and its exponential moving average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.sharding import local, split


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """State of a module without its frozen parameters, by name."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


@torch.no_grad()
def load_state(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values, whole or in parts as the module's are, into its state in place."""
    state = module.state_dict()
    for name, value in values.items():
        state[name].copy_(split(value, state[name]))


class Average:
    """Exponential moving average of the trained weights and buffers (Polyak & Juditsky 1992).

    Args:
        module: what to average.
        decay: share kept in each step; early steps use less, ``(1 + step) / (10 + step)``.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        present = trained_state(module)  # the weights themselves, which training changes in place
        self.values = {name: value.clone() for name, value in present.items()}
        pairs = [(self.values[name], value) for name, value in present.items()]
        self._moving = [pair for pair in pairs if pair[1].is_floating_point()]
        self._counting = [pair for pair in pairs if not pair[1].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average toward the module's present weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, present = ([local(pair[side]) for pair in self._moving] for side in (0, 1))
        torch._foreach_lerp_(averages, present, 1 - decay)
        for count, now in self._counting:
            count.copy_(now)

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor]) -> None:
        """Go on from values that were saved, whole or in parts as the module's are."""
        for name, value in values.items():
            self.values[name].copy_(split(value, self.values[name]))

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average into the module for the time of the block."""
        kept = {name: value.detach().clone() for name, value in trained_state(module).items()}
        load_state(module, self.values)
        try:
            yield
        finally:
            load_state(module, kept)
