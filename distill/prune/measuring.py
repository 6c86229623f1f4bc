"""What a model gives and costs, before and after pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.contracts import Batch, Outputs
from distill.multimodal import Encoded, Encoder
from distill.operations import flop_counter


def run(model: nn.Module, example: Batch) -> tuple[Outputs, int, dict[str, int]]:
    """Return outputs, the FLOPs of the whole batch, and the width that each encoder gave."""
    widths: dict[str, int] = {}

    def reader(path: str) -> Callable[[nn.Module, Any, Encoded], None]:
        def read(module: nn.Module, inputs: Any, output: Encoded) -> None:
            widths[path] = output.pooled.shape[-1]

        return read

    encoders = [(path, module) for path, module in model.named_modules() if isinstance(module, Encoder)]
    hooks = [module.register_forward_hook(reader(path)) for path, module in encoders]
    try:
        with torch.no_grad(), flop_counter() as counter:
            outputs = model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, counter.get_total_flops(), widths


def answers(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return what a model says of all rows: name of an output -> [N, C], N rows, or tokens of texts that it writes."""
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in batches:
            outputs = model(batch)
            for part in ("logits", "embeddings"):
                for name, value in getattr(outputs, part).items():
                    found.setdefault(f"{part}.{name}", []).append(value.double().nan_to_num().flatten(0, -2))
    return {name: torch.cat(values) for name, values in found.items()}


def drop(whole: Mapping[str, Tensor], smaller: Mapping[str, Tensor]) -> float:
    """Return how much agreement a smaller model has lost: 0 where it says the same, about 1 where it says nothing.

    ``1 - R²`` with y the whole model's answers: ``sum (y' - y)² / sum (y - mean y)²``, the mean over its outputs.

    Raises:
        RuntimeError: an output has another shape.
    """
    shares = []
    for name, value in whole.items():
        if smaller[name].shape != value.shape:
            raise RuntimeError(f"{name} is {tuple(smaller[name].shape)}, it was {tuple(value.shape)}")
        spread = (value - value.mean(0)).square().sum().clamp(min=1e-12)
        shares.append(((smaller[name] - value).square().sum() / spread).item())
    return sum(shares) / len(shares)
