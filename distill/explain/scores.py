"""What is explained: the log-odds of a class, and what each modality adds to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.shapley import shapley_values

AND = "+"
NOTHING = "nothing"


def log_odds(logits: Tensor, label: int) -> Tensor:
    """``log p - log(1 - p) = z_c - logsumexp_{j != c} z_j`` of class c: [B, C] to float64 [B].

    A constant added to all logits of a row, which changes no answer, does not change it; unlike a probability it does
    not flatten where a model is sure.
    """
    z = logits.double()
    return z[:, label] - torch.cat([z[:, :label], z[:, label + 1 :]], dim=1).logsumexp(1)


def contributions(
    answer: Callable[[Collection[str]], Tensor], present: Sequence[str], modalities: Sequence[str]
) -> dict[str, Any]:
    """Shapley values of a row's modalities for the class that a model answers with all of them.

    The worth of a subset S is what the model says of that class with S alone; of the empty one what it says with
    nothing, where it answers from its learned stand-ins and biases.

    Args:
        answer: subset of ``present`` -> logits [C].
        present: modalities that the row has.
        modalities: all that the model reads; those that the row lacks get exactly 0.

    Returns:
        ``label``; ``subsets``, names joined by "+" -> probability; and for "probability" and "log_odds" a mapping of
        ``all``, ``nothing``, ``values`` by modality, and ``error``, by how much the values miss all less nothing.
    """
    subsets = [frozenset(chosen) for size in range(len(present) + 1) for chosen in combinations(present, size)]
    said = {subset: answer(subset).double() for subset in subsets}
    whole, nothing = frozenset(present), frozenset[str]()
    label = int(said[whole].argmax())
    worth = {
        subset: np.array([float(logits.softmax(0)[label]), float(log_odds(logits[None], label))])
        for subset, logits in said.items()
    }
    values = shapley_values(worth, present)
    found: dict[str, Any] = {"label": label}
    found["subsets"] = {
        AND.join(name for name in modalities if name in subset) or NOTHING: float(worth[subset][0])
        for subset in subsets
    }
    for place, measure in enumerate(("probability", "log_odds")):
        each = {name: float(values[name][place]) if name in values else 0.0 for name in modalities}
        ends = {"all": float(worth[whole][place]), NOTHING: float(worth[nothing][place])}
        found[measure] = {**ends, "values": each, "error": sum(each.values()) - (ends["all"] - ends[NOTHING])}
    return found
