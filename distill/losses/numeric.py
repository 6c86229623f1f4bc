"""Precision of the losses, at least float32 whatever the model computes in, and directions of what may be zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

P = ParamSpec("P")


def upcast(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor as float32, and any other as it is: sums of halves lose what losses compare."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a loss compute in float32 at least: its tensors are :func:`upcast`, and autocast is off inside.

    Autocast would multiply matrices in half precision again, where squares of features overflow.
    """

    @functools.wraps(loss)
    def precise(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device = next(value.device.type for value in args if isinstance(value, Tensor))
        named = {name: _lift(value) for name, value in kwargs.items()}
        within = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with within:
            return cast("Callable[..., Tensor]", loss)(*map(_lift, args), **named)

    return precise


def unit(rows: Tensor, eps: float = 0.0) -> Tensor:
    """Divide [..., D] by its length plus ``eps``; what has no length stays zero and gets a gradient of zero.

    Dividing zero by a small number alone gives a value of zero too, but a gradient as large as its inverse.
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    nothing = length == 0
    return (rows / (length + eps).masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _lift(value: Any) -> Any:
    return upcast(value) if isinstance(value, Tensor) else value
