"""Sensitivity: what pruning each stage of a model alone costs, and the ratios that cost least together.

Stages are measured one by one at some ratios (Li et al. 2017, arXiv 1608.08710; Han et al. 2015, arXiv 1506.02626),
and the costs of several are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from distill.prune.selection import LEAST_KEPT, choose

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


def scan(
    stages: Mapping[str, Sequence[int]],
    scores: Sequence[Tensor],
    units: Sequence[int],
    cost: Callable[[list[list[int]]], float],
) -> dict[str, list[float]]:
    """Measure the cost of pruning each stage alone at each of :data:`RATIOS`.

    Args:
        stages: name -> indices of its groups.
        scores: of each group's channels.
        units: as in :func:`distill.prune.selection.choose`.
        cost: from the indices that each group loses to the agreement that is lost.
    """
    found: dict[str, list[float]] = {}
    for stage, members in stages.items():
        found[stage] = []
        for ratio in RATIOS:
            lost: list[list[int]] = [[] for _ in scores]
            chosen = choose([scores[i] for i in members], ratio, [units[i] for i in members])
            for index, indices in zip(members, chosen, strict=True):
                lost[index] = indices
            found[stage].append(cost(lost) if any(lost) else 0.0)
    return found


def allocate(sizes: Mapping[str, int], costs: Mapping[str, Sequence[float]], remove: int) -> dict[str, float]:
    """Return the ratio of each stage, from :data:`GRID`, with the least sum of costs.

    Args:
        sizes: channels of each stage.
        costs: of each stage at :data:`RATIOS`; a cost below that of a lower ratio counts as that one.
        remove: how many channels go at least, or as many as can.
    """
    names = list(sizes)
    removed = {name: [int(ratio * sizes[name]) for ratio in GRID] for name in names}
    remove = min(remove, sum(each[-1] for each in removed.values()))
    best = np.full(remove + 1, np.inf)  # number of channels -> least cost of removing at least as many
    best[0] = 0.0
    choices = []
    for name in names:
        rising = np.maximum.accumulate([0.0, *costs[name]])
        prices = np.interp(GRID, [0.0, *RATIOS], rising)
        options = np.stack(
            [
                best[np.maximum(np.arange(remove + 1) - count, 0)] + price
                for count, price in zip(removed[name], prices, strict=True)
            ]
        )
        choices.append(options.argmin(0))
        best = options.min(0)
    found, left = {}, remove
    for name, choice in zip(reversed(names), reversed(choices), strict=True):
        found[name] = GRID[choice[left]]
        left = max(0, left - removed[name][choice[left]])
    return {name: found[name] for name in names}


def table(
    sizes: Mapping[str, int], costs: Mapping[str, Sequence[float]], ratios: Mapping[str, float]
) -> dict[str, Any]:
    """Return what a report says of a scan: of each stage its channels, the costs by ratio, and the ratio chosen."""
    return {
        stage: {
            "channels": sizes[stage],
            "drop": {str(ratio): round(value, 6) for ratio, value in zip(RATIOS, costs[stage], strict=True)},
            "ratio": ratios[stage],
        }
        for stage in sizes
    }
