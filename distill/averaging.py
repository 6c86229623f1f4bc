"""The trained part of a module as named tensors, its exponential moving average, and that average as a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distill.config import EMA, of_teacher
from distill.contracts import Batch, Outputs
from distill.multimodal import evaluating
from distill.rounding import ValueRounding
from distill.sharding import local, split
from distill.tapped import Tapped


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """State of a module without its frozen parameters, by name."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def kept_state(module: nn.Module) -> dict[str, Tensor]:
    """The same without what an objective learns or stores, which is left behind with it."""
    return {name: value for name, value in trained_state(module).items() if not name.startswith("objective.")}


@torch.no_grad()
def load_state(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values, whole or in parts as the module's are, into its state in place."""
    state = module.state_dict()
    for name, value in values.items():
        state[name].copy_(split(value, state[name]))


def statistics(module: nn.Module) -> list[Tensor]:
    """The means and variances that the BatchNorms of a module have gathered, and the ranges of what it rounds."""
    return list(_statistics(module).values())


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    kinds = (nn.modules.batchnorm._BatchNorm, ValueRounding)
    norms = {name: part for name, part in module.named_modules() if isinstance(part, kinds)}
    return {
        f"{name}.{kind}": value
        for name, part in norms.items()
        for kind, value in part.named_buffers(recurse=False)
        if value.is_floating_point()
    }


class Average:
    """Exponential moving average of the trained weights and buffers (Polyak & Juditsky 1992).

    Args:
        module: what to average.
        decay: share kept in each step; early steps use less, ``(1 + step) / (10 + step)``.

    Attributes:
        values: the average, by name.
        statistics: those of ``values`` that are :func:`statistics` of the module.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        present = kept_state(module)  # the weights themselves, which training changes in place
        self.values = {name: value.clone() for name, value in present.items()}
        pairs = [(self.values[name], value) for name, value in present.items()]
        self.statistics = [self.values[name] for name in _statistics(module) if name in self.values]
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
            if name in self.values:  # earlier versions averaged projectors too
                self.values[name].copy_(split(value, self.values[name]))

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average into the module for the time of the block."""
        kept = {name: value.detach().clone() for name, value in kept_state(module).items()}
        load_state(module, self.values)
        try:
            yield
        finally:
            load_state(module, kept)


class MeanTeacher:
    """The average of a model's weights as its teacher (mean teacher: Tarvainen & Valpola 2017, arXiv 1703.01780).

    It reads the model's own batch: the same view, without dropout and with the averaged statistics of BatchNorm. The
    paper gives the teacher a view and noise of its own.

    Args:
        tapped: the model.
        average: of a module that has it as ``model``.
    """

    def __init__(self, tapped: Tapped, average: Average) -> None:
        self._caller, self._average = _Caller(tapped), average

    def __call__(self, batch: Batch) -> Outputs:
        """What the model says with the averaged weights, under names with ``@ema``, without gradients."""
        with evaluating(self._caller.model):
            said: Outputs = functional_call(self._caller, self._average.values, (batch,))
        return as_mean_teacher(said)


def as_mean_teacher(said: Outputs) -> Outputs:
    """A model's outputs under the names that its mean teacher's have."""
    return Outputs(*({of_teacher(name, EMA): value for name, value in part.items()} for part in said))


def join_teachers(first: Outputs | None, second: Outputs) -> Outputs:
    """What two teachers say about the same rows, under names of their own."""
    return second if first is None else Outputs(*(a | b for a, b in zip(first, second, strict=True)))


class _Caller(nn.Module):
    """A tapped model as a module, in which the model has the name that it has in a training."""

    def __init__(self, tapped: Tapped) -> None:
        super().__init__()
        self.model, self._tapped = tapped.model, tapped

    def forward(self, batch: Batch) -> Outputs:
        return self._tapped(batch)
