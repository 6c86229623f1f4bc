"""Low-rank adapters for transformers towers (LoRA; Hu et al. 2021, arXiv 2106.09685), with the package peft."""

from __future__ import annotations

from typing import Any

from torch import nn

from distill.config import nearest
from distill.contracts import UserError

KEYS = ("rank", "alpha", "targets")
PACKED = ("MultiheadAttention", "WavLMAttention")
"""Modules that read the weights of their layers themselves, past an adapter."""


def adapt(tower: nn.Module, lora: dict[str, Any] | None, *, freeze: bool, cut: bool = False) -> nn.Module:
    """Fix a tower's weights and put adapters beside some of its linear layers: W x + alpha / rank * B A x.

    B begins with zeros, so the tower first says what it said. The adapters are modules of the tower: they train, are
    saved and are exported with it.

    Args:
        tower: changed in place.
        lora: "rank", "alpha" (twice the rank by default) and "targets", last names of linear layers such as q_proj; the
            tower stays as it is where None.
        freeze: whether the whole tower is to be fixed, which adapters are not.
        cut: whether the tower is a smaller one whose weights are still to come.

    Returns:
        The tower.

    Raises:
        UserError: peft is not installed, an unknown key or layer, a value that cannot be, or a frozen or cut tower.
    """
    if lora is None:
        return tower
    for key in lora:
        if key not in KEYS:
            raise UserError(f"lora: unknown key {key!r}; {nearest(key, KEYS)}")
    if freeze:
        raise UserError("lora: adapters have to learn; set freeze to false")
    if cut:
        raise UserError("lora: adapters need a tower that has learnt, and 'cut' makes a new one; leave one of them out")
    rank = lora.get("rank", 8)
    alpha, targets = lora.get("alpha", 2 * rank), lora.get("targets", [])
    for key, value in (("rank", rank), ("alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"lora.{key} is {value!r}; give a whole number from 1")
    layers = linear_layers(tower)
    if not isinstance(targets, list) or not targets:
        raise UserError(f"lora.targets is {targets!r}; name some of the tower's layers: {', '.join(layers)}")
    for target in targets:
        if target not in layers:
            raise UserError(f"lora.targets: the tower has no linear layer {target!r}; {nearest(str(target), layers)}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("lora needs the package peft; pip install 'multidistill[peft]'") from error
    places = [path for target in targets for path in layers[target]]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=places)
    inject_adapter_in_model(config, tower)
    return tower


def linear_layers(tower: nn.Module) -> dict[str, list[str]]:
    """Last name of a tower's linear layers -> their paths, without those that an adapter would not reach."""
    packed = [path for path, module in tower.named_modules() if type(module).__name__ in PACKED]
    found: dict[str, list[str]] = {}
    for path, module in tower.named_modules():
        if isinstance(module, nn.Linear) and not any(path.startswith(f"{owner}.") for owner in packed):
            found.setdefault(path.rpartition(".")[2], []).append(path)
    return dict(sorted(found.items()))
