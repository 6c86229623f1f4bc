"""What attention reads: the weights of all attention layers of a model, of its fusion by modality.

Layers compute ``softmax(q k / sqrt(d) + mask) v`` in one operator that does not give its weights. So the calls of that
operator are watched, and the weights are computed from the same queries, keys and mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distill.contracts import Batch
from distill.fusion import BottleneckFusion, CrossAttentionFusion, PerceiverFusion, SelfAttentionFusion

STAND_IN = " (stand-in)"
"""Behind a modality's name: the learned token that is readable when the modality is absent."""
SHARED, LATENT = "shared", "latent"
READING_FUSIONS = (BottleneckFusion, CrossAttentionFusion, PerceiverFusion, SelfAttentionFusion)


class Layer(NamedTuple):
    """One attention layer's call for one row: the path of the module that made it, and weights [A, T, S]."""

    path: str
    weights: Tensor


class Paid(NamedTuple):
    """What one reader of a fusion layer reads, as shares of its attention, which add up to 1.

    Attributes:
        layer: path of the module.
        reader: a modality, "shared" tokens or "latent" ones.
        shares: who is read -> share; learned stand-ins apart.
        tokens: modality -> [T], the share of each of its tokens.
    """

    layer: str
    reader: str
    shares: dict[str, float]
    tokens: dict[str, Tensor]


class _Watch(TorchFunctionMode):
    """Notes the weights of each call of the attention operator, with the path of the innermost module that runs."""

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()
        self.running, self.found = running, list[Layer]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # torch's own layer, which is asked for its weights
            output, weights = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})
            assert weights is not None
            self._note(weights)
            return output, None
        if func is F.scaled_dot_product_attention:
            self._note(attention_weights(*args, **kwargs))
        return func(*args, **kwargs)

    def _note(self, weights: Tensor) -> None:
        if weights.ndim == 4 and len(weights) == 1:  # windows of a picture are rows of their own
            self.found.append(Layer(self.running[-1] if self.running else "", weights[0].float()))


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights [..., T, S] of ``scaled_dot_product_attention`` without dropout, from its own arguments."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        mask = attn_mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def attention_layers(model: nn.Module, batch: Batch) -> list[Layer]:
    """Run a model on one row, and return its attention layers in the order in which they ran."""
    running: list[str] = []

    def enter(path: str) -> Callable[..., None]:
        return lambda module, args: running.append(path)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    hooks: list[Any] = []
    for path, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's own layers take another operator there
    try:
        with torch.no_grad(), _Watch(running) as watch:
            model(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
    return watch.found


def received(layer: Layer) -> Tensor:
    """The mean weight of each token that is read, over heads and over readers that are no padding: [S], sum 1."""
    weights = layer.weights.mean(0)
    if weights.shape[0] == weights.shape[1]:
        weights = weights[weights.amax(0) > 0]
    return weights.mean(0)


def fusion_attention(model: Any, batch: Batch) -> list[Paid]:
    """What each reader of each attention layer of a fusion reads; of an ensemble all members' fusions.

    Returns:
        One entry a layer and reader; none where the fusion has no attention.
    """
    fusions = {path: module for path, module in model.named_modules() if isinstance(module, READING_FUSIONS)}
    with _masks_of(fusions) as masks:
        layers = attention_layers(model, batch)
    found: list[Paid] = []
    for layer in layers:
        for path, fusion in fusions.items():
            if layer.path.startswith(f"{path}."):
                found += _read_by(layer, fusion, layer.path.removeprefix(f"{path}.").split("."), masks[path])
    return found


@contextmanager
def _masks_of(fusions: dict[str, Any]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Of each fusion, modality -> bool [1 + T], the learned token and those of the row that are there."""
    masks: dict[str, dict[str, Tensor]] = {}

    def note(path: str) -> Callable[..., None]:
        def read(module: Any, args: Any) -> None:
            _, there, _, present = args
            masks[path] = {
                name: F.pad(there[name][0] & present[name][0], (1, 0), value=True) for name in module.modalities
            }

        return read

    hooks = [fusion.register_forward_pre_hook(note(path)) for path, fusion in fusions.items()]
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()


def _read_by(layer: Layer, fusion: Any, inner: list[str], masks: dict[str, Tensor]) -> list[Paid]:
    """Divide a layer's weights by who reads and who is read."""
    own = inner[2] if inner[2] in masks else ""
    readers, read = _owners(fusion, own, masks, layer.weights.shape[1])
    weights, found = layer.weights.mean(0), []
    real = torch.cat(
        [masks.get(name, torch.ones(readers.count(name), dtype=torch.bool)) for name in dict.fromkeys(readers)]
    )
    for reader in dict.fromkeys(readers):
        mine = torch.tensor([name == reader for name in readers]) & real
        mean = weights[mine].mean(0)
        places = {name: torch.tensor([other == name for other in read]) for name in dict.fromkeys(read)}
        shares = {name: float(mean[where].sum()) for name, where in places.items()}
        tokens = {name: mean[where] for name, where in places.items() if name in masks}
        found.append(Paid(layer.path.removesuffix(".attention"), reader, shares, tokens))
    return found


def _owners(fusion: Any, own: str, masks: dict[str, Tensor], num_readers: int) -> tuple[list[str], list[str]]:
    """Whose the tokens are that read, and those that are read, in their order in the layer."""

    def states(names: Sequence[str]) -> list[str]:
        return [owner for name in names for owner in (name + STAND_IN, *[name] * (len(masks[name]) - 1))]

    def plain(names: Sequence[str]) -> list[str]:
        return [name for name in names for _ in masks[name]]

    modalities = list(fusion.modalities)
    if isinstance(fusion, CrossAttentionFusion):
        return plain([own]), states([name for name in modalities if name != own])
    if isinstance(fusion, SelfAttentionFusion):
        return plain(modalities), states(modalities)
    if isinstance(fusion, BottleneckFusion):
        shared = [SHARED] * len(fusion.bottleneck)
        with_shared = num_readers > len(masks[own])
        return [*(shared if with_shared else []), *plain([own])], [*shared, *states([own])]
    latents = [LATENT] * len(fusion.latents)
    return latents, [*latents, *states(modalities)]
