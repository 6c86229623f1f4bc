"""Precision of the losses: at least float32, whatever the model computes in."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor as float32, and any other as it is: sums of halves lose what losses compare."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
