"""Groups of channels that must be pruned together, and how much each channel matters.

What torch-pruning's dependency graph (Fang et al. 2023, "DepGraph", arXiv 2301.12900) finds, restricted to the
groups that it follows rightly and that leave the model's outputs alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.contracts import Batch
from distill.prune.heads import HEAD_COUNTS, HEAD_LAYERS
from distill.prune.plans import PrunePlan

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several layers that go together.

    Attributes:
        members: torch-pruning's group, with all its indices.
        graph: the dependency graph that it belongs to.
        parts: into how many equal parts grouped convolutions and GroupNorm split it; each loses the same channels.
        size: channels of a part.
        layers: paths of the layers whose outputs these channels are; the first is where it is cut.
    """

    members: Any
    graph: Any
    parts: int
    size: int
    layers: tuple[str, ...]

    @property
    def count(self) -> int:
        """Its channels, in all parts."""
        return self.size * self.parts

    def gone(self, before: PrunePlan) -> int:
        """Return how many channels of a part an earlier plan has removed."""
        dim = int(isinstance(self.members[0].dep.target.module, nn.ConvTranspose2d))
        return before.lost(f"{self.layers[0]}.weight", dim) // self.parts

    def cut(self, lost: Sequence[int]) -> None:
        """Remove channels from every layer of the group, in place.

        Args:
            lost: indices below ``size``, removed from each part.
        """
        root = self.members[0].dep
        indices = [part * self.size + index for part in range(self.parts) for index in lost]
        self.graph.get_pruning_group(root.target.module, root.handler, indices).prune(record_history=False)


