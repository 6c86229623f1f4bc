"""Sensitivity: what pruning each stage of a model alone costs, and the ratios that cost least together.

Stages are measured one by one at some ratios (Li et al. 2017, arXiv 1608.08710; Han et al. 2015, arXiv 1506.02626),
and the costs of several are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from distill.prune.selection import LEAST_KEPT, choose_in_sets

RATIOS = (0.25, 0.5, 0.75, 0.9)
"""Where each stage is measured."""
GRID = tuple(step / 20 for step in range(int((1 - LEAST_KEPT) * 20) + 1))
"""Ratios that a stage may get: costs between the measured ones are interpolated."""


def stage_of(layers: Sequence[str]) -> str:
    """Return the stage of layers whose channels go together.

    That of a layer is its path up to the first number; of layers of several stages it is what their paths share.
    """
    paths = [path.split(".") for path in layers]
    stages = {tuple(path[: next((n + 1 for n, part in enumerate(path) if part.isdigit()), None)]) for path in paths}
    shared = [parts[0] for parts in zip(*stages, strict=False) if len(set(parts)) == 1]
    return ".".join(shared) or layers[0]


def outcomes(
    stages: Mapping[str, Sequence[int]], scores: Sequence[Tensor], units: Sequence[int], ratios: Sequence[float]
) -> dict[str, list[list[list[int]]]]:
    """Return what each group loses if one stage alone is pruned, at each ratio, after rounding.

    Args:
        stages: name -> indices of its groups.
        scores: of each group's channels.
        units: as in :func:`distill.prune.selection.choose`.
        ratios: of the stage's channels.
    """
    nothing = [0] * len(scores)
    return {
        stage: [choose_in_sets([(ratio, members)], scores, units, nothing) for ratio in ratios]
        for stage, members in stages.items()
    }


def prices(removed: Sequence[int], measured: Sequence[int], costs: Sequence[float]) -> list[float]:
    """Return the costs of removing numbers of channels, interpolated between those that are ``measured``, which rise.

    A cost below that of removing less counts as that one.
    """
    return np.interp(removed, [0, *measured], np.maximum.accumulate([0.0, *costs])).tolist()


def allocate(removed: Mapping[str, Sequence[int]], costs: Mapping[str, Sequence[float]], least: int) -> dict[str, int]:
    """Return which of its options each stage takes, so that the sum of costs is the least.

    Args:
        removed: stage -> how many channels go with each option.
        costs: stage -> of each option.
        least: how many channels go at least, or as many as can.
    """
    least = max(0, min(least, sum(max(counts) for counts in removed.values())))
    best = np.full(least + 1, np.inf)  # number of channels -> least cost of removing at least as many
    best[0] = 0.0
    choices = []
    for stage, counts in removed.items():
        places = (np.maximum(np.arange(least + 1) - count, 0) for count in counts)
        sums = np.stack([best[place] + cost for place, cost in zip(places, costs[stage], strict=True)])
        choices.append((stage, sums.argmin(0)))
        best = sums.min(0)
    found, left = {}, least
    for stage, choice in reversed(choices):
        found[stage] = int(choice[left])
        left = max(0, left - removed[stage][found[stage]])
    return found


def scan(
    stages: Mapping[str, Sequence[int]],
    scores: Sequence[Tensor],
    units: Sequence[int],
    cost: Callable[[list[list[int]]], float],
    least: int,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Find ratios of the stages that remove enough channels at the least cost.

    Args:
        stages: name -> indices of its groups.
        scores: of each group's channels.
        units: as in :func:`distill.prune.selection.choose`.
        cost: from the indices that each group loses to the agreement that is lost.
        least: how many channels go at least, or as many as can.

    Returns:
        The ratios, and a table: of each stage its ``channels``, the ``drop`` at each of :data:`RATIOS`, the ``ratio``.
    """
    sizes = {stage: sum(len(scores[index]) for index in members) for stage, members in stages.items()}
    tried, able = (outcomes(stages, scores, units, ratios) for ratios in (RATIOS, GRID))
    drops, counts, costs = {}, {}, {}
    for stage in stages:
        drops[stage] = [cost(lost) if any(lost) else 0.0 for lost in tried[stage]]
        counts[stage] = [sum(map(len, lost)) for lost in able[stage]]
        measured = [sum(map(len, lost)) for lost in tried[stage]]
        costs[stage] = prices(counts[stage], measured, drops[stage])
    chosen = allocate(counts, costs, least)
    ratios = {stage: GRID[option] for stage, option in chosen.items()}
    table = {
        stage: {
            "channels": size,
            "drop": {str(ratio): round(value, 6) for ratio, value in zip(RATIOS, drops[stage], strict=True)},
            "ratio": ratios[stage],
        }
        for stage, size in sizes.items()
    }
    return ratios, table
