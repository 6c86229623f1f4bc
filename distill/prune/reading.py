"""Reading from a pruned model what torch-pruning has cut: each of its elements knows its place before."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from distill.contracts import UserError
from distill.prune.plans import Cuts


def number_elements(module: nn.Module) -> None:
    """Replace every floating value by its place in its tensor; float64 holds them exactly."""
    module.zero_grad(set_to_none=True)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)


def kept_indices(original: nn.Module, twin: nn.Module) -> dict[str, Cuts]:
    """Read from a numbered and pruned twin which indices of each tensor remain."""
    before, result = original.state_dict(), {}
    for name, numbers in twin.state_dict().items():
        shape = tuple(before[name].shape)
        if tuple(numbers.shape) == shape:
            continue
        places, cuts = numbers.long(), {}
        for dim, size in enumerate(shape):
            # sorted, since torch-pruning 1.6.1 may leave those of a LayerNorm in the order of a set
            kept = (places // math.prod(shape[dim + 1 :]) % size).unique()
            if len(kept) != numbers.shape[dim]:
                raise UserError(
                    f"prune.modules: the dependencies of {name!r} cannot be followed; leave out the part that holds it"
                )
            if len(kept) < size:
                cuts[str(dim)] = {"of": size, "kept": kept.tolist()}
        result[name] = cuts
    return result


def changed_attributes(original: nn.Module, twin: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the sizes that modules of a pruned twin have of their own, where they are others than before."""
    changed = {}
    after = dict(twin.named_modules())
    for path, module in original.named_modules():
        now = vars(after[path])
        values = {name: now[name] for name, value in vars(module).items() if _is_size(value) and now.get(name) != value}
        if values:
            changed[path] = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return changed


def _is_size(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(item, int) for item in value))
