"""Random choices that are hashes: they depend on what is chosen for, and not on any stream, order or platform."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a permutation of all 64-bit numbers that looks random, applied to each of an array of any shape.

    The finalizer of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    # uint64 arrays wrap around by definition, and numpy starts small operations faster than torch
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
