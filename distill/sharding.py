"""A model in parts: weights, gradients and optimizer state are split over the ranks (FSDP2; Zhao et al. 2023).

Each tensor is split along its first dimension (torch's ``fully_shard``; arXiv 2304.11277), and whole only while the
forward or backward pass of its unit runs. Collectives need every rank to run the same units in the same order. So it
is: an encoder runs on each rank, on blank rows where nobody has its modality; terms without rows keep their graph;
micro-batches are as many on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.config import TrainConfig
from distill.contracts import UserError
from distill.ranks import Ranks

SMALL, LARGE = 0.01, 0.1  # of a model's weights: no unit of its own; a unit that may hold others
WHOLE_MATRICES = ("muon", "adafactor")  # optimizers whose step is not element by element


def check_sharding(config: TrainConfig, where: str) -> None:
    """Check that what a budget asks for can be had in parts.

    Raises:
        UserError: it cannot; says which key to change.
    """
    if not config.shard:
        return
    reasons = {
        "compile": (config.compile, "compiled code does not gather them"),
        "channels_last": (config.channels_last, "parts are contiguous"),
        "precision": (config.precision == "fp16", "fp16 gradients are scaled by each rank alone; use 'bf16' or 'no'"),
        "optimizer": (config.optimizer in WHOLE_MATRICES, f"{config.optimizer} reads whole matrices; use 'adamw'"),
    }
    for key, (given, why) in reasons.items():
        if given:
            value = str(getattr(config, key)).lower()
            raise UserError(f"{where}.shard splits weights over the ranks, which {key}: {value} does not allow: {why}")
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UserError(f"{where}.shard: torch {torch.__version__} cannot do it; install 2.13 or later")


class Shards:
    """Splits a model and its objective over the ranks, in place.

    Args:
        model: on any device; has ``encoders``.
        objective: may have projectors.
        taps: module paths in ``model`` that the objective reads.
        ranks: two or more.

    Raises:
        UserError: a parameter is a single number.
    """

    def __init__(self, model: nn.Module, objective: nn.Module, taps: list[str], ranks: Ranks) -> None:
        self._ranks = ranks
        self._reached: set[str] = set()
        self._owner = nn.ModuleDict({"model": model, "objective": objective})
        for name, parameter in self._owner.named_parameters():
            if parameter.ndim == 0:
                raise UserError(f"train.shard: {name} is a single number, which cannot be split; set shard to false")
            parameter.data = parameter.data.contiguous()
        mesh = init_device_mesh(ranks.device.type, (ranks.count,))
        units = [f"model.{path}" for path in reversed(find_units(model, taps))]
        for path in [*units, "model", "objective"]:
            module = self._owner.get_submodule(path)
            if any(True for _ in module.parameters()):
                module.register_forward_hook(_without_views)
                # A root stays whole by default, and training would then change copies.
                unit: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
                unit.set_reduce_scatter_unused_params(True)
                self._note(module, path)

    def settle_gradients(self) -> None:
        """Drop the zeros at parameters that no rank's backward pass has reached since the last call.

        Gradients themselves are sums over the ranks already.
        """
        named = {name: p for name, p in self._owner.named_parameters() if p.requires_grad}
        reached = torch.tensor([name in self._reached for name in named], dtype=torch.int32)
        numbers = self._ranks.sum(reached.to(self._ranks.device)).tolist()
        for parameter, number in zip(named.values(), numbers, strict=True):
            if not number:
                parameter.grad = None
        self._reached.clear()

    def _note(self, unit: nn.Module, path: str) -> None:
        """Note from now on which of a unit's parameters get a gradient."""

        def first_forward(module: nn.Module, args: object) -> None:  # the unit's own parameters are whole here
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.register_post_accumulate_grad_hook(partial(self._note_gradient, f"{path}.{name}"))
            handle.remove()

        handle = unit.register_forward_pre_hook(first_forward)

    def _note_gradient(self, name: str, parameter: Tensor) -> None:
        self._reached.add(name)


def find_units(model: nn.Module, taps: list[str]) -> list[str]:
    """Paths of what is gathered at once, outer ones first: encoders, and the members of their lists of layers.

    What is too small stays with its surroundings. So does what has a tap, where a gradient could arrive that has not
    passed its outputs, and find it in parts, and what shares weights with others.
    """
    modules = dict(model.named_modules())
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in modules.items()}
    units: list[str] = []
    for path, module in modules.items():
        parent = modules[path.rpartition(".")[0]]
        member = isinstance(parent, nn.Sequential | nn.ModuleList) or path.rpartition(".")[0] == "encoders"
        if not path.startswith("encoders.") or not member or type(module).forward is nn.Module.forward:
            continue
        around = next((unit for unit in reversed(units) if path.startswith(f"{unit}.")), "")
        in_layer = around.count(".") > 1
        fits = sizes[path] >= SMALL * sizes[""] and (not in_layer or sizes[around] >= LARGE * sizes[""])
        tapped = any(f"{tap.partition(':')[0]}.".startswith(f"{path}.") for tap in taps)
        if sizes[path] and fits and not tapped and not _shares_weights(model, module):
            units.append(path)
    return units


def _shares_weights(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module has weights that are known under another name outside of it too."""
    own = {id(parameter) for parameter in module.parameters()}
    names = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    inside = [id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False)]
    return sum(item in own for item in names) != len(inside)


def _without_views(module: nn.Module, args: object, output: Any) -> Any:
    """The same output: FSDP's hooks on a view would be lost if something changed it in place."""
    if isinstance(output, Tensor):
        return output.clone() if output.requires_grad and output._is_view() else output
    if type(output) is dict:
        return {name: _without_views(module, args, value) for name, value in output.items()}
    if isinstance(output, tuple):
        values = [_without_views(module, args, value) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else tuple(values)
    return output


def split(values: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, split as another is; the tensor itself where that one is whole."""
    if not isinstance(like, DTensor) or isinstance(values, DTensor):
        return values
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None).clone()


def whole(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Put tensors of all ranks together, one after the other; in the CPU's memory where they were in parts.

    Every rank calls this. Nothing is returned to those that do not ``keep`` it.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        joined = value.full_tensor().cpu() if isinstance(value, DTensor) else value
        if keep:
            found[name] = joined
    return found


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory: for what is done element by element."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
