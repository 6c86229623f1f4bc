"""Precision of the losses, at least float32 whatever the model computes in, and directions of what may be zero."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

from distill.contracts import UserError

P = ParamSpec("P")
BEYOND_HALF = 65520.0
"""The least number that becomes infinite in float16."""


def upcast(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor as float32, and any other as it is: sums of halves lose what losses compare."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a loss compute in float32 at least: its tensors are :func:`upcast`, and autocast is off inside.

    Autocast would multiply matrices in half precision again, where squares of features overflow. Outside of autocast,
    gradients are kept :func:`within_half`. What it is given of student and teacher has as many rows, or a UserError
    says so.
    """
    places = inspect.signature(loss).parameters.values()
    names = [place.name for place in places if place.kind is not place.KEYWORD_ONLY]

    @functools.wraps(loss)
    def precise(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        named = {name: kwargs.get(name) for name in names} | dict(zip(names, args, strict=False))
        _need_as_many_rows(loss.__name__, named)
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        call = cast("Callable[..., Tensor]", loss)
        if not torch.is_autocast_enabled(device):
            return within_half(loss.__name__, call, args, kwargs)
        with torch.autocast(device, enabled=False):
            return call(*map(_lift, args), **{name: _lift(value) for name, value in kwargs.items()})

    return precise


def within_half(name: str, loss: Callable[..., Tensor], args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """Call a loss with its tensors :func:`upcast`; its backward pass refuses gradients that float16 cannot hold.

    A gradient goes back in the type of what was given, and float16 ends at 65,504. What a factor above 1 behind the
    loss does too much is not refused: an infinite gradient is what tells a gradient scaler to lower its scale. Under
    transforms of ``torch.func``, which take no hooks, nothing is refused.

    Args:
        name: of the loss, for the message.
        loss: what to call.
        args: its arguments, tensors or not.
        named: its keyword arguments.

    Returns:
        The value. Its backward pass raises UserError.
    """
    given, lifted = [_lift(value) for value in args], {key: _lift(value) for key, value in named.items()}
    value = loss(*given, **lifted)
    pairs = zip((*args, *named.values()), (*given, *lifted.values()), strict=True)
    halves = [half for own, half in pairs if isinstance(own, Tensor) and own.dtype == torch.float16]
    halves = [half for half in halves if half.requires_grad]
    if halves and value.ndim == 0 and not torch._C._are_functorch_transforms_active():
        _refuse_beyond_half(name, value, halves)
    return value


def _refuse_beyond_half(name: str, value: Tensor, halves: list[Tensor]) -> None:
    """Let the backward pass of a value stop at gradients that float16 cannot hold.

    Args:
        name: of the loss.
        value: its scalar.
        halves: float32, made of float16.
    """
    arriving: dict[str, Tensor] = {}

    def note(gradient: Tensor) -> None:
        arriving["scale"] = gradient.abs()

    def check(gradient: Tensor) -> None:
        largest = gradient.abs().amax() if gradient.numel() else gradient.new_zeros(())
        unscaled = largest / arriving["scale"]
        if bool((largest >= BEYOND_HALF) & (unscaled >= BEYOND_HALF) & unscaled.isfinite()):
            raise UserError(
                f"{name}: a gradient of {float(unscaled):.2g} is beyond 65,504, the largest number of float16; give "
                "bfloat16 or float32, or smaller features"
            )

    value.register_hook(note)
    for half in halves:
        half.register_hook(check)


def need_one_shape(loss: str, **tensors: Tensor) -> None:
    """Refuse tensors of several shapes: those that broadcast would compare each number with many.

    Args:
        loss: its name, for the message.
        tensors: whose it is -> what is compared number by number.

    Raises:
        UserError: they have not one shape.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = " and ".join(f"{list(tensor.shape)} of the {whose}" for whose, tensor in tensors.items())
        raise UserError(f"{loss} compares number by number and needs one shape, got {shapes}; give both the same")


def unit(rows: Tensor, eps: float = 0.0) -> Tensor:
    """Divide [..., D] by its length plus ``eps``; what has no length stays zero and gets a gradient of zero.

    Dividing zero by a small number alone gives a value of zero too, but a gradient as large as its inverse.
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    nothing = length == 0
    return (rows / (length + eps).masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _need_as_many_rows(loss: str, given: Mapping[str, Any]) -> None:
    """Refuse other numbers of rows in what is named after student and teacher."""
    sides = {name: value for name, value in given.items() if name.startswith(("student", "teacher"))}
    shapes = {name: list(value.shape) for name, value in sides.items() if isinstance(value, Tensor) and value.ndim}
    if len({shape[0] for shape in shapes.values()}) > 1:
        found = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"{loss} needs as many rows of student and teacher, got {found}; give both the same rows")


def _lift(value: Any) -> Any:
    return upcast(value) if isinstance(value, Tensor) else value
