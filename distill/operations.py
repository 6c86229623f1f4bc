"""Counting floating-point operations: torch's counter, with what it does not know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """A counter of the operations under it, a multiply-add counted as two, those of torch's fused LSTM on CPUs too."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _lstm_flops})


def _lstm_flops(
    x: Sequence[int], of_inputs: Sequence[int], of_states: Sequence[int], *arguments: Any, **options: Any
) -> int:
    """Each position is multiplied with both weights; shapes [L, B, in], [4 · H, in] and [4 · H, H]."""
    return 2 * x[0] * x[1] * (math.prod(of_inputs) + math.prod(of_states))
