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
