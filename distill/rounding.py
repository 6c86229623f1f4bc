"""Quantization-aware training: a model that rounds, in training too, where its int8 graph will.

After Jacob et al. 2018, arXiv 1712.05877.
Weights are rounded to 8 bits on their way into a layer (symmetric, one scale an output channel), values to 8 bits
between layers (asymmetric, one scale a tensor), looked-up rows of embedding tables to 8 bits with a scale each.
Gradients pass as if nothing was rounded, but for values outside their range, which get none. BatchNorm needs no
folding: it multiplies a channel by a factor, and the rounding of a channel with a scale of its own is the same
before and after that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from distill.runs import read_json, write_json

LOWEST, HIGHEST = 0, 255
"""What values are rounded to."""
MOST = 127
"""Weights are rounded to -MOST..MOST."""
SETTLED = 0.8
"""Share of all steps behind which ranges and statistics of BatchNorm stay (Krishnamoorthi 2018, arXiv 1806.08342)."""
MOMENTUM = 0.01
"""How far a batch moves a range."""
NAME = "rounding"
"""The submodule of a model that holds its ranges."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Place:
    """A value of a model that its int8 graph rounds.

    Attributes:
        tensor: its name in the graph.
        at: where the model has it: "output" or "input" of modules, the first of each.
        modules: their paths; of outputs one.
        low: the least number that is not cut off; at most 0.
        high: the largest; at least 0.
    """

    tensor: str
    at: str
    modules: list[str]
    low: float
    high: float


@dataclass(frozen=True)
class Plan:
    """All that is rounded in a model.

    Attributes:
        weights: paths of layers.
        tables: paths of embedding tables.
        values: the values.
        missed: names in the graph of what is rounded there and was not found in the model: it is rounded after
            training alone.
    """

    weights: list[str]
    tables: list[str]
    values: list[Place]
    missed: list[str]

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        write_json(file, asdict(self))

    @staticmethod
    def load(file: Path) -> Plan:
        """Read what :meth:`save` wrote."""
        found = read_json(file)
        return Plan(**{**found, "values": [Place(**place) for place in found["values"]]})


class ValueRounding(nn.Module):
    """Rounds values within a range that follows what it sees in training.

    Args:
        low: the least number that is not cut off; at most 0.
        high: the largest; at least 0.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(float(low)))
        self.register_buffer("high", torch.tensor(float(high)))
        self.settled = False

    def forward(self, x: Tensor, follow: bool = True) -> Tensor:
        """Return values of the same shape and type; ``follow`` lets them move the range in training."""
        if self.training and follow and not self.settled and x.numel():
            with torch.no_grad():
                least, largest = torch.aminmax(x.detach().float())
                self.low.lerp_(least.clamp(max=0), MOMENTUM)
                self.high.lerp_(largest.clamp(min=0), MOMENTUM)
        scale, zero = self.grid()
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, LOWEST, HIGHEST).to(x.dtype)

    def grid(self) -> tuple[Tensor, Tensor]:
        """The distance of two numbers that are left, and which integer stands for 0, as onnxruntime computes them."""
        span = (self.high.double() - self.low.double()) / (HIGHEST - LOWEST)
        scale = torch.where(span < torch.finfo(torch.float32).tiny, 1.0, span)
        zero = torch.round(LOWEST - self.low.double() / scale)
        return scale.float(), zero.to(torch.int32)

    def range(self) -> Range:
        """The least and the largest number that is left."""
        scale, zero = (float(value) for value in self.grid())
        return (LOWEST - zero) * scale, (HIGHEST - zero) * scale


class WeightRounding(nn.Module):
    """Rounds a weight [N, ...] whose N output channels have a scale each."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return a weight of the same shape."""
        largest = weight.detach().flatten(1).abs().amax(dim=1).float()
        scale = torch.where(largest / MOST < torch.finfo(torch.float32).tiny, 1.0, largest / MOST)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -MOST, MOST).to(weight.dtype)


def rounded_rows(rows: Tensor) -> Tensor:
    """Round rows [..., D] of an embedding table as :mod:`distill.quantization.tables` does; gradients pass."""
    with torch.no_grad():
        exact = rows.double().abs().amax(dim=-1, keepdim=True) / MOST
        scales = exact.half()
        above = (scales.view(torch.int16) + 1).view(torch.float16)
        scales = torch.where(scales.double() < exact, above, scales).float()
        rounded = torch.round(rows / torch.where(scales == 0, 1.0, scales)) * scales
        change = rounded - rows
    return rows + change


class Rounding(nn.Module):
    """What a model rounds: the submodule of which :func:`round_inside` makes it.

    Args:
        plan: what that is.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.values = nn.ModuleList(ValueRounding(place.low, place.high) for place in plan.values)
        self.plan = plan
        self.handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Read and change what the modules of a model take and give, and nothing else any more."""
        self.detach()
        for path in self.plan.tables:
            hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: rounded_rows(output))
            self.handles.append(hook)
        for place, value in zip(self.plan.values, self.values, strict=True):
            for number, path in enumerate(place.modules):
                module = model.get_submodule(path)
                if place.at == "output":
                    handle = module.register_forward_hook(partial(_of_output, value))
                else:
                    handle = module.register_forward_pre_hook(partial(_of_input, value, number == 0))
                self.handles.append(handle)

    def detach(self) -> None:
        """Leave the values of the model alone."""
        while self.handles:
            self.handles.pop().remove()

    def advance(self, model: nn.Module, step: int, total: int) -> None:
        """Begin a training step, from 0, of all."""
        settled = step >= SETTLED * total
        for value in self.values:
            value.settled = settled  # type: ignore[assignment]
        for part in model.modules() if settled else ():
            if isinstance(part, _BatchNorm):
                part.eval()

    def ranges(self) -> dict[str, Range]:
        """Name of a value in the graph -> the least and the largest number that is left."""
        values: list[Any] = list(self.values)
        return {place.tensor: value.range() for place, value in zip(self.plan.values, values, strict=True)}


def round_inside(model: nn.Module, plan: Plan) -> Rounding:
    """Let a model round what its int8 graph rounds, in place; its outputs and modes are what they were but for that.

    Args:
        model: any.
        plan: made for a model of the same architecture.

    Returns:
        What is now the model's submodule ``rounding``.
    """
    rounding = Rounding(plan)
    for path in plan.weights:
        parametrize.register_parametrization(model.get_submodule(path), "weight", WeightRounding())
    rounding.attach(model)
    model.add_module(NAME, rounding)
    return rounding


def without_rounding(model: nn.Module) -> dict[str, Range]:
    """Take away again what :func:`round_inside` added, in place; weights stay as they were rounded.

    Returns:
        The ranges by name of the value in the graph.
    """
    rounding = rounding_of(model)
    assert rounding is not None
    rounding.detach()
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    delattr(model, NAME)
    return rounding.ranges()


def rounding_of(model: nn.Module) -> Rounding | None:
    """What a model rounds, if it does."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, Rounding) else None


def advance(model: nn.Module, step: int, total: int) -> None:
    """Begin a training step, from 0, of all, if the model rounds."""
    rounding = rounding_of(model)
    if rounding is not None:
        rounding.advance(model, step, total)


def attach_again(model: nn.Module) -> None:
    """Let a model of which modules were exchanged for others go on rounding, if it does."""
    rounding = rounding_of(model)
    if rounding is not None:
        rounding.attach(model)


def _of_output(value: nn.Module, module: nn.Module, args: Any, output: Any) -> Any:
    return value(output, follow=module.training)


def _of_input(value: nn.Module, first: bool, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (value(args[0], follow=first and module.training), *args[1:])
