"""Which channels, or heads, go: ranked by their scores, all together or in sets of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LEAST_KEPT = 0.1
"""Share of a group's channels that always stays, so that no layer collapses under global ranking."""


def choose(
    scores: Sequence[Tensor], ratio: float, units: Sequence[int], gone: Sequence[int] | None = None
) -> list[list[int]]:
    """Rank channels of all groups together and pick those to remove.

    Args:
        scores: importance of each group's channels, comparable between groups.
        ratio: share of all channels to remove, before rounding.
        units: the number kept in each group is rounded to the nearest multiple of its unit, at least one; a group
            that is smaller than its unit stays whole.
        gone: how many channels each group has lost before. They count as if they were there and removed.

    Returns:
        For each group the sorted indices to remove.
    """
    gone = [0] * len(scores) if gone is None else gone
    guarded = []
    for score, unit, before in zip(scores, units, gone, strict=True):
        least = min(len(score), max(unit, math.ceil(LEAST_KEPT * (len(score) + before))))
        safe = score.double().clone()
        safe[score.topk(least).indices] = torch.inf
        guarded.append(safe)
    joined = torch.cat(guarded)
    cut = torch.zeros(len(joined), dtype=torch.bool)
    cut[joined.argsort(stable=True)[: max(0, int(ratio * (len(joined) + sum(gone))) - sum(gone))]] = True
    cut &= joined.isfinite()
    result = []
    for score, unit, part in zip(scores, units, cut.split([len(score) for score in scores]), strict=True):
        kept = len(score) - int(part.sum())
        if kept < len(score):
            kept = min(len(score), max(unit, int(kept / unit + 0.5) * unit))
        result.append(sorted(score.argsort(stable=True)[: len(score) - kept].tolist()))
    return result


def choose_in_sets(
    sets: Sequence[tuple[float, Sequence[int]]], scores: Sequence[Tensor], units: Sequence[int], gone: Sequence[int]
) -> list[list[int]]:
    """Choose in each set of groups by itself: ``sets`` are ratios and indices of groups, the rest as :func:`choose`."""
    lost: list[list[int]] = [[] for _ in scores]
    for ratio, members in sets:
        mine = [scores[index] for index in members]
        chosen = choose(mine, ratio, [units[index] for index in members], [gone[index] for index in members])
        for index, indices in zip(members, chosen, strict=True):
            lost[index] = indices
    return lost


def ranked_together(
    layers: Sequence[Sequence[str]], ratio: float, ratios: Mapping[str, float], *, alone: bool
) -> list[tuple[float, list[int]]]:
    """Return the sets of groups that are ranked together, each with its ratio.

    Args:
        layers: of each group, the paths of the layers whose channels it has.
        ratio: of layers that no prefix names.
        ratios: prefix of module paths -> ratio. Of several that fit, the longest counts; a group whose layers have
            several ratios takes the lowest.
        alone: each group is a set.
    """
    sets: dict[tuple[float, str, int], list[int]] = {}
    for index, paths in enumerate(layers):
        rules = []
        for path in paths:
            prefix = max((each for each in ratios if f"{path}.".startswith(f"{each}.")), key=len, default=None)
            rules.append((ratio, "") if prefix is None else (ratios[prefix], prefix))
        sets.setdefault((*min(rules), index if alone else 0), []).append(index)
    return [(rule[0], members) for rule, members in sets.items()]