def channel_groups(model: nn.Module, example: Batch, prefixes: Sequence[str]) -> list[ChannelGroup]:
    """Trace a model and return the groups that may be pruned.

    Layers outside the prefixes keep their outputs, attention layers their heads, and the model its output widths. So do
    layers of modules with ``splits_channels``, which arrange outputs in groups that torch-pruning does not follow, and
    of those with ``joins_tokens``, which it takes for channels, all but the first ones of their blocks' MLPs.

    Args:
        model: a ``Batch -> Outputs`` module whose parameters all require gradients.
        example: at least two rows, with every modality present.
        prefixes: module paths that the model has.

    Returns:
        Groups without a common channel.
    """
    import timm  # noqa: F401 - torch_pruning does so under a bare except, which would swallow a signal that asks to stop
    import torch_pruning as tp  # here, since applying a finished plan must work where the package is not installed

    names = dict(model.named_modules())
    graph = tp.DependencyGraph()
    with warnings.catch_warnings():  # it warns of parameters that lie in no layer, and prunes their last dimension
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        graph.build_dependency(model, example_inputs=example, forward_fn=_differentiable_outputs)
    fixed = list(_fixed_layers(names, prefixes))
    found = graph.get_all_groups(ignored_layers=fixed, root_module_types=[*_CONVOLUTIONS, nn.Linear])
    result = []
    for members in found:
        if _is_sound(members, graph, tp.ops.OPTYPE.OUTPUT):
            parts = _equal_parts(members)
            layers = _output_layers(members, graph, names)
            result.append(ChannelGroup(members, graph, parts, len(members[0].idxs) // parts, layers))
    return result


def importance(
    groups: Sequence[ChannelGroup], kind: str, model: nn.Module, weights: Mapping[str, Tensor], seed: int
) -> list[Tensor | None]:
    """Score channels by the weights of the group's layers that belong to each.

    A group's scores have the mean 1, so that groups compare; scales of BatchNorm compare as they are.

    Args:
        groups: from :func:`channel_groups`.
        kind: "magnitude", "taylor", "hessian", "bn_scale" or "random".
        model: the traced model.
        weights: the score of each weight, from :func:`distill.prune.saliency.saliency`.
        seed: of "random".

    Returns:
        For each group float [size], or None where no layer has weights to judge by: of "bn_scale" those of BatchNorm.
    """
    import torch_pruning as tp

    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(group.size, generator=generator) for group in groups]
    scales = {"normalizer": None, "target_types": [nn.modules.batchnorm._BatchNorm]} if kind == "bn_scale" else {}
    judge = tp.importance.GroupMagnitudeImportance(p=1, **scales)
    with _in_place_of_weights(model, weights):
        scores = [judge(group.members) for group in groups]
    return [
        score.nan_to_num(0.0).view(group.parts, -1).mean(0) if isinstance(score, Tensor) else None
        for group, score in zip(groups, scores, strict=True)
    ]


@contextmanager
def _in_place_of_weights(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model hold other values than its weights; torch-pruning 1.6.1's own judges leave out some layers."""
    parameters = dict(model.named_parameters())
    weights = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = weights[name]


def _differentiable_outputs(model: nn.Module, example: Batch) -> list[Tensor]:
    whole = [module for module in model.modules() if getattr(module, "unprunable", "")]
    hooks = [module.register_forward_hook(_detached) for module in whole]  # it cannot follow recurrences
    try:
        tensors = [tensor for part in model(example) for tensor in part.values()]
    finally:
        for hook in hooks:
            hook.remove()
    # the product hides the last layer, so that the graph's end is an output, whose width is fixed
    return [tensor * 1.0 for tensor in tensors if tensor.requires_grad]


def _detached(module: nn.Module, args: object, encoded: Any) -> Any:
    """What an encoder gave, as if it were an input."""
    return encoded._make(part.detach() for part in encoded)


def _fixed_layers(names: Mapping[str, nn.Module], prefixes: Sequence[str]) -> Iterator[nn.Module]:
    splitting = [name for name, module in names.items() if getattr(module, "splits_channels", False)]
    joining = [name for name, module in names.items() if getattr(module, "joins_tokens", False)]
    for name, module in names.items():
        parent, _, leaf = name.rpartition(".")
        inside = any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
        in_attention = leaf in HEAD_LAYERS and any(hasattr(names[parent], count) for count in HEAD_COUNTS)
        split = any(name.startswith(f"{owner}.") for owner in splitting)
        split |= any(name.startswith(f"{owner}.") for owner in joining) and not name.endswith(".mlp.0")
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear, nn.Embedding)) and (not inside or in_attention or split):
            yield module


def _is_sound(members: Any, graph: Any, output_type: Any) -> bool:
    """Refuse groups that reach an output, and those that torch-pruning 1.6.1 is known to follow wrongly."""
    for dep, indices in members:
        layer = dep.target.module
        if dep.target.type == output_type:
            return False
        if isinstance(layer, _CONVOLUTIONS) and 1 < layer.groups == layer.in_channels != layer.out_channels:
            return False  # depthwise with a multiplier
        is_output = graph.is_out_channel_pruning_fn(dep.handler)
        size = graph.get_out_channels(layer) if is_output else graph.get_in_channels(layer)
        if size is not None and indices and max(indices) >= size:
            return False
    return True


def _output_layers(members: Any, graph: Any, names: Mapping[str, nn.Module]) -> tuple[str, ...]:
    paths = {module: path for path, module in names.items()}
    layers = [dep.target.module for dep, _ in members if graph.is_out_channel_pruning_fn(dep.handler)]
    kinds = (*_CONVOLUTIONS, nn.Linear, nn.Embedding)
    return tuple(dict.fromkeys(paths[layer] for layer in layers if isinstance(layer, kinds) and layer in paths))


def _equal_parts(members: Any) -> int:
    parts = 1
    for dep, _ in members:
        layer = dep.target.module
        if isinstance(layer, _CONVOLUTIONS) and layer.groups != layer.out_channels:
            parts = max(parts, layer.groups)
        if isinstance(layer, nn.GroupNorm):
            parts = max(parts, layer.num_groups)
    return parts
