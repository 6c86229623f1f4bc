"""How much each weight matters: alone, or to a loss on rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distill.contracts import IGNORE, Batch, Outputs, UserError

Loss = Callable[[Outputs, Batch], Tensor]
FROM_DATA = ("taylor", "hessian")
"""Kinds of importance that read rows and a loss."""


@torch.enable_grad()
def saliency(model: nn.Module, kind: str, batches: Sequence[Batch], loss: Loss | None) -> dict[str, Tensor]:
    """Score every weight w; g is its gradient in a batch, E the mean over batches, weighted by their rows.

    Args:
        model: in eval mode, all parameters requiring gradients, of which none is left behind.
        kind: "magnitude" ``w²``; "bn_scale" ``|w|``, of which the scales of BatchNorm are read (Liu et al. 2017, arXiv
            1708.06519); "taylor" ``E |w g|`` (Molchanov et al. 2019, arXiv 1906.10771); "hessian" ``E (w g)² / 2``, the
            loss that removing w costs to second order at a minimum (LeCun et al. 1990, "Optimal Brain Damage"), with
            the Fisher information in place of the Hessian (Theis et al. 2018, arXiv 1801.05787): exactly, if batches
            have one row each. "random" is none of weights: all count 1.
        batches: the rows that "taylor" and "hessian" differentiate.
        loss: ``(outputs, batch) -> scalar``, a mean over rows; the cross-entropy of labels if None.

    Returns:
        Parameter name -> float, as the parameter.

    Raises:
        UserError: "taylor" or "hessian" has neither a loss nor labels.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if kind == "random":
        return {name: torch.ones_like(weight) for name, weight in weights.items()}
    if kind not in FROM_DATA:
        return {name: weight.abs() if kind == "bn_scale" else weight.square() for name, weight in weights.items()}
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    num_rows = sum(len(batch.ids) for batch in batches)
    for batch in batches:
        value = _value(model, batch, loss, kind)
        if not value.requires_grad:
            continue  # no row of this batch is one that the loss reads
        gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        share = len(batch.ids) / num_rows
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            if gradient is not None:
                change = (weight * gradient).nan_to_num(0.0)
                found[name] += share * (change.abs() if kind == "taylor" else change.square() / 2)
    return found


def _value(model: nn.Module, batch: Batch, loss: Loss | None, kind: str) -> Tensor:
    outputs = model(batch)
    if loss is not None:
        return loss(outputs, batch)
    integers = {task: labels for task, labels in batch.targets.items() if not labels.is_floating_point()}
    labelled = {task: labels for task, labels in integers.items() if labels.ndim == 1 and (labels != IGNORE).any()}
    if not labelled:
        raise UserError(f"prune.importance={kind} needs rows with labels; choose prune.importance=magnitude")
    losses = [cross_entropy(outputs.logits[task], labels, ignore_index=IGNORE) for task, labels in labelled.items()]
    return torch.stack(losses).sum()
