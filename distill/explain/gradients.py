"""Integrated gradients and Grad-CAM, both as captum has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.contracts import UserError
from distill.explain.starts import Start

STEPS = (32, 128)
"""Points of the path; more of them where the sum is wrong by more than ``TOLERANCE`` of the change that it explains."""
TOLERANCE = 0.02
AT_ONCE = 32  # points a forward pass


class Integrated(NamedTuple):
    """Integrated gradients of one row.

    Attributes:
        values: of each start, its shape without the row.
        change: f(x) - f(baseline).
        error: the sum of all values less the change; 0 but for the steps' coarseness.
        steps: points of the path.
    """

    values: list[Tensor]
    change: float
    error: float
    steps: int


def integrated_gradients(forward: Callable[..., Tensor], starts: Sequence[Start]) -> Integrated:
    """``(x_i - b_i) ∫ ∂f/∂x_i (b + t (x - b)) dt`` (Sundararajan et al. 2017, arXiv 1703.01365), t from 0 to 1.

    The values add up to f(x) - f(b): "completeness".

    Args:
        forward: the starts' tensors [B, ...] -> f [B].
        starts: what the gradients are of, together.

    Raises:
        UserError: captum is not installed.
    """
    method = _captum().IntegratedGradients(forward)
    inputs, baselines = tuple(s.value for s in starts), tuple(s.baseline for s in starts)
    with torch.no_grad():
        change = float(forward(*inputs) - forward(*baselines))
    for steps in STEPS:
        found = method.attribute(inputs, baselines, n_steps=steps, internal_batch_size=AT_ONCE)
        error = sum(float(values.sum()) for values in found) - change
        if abs(error) <= TOLERANCE * abs(change):
            break
    return Integrated([values[0].detach().float() for values in found], change, error, steps)


def last_map(encoder: nn.Module, inputs: dict[str, Tensor]) -> nn.Module | None:
    """The module that gives the feature map [B, D, H, W] whose positions are an encoder's tokens, if there is one."""
    maps: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            maps.append((module, output))

    hooks = [module.register_forward_hook(note) for module in encoder.modules()]
    try:
        with torch.no_grad():
            tokens = encoder(inputs).tokens
    finally:
        for hook in hooks:
            hook.remove()
    for module, output in reversed(maps):
        positions = output.flatten(2).transpose(1, 2)
        if positions.shape == tokens.shape and torch.equal(positions, tokens):
            return module
    return None


def grad_cam(forward: Callable[..., Tensor], layer: nn.Module, image: Tensor) -> Tensor:
    """``ReLU(sum_k a_k A_k)``, a_k the mean gradient of map A_k (Selvaraju et al. 2017, arXiv 1610.02391).

    Args:
        forward: the image [B, 3, H, W] as floats -> f [B].
        layer: gives the maps A [B, K, h, w].
        image: of one row, [1, 3, H, W].

    Returns:
        [h, w], at least 0.

    Raises:
        UserError: captum is not installed.
    """
    value = image.detach().clone().requires_grad_(True)
    found = _captum().LayerGradCam(forward, layer).attribute(value, relu_attributions=True)
    return found[0, 0].detach().float()


def enlarged(values: Tensor, size: Sequence[int]) -> Tensor:
    """A map [h, w] at another size, bilinear."""
    return F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise UserError("explanations need the package captum; pip install 'multidistill[explain]'") from error
    return attr
