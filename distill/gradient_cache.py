"""Gradients of a whole batch that is computed in parts, also where its loss compares rows with each other.

Gradient caching (Gao et al. 2021, arXiv 2101.06983): each part goes forward once, and only its outputs are kept; the
loss of all rows gives a gradient for each output; then each part goes forward again, and backward from its own. So
memory holds the graph of one part, and the price is a second forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.contracts import Batch, Outputs

Loss = tuple[Tensor, dict[str, Tensor]]


def backward_in_parts(
    parts: Sequence[Batch],
    rows: Sequence[Tensor],
    forward: Callable[[Batch], Outputs],
    loss_backward: Callable[[Outputs], Loss],
    buffers: Sequence[Tensor],
) -> Loss:
    """Add the gradients of the loss over all rows to those of the parameters.

    Args:
        parts: the batch in parts.
        rows: of each part, which rows of the batch it has: int64 [B_part].
        forward: the trained model. Both calls for a part draw the same random numbers.
        loss_backward: from the outputs for all rows, in the batch's order, to the loss and its terms; calls the
            backward pass, which ends at these outputs.
        buffers: of the model, in which BatchNorm counts each part once.

    Returns:
        What ``loss_backward`` returned.
    """
    device = parts[0].ids.device
    before = [buffer.clone() for buffer in buffers]
    generators, leaves = [], []
    for part in parts:
        generators.append(_rng_state(device))
        # With gradients, as the second time: kernels of attention draw their dropout otherwise without.
        leaves.append(_leaves(forward(part)))
    result = loss_backward(_joined(leaves, torch.cat(list(rows))))
    behind = _rng_state(device)  # losses draw too
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    for part, state, cached in zip(parts, generators, leaves, strict=True):
        _set_rng_state(state, device)
        again = _tensors(forward(part))
        reached = [(again[place], leaf.grad) for place, leaf in _tensors(cached).items() if leaf.grad is not None]
        torch.autograd.backward([output for output, _ in reached], [gradient for _, gradient in reached])
    _set_rng_state(behind, device)
    return result


def _leaves(outputs: Outputs) -> Outputs:
    """The same values without their graph; gradients end here."""
    return Outputs(*({name: _leaf(value) for name, value in kind.items()} for kind in outputs))


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)


def _joined(leaves: Sequence[Outputs], rows: Tensor) -> Outputs:
    """The outputs of all parts, in the order of the batch."""
    order = rows.argsort()
    kinds = zip(*leaves, strict=True)
    return Outputs(*({name: torch.cat([kind[name] for kind in same])[order] for name in same[0]} for same in kinds))


def _tensors(outputs: Outputs) -> dict[tuple[str, str], Tensor]:
    return {
        (kind, name): value
        for kind, values in zip(Outputs._fields, outputs, strict=True)
        for name, value in values.items()
    }


def _rng_state(device: torch.device) -> list[Tensor]:
    """The states of the generators that a model on this device draws from."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state()]


def _set_rng_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state)
