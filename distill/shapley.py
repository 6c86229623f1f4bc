"""What each modality contributes: Shapley's fair division of a worth among those that earn it together.

Source: Shapley (1953), "A value for n-person games".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.contracts import AND

Worth = float | NDArray[np.floating[Any]]


def shapley_values(worth: Mapping[frozenset[str], Worth], players: Collection[str]) -> dict[str, NDArray[np.float64]]:
    """Divide the worth of all players among them: each gets the mean of what it adds, over all orders of joining.

    The values add up to the worth of all less that of none. A player that never adds anything gets 0, and two that add
    the same everywhere get the same.

    Args:
        worth: subset of the players -> its worth, numbers or arrays of one shape; the empty one and the whole included.
        players: all of them, n.

    Returns:
        Player -> its value, of the worths' shape.

    Raises:
        KeyError: a subset has no worth.
    """
    values = {}
    for player in players:
        others = [name for name in players if name != player]
        total: Any = 0.0
        for size in range(len(others) + 1):
            share = 1 / (len(players) * comb(len(others), size))
            for chosen in map(frozenset, combinations(others, size)):
                total = total + share * (np.asarray(worth[chosen | {player}], np.float64) - worth[chosen])
        values[player] = np.asarray(total, np.float64)
    return values


def contributions(whole: Worth, parts: Mapping[str, Worth], nothing: Worth) -> dict[str, NDArray[np.float64]] | None:
    """Divide what several modalities are worth together, above what is had without any, among them.

    Args:
        whole: the worth of all.
        parts: each other subset, such as "image" or "image+text" -> its worth.
        nothing: the worth of none.

    Returns:
        Modality -> its share, see :func:`shapley_values`; None where not all subsets were measured, or there are none.
    """
    players = [name for name in parts if AND not in name]
    if len(players) < 2 or len(parts) < 2 ** len(players) - 2:
        return None
    named = {frozenset(name.split(AND)): worth for name, worth in parts.items()}
    return shapley_values({frozenset(): nothing, **named, frozenset(players): whole}, players)
