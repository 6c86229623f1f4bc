"""Attention heads, and the dimensions inside them: found by how modules are laid out, cut without a dependency graph.

A head is rows of the query, key and value projections and columns of the output projection. Removing it is the same as
setting those columns to zero (Michel et al. 2019, arXiv 1905.10650), which every cut is checked by.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import PruneConfig
from distill.contracts import Batch, UserError
from distill.prune.measuring import answers
from distill.prune.plans import PrunePlan, apply
from distill.prune.selection import choose, choose_in_sets

TOLERANCE = 1e-3
"""How much outputs may differ by rounding, as a share of the largest."""


@dataclass(frozen=True)
class Layout:
    """How a kind of attention module names its parts.

    Attributes:
        inputs: projections to queries, keys and values, or the one of all three.
        output: the projection of what heads give, beside them or, after "..", beside the module.
        count: the attribute with the number of heads.
        size: that with the dimensions of a head, if any.
        width: that with the product of both, if any.
    """

    inputs: tuple[str, ...]
    output: str
    count: str
    size: str = ""
    width: str = ""


LAYOUTS = (
    Layout(("q", "k", "v"), "o", "heads"),
    Layout(("query", "key", "value"), "..output.dense", "num_attention_heads", "attention_head_size", "all_head_size"),
    Layout(("q_proj", "k_proj", "v_proj"), "o_proj", "num_attention_heads", "head_dim"),
    Layout(("q_proj", "k_proj", "v_proj"), "out_proj", "num_heads", "head_dim"),
    Layout(("q_lin", "k_lin", "v_lin"), "out_lin", "n_heads", "attention_head_size"),
    Layout(("qkv",), "proj", "num_heads", "head_dim", "attn_dim"),
)
"""Our own attention, transformers' families of BERT, ViT, CLIP and DistilBERT, and timm's ViTs."""
HEAD_COUNTS = tuple(dict.fromkeys(layout.count for layout in LAYOUTS))
HEAD_LAYERS = tuple(dict.fromkeys(name for layout in LAYOUTS for name in layout.inputs))


@dataclass(frozen=True)
class Attention:
    """An attention module: its path, its layout, the path of its output projection, heads and dimensions of each."""

    path: str
    layout: Layout
    output: str
    heads: int
    size: int

    @property
    def inputs(self) -> list[str]:
        """Paths of its projections."""
        return [f"{self.path}.{name}" for name in self.layout.inputs]

    @property
    def parts(self) -> int:
        """How many of queries, keys and values one projection makes."""
        return 3 // len(self.inputs)

    def gone(self, before: PrunePlan) -> int:
        """Return how many heads an earlier plan has removed."""
        return before.lost(f"{self.inputs[0]}.weight", 0) // (self.size * self.parts)


def attentions(model: nn.Module, prefixes: Sequence[str]) -> list[Attention]:
    """Return the attention modules under some paths whose heads can be cut, in order."""
    names = dict(model.named_modules())
    found = []
    for path, module in names.items():
        if not any(f"{path}.".startswith(f"{prefix}.") for prefix in prefixes):
            continue
        for layout in LAYOUTS:
            output = f"{path}.{layout.output}"
            if layout.output.startswith(".."):
                output = f"{path.rpartition('.')[0]}.{layout.output[2:]}"
            layers = [names.get(name) for name in (*(f"{path}.{name}" for name in layout.inputs), output)]
            heads = getattr(module, layout.count, None)
            if not isinstance(heads, int) or not all(isinstance(layer, nn.Linear) for layer in layers):
                continue
            size = layers[-1].in_features // heads  # type: ignore[union-attr]
            mine = Attention(path, layout, output, heads, int(size))
            rows = {layer.out_features // mine.parts for layer in layers[:-1]}  # type: ignore[union-attr]
            if rows == {heads * size} and not _normed(module):
                found.append(mine)
    return found


def plan_heads(
    model: nn.Module,
    example: Batch,
    config: PruneConfig,
    prefixes: Sequence[str],
    weights: Mapping[str, Tensor],
    *,
    before: PrunePlan,
    seed: int,
) -> PrunePlan:
    """Decide which heads stay, of all attention under the prefixes together, or with ``scope: layer`` of each.

    Args:
        model: as the earlier plan leaves it.
        example: rows by which the cut is checked.
        config: ``heads``, ``scope``, ``importance``.
        prefixes: module paths.
        weights: the score of each weight; a head's is the sum over its rows and columns, by the layer's mean.
        before: the earlier plan; heads that it removed count as removed.
        seed: for "random" importance.

    Raises:
        UserError: there is no attention whose heads can be cut, or no importance of them.
    """
    found = _some(attentions(model, prefixes), config, "heads", prefixes)
    scores = [_by_head(each, weights).sum(1) for each in found]
    if config.importance == "random":
        scores = _random(scores, seed)
    members = range(len(found))
    sets = [(config.heads, [i]) for i in members] if config.scope == "layer" else [(config.heads, list(members))]
    gone = [each.gone(before) for each in found]
    lost = choose_in_sets(sets, [score / score.mean() for score in scores], [1] * len(found), gone)
    part = PrunePlan()
    for each, indices in zip(found, lost, strict=True):
        kept = [head for head in range(each.heads) if head not in indices]
        rows = [head * each.size + place for head in kept for place in range(each.size)]
        if indices:
            _cut(part, model, each, rows, rows, {each.layout.count: len(kept)})
    total = sum(each.heads for each in found) + sum(gone)
    part.report["heads"] = [total, total - sum(gone) - sum(map(len, lost))]
    return _checked(model, example, part, found)


def plan_dims(
    model: nn.Module,
    example: Batch,
    config: PruneConfig,
    prefixes: Sequence[str],
    weights: Mapping[str, Tensor],
    *,
    seed: int,
) -> PrunePlan:
    """Decide which dimensions of heads stay: as many in each head, of queries and keys others than of values.

    Scores keep the scale that they had, since it is an attribute of the module. timm's attention takes it from the
    width, so its dimensions stay. Arguments and errors are those of :func:`plan_heads`.
    """
    able = [each for each in attentions(model, prefixes) if each.parts == 1]
    found = _some(able, config, "head_dims", prefixes)
    part, after = PrunePlan(), 0
    for number, each in enumerate(found):
        q, k, v, o = _by_part(each, weights)
        sides = [q + k, v + o]
        if config.importance == "random":
            sides = _random(sides, seed + number + 1)
        kept = [_best(side, config) for side in sides]
        after += len(kept[0]) // each.heads
        if len(kept[0]) < each.heads * each.size:
            sizes = {each.layout.size: len(kept[0]) // each.heads} if each.layout.size else {}
            _cut(part, model, each, kept[0], kept[1], sizes)
    part.report["head_dims"] = [sum(each.size for each in found), after]
    return _checked(model, example, part, found)


def check_attention(model: nn.Module, config: PruneConfig, prefixes: Sequence[str]) -> None:
    """Check that there is attention for what a config asks of it; errors are those of :func:`plan_heads`."""
    found = attentions(model, prefixes)
    if config.heads:
        _some(found, config, "heads", prefixes)
    if config.head_dims:
        _some([each for each in found if each.parts == 1], config, "head_dims", prefixes)


def _some(found: list[Attention], config: PruneConfig, what: str, prefixes: Sequence[str]) -> list[Attention]:
    if config.importance == "bn_scale":
        raise UserError(f"prune.{what}: attention has no BatchNorm for prune.importance=bn_scale; choose magnitude")
    if not found:
        raise UserError(
            f"prune.{what}: no attention in {', '.join(prefixes)} whose {what} can be cut; set it to 0, or name other "
            "prune.modules"
        )
    return found


def _best(scores: Tensor, config: PruneConfig) -> list[int]:
    """Rows of the dimensions that stay, head by head, of scores [heads, size]."""
    heads, size = scores.shape
    kept = []
    for head in range(heads):
        (lost,) = choose([scores[head]], config.head_dims, [config.round_to])
        kept += [head * size + place for place in range(size) if place not in lost]
    return kept


def _by_part(each: Attention, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Scores [heads, size] of queries, keys, values and of what the output projection reads."""
    joined = torch.cat([weights[f"{name}.weight"].sum(1) for name in each.inputs])
    return [*joined.view(3, each.heads, each.size), weights[f"{each.output}.weight"].sum(0).view(each.heads, -1)]


def _by_head(each: Attention, weights: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(_by_part(each, weights)).sum(0)


def _random(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(score.shape, generator=generator) for score in like]


def _cut(
    part: PrunePlan, model: nn.Module, each: Attention, rows: list[int], values: list[int], sizes: dict[str, int]
) -> None:
    """Add to a plan the rows of queries and keys that stay, and those of values."""
    whole = each.heads * each.size
    if each.layout.width:
        sizes = {**sizes, each.layout.width: len(rows)}
    part.attributes[each.path] = dict(sizes)
    if each.parts == 3:
        rows = [third * whole + row for third in range(3) for row in rows]
    for name in each.inputs:
        mine = values if name == each.inputs[-1] and each.parts == 1 else rows
        layer: Any = model.get_submodule(name)
        for leaf in ("weight", "bias"):
            if getattr(layer, leaf) is not None:
                part.tensors[f"{name}.{leaf}"] = {"0": {"of": layer.out_features, "kept": mine}}
        part.attributes[name] = {"out_features": len(mine)}
    part.tensors[f"{each.output}.weight"] = {"1": {"of": whole, "kept": values}}
    part.attributes[each.output] = {"in_features": len(values)}


def _checked(model: nn.Module, example: Batch, part: PrunePlan, found: Sequence[Attention]) -> PrunePlan:
    """The plan, if the smaller model says what the whole one does where zeros stand for all that goes."""
    silent = copy.deepcopy(model).requires_grad_(False)
    for each in found:
        for name, dim in ((f"{each.inputs[0]}.weight", 0), (f"{each.inputs[0]}.bias", 0), (f"{each.output}.weight", 1)):
            for cut in part.tensors.get(name, {}).values():
                gone = torch.ones(cut["of"], dtype=torch.bool)
                gone[cut["kept"]] = False
                silent.get_parameter(name).index_fill_(dim, gone.nonzero().flatten(), 0.0)
    expected = answers(silent, [example])
    try:
        found_now = answers(apply(copy.deepcopy(model), part), [example])
        wrong = max(_difference(expected[name], found_now[name]) for name in expected)
    except (RuntimeError, ValueError) as error:
        wrong, why = math.inf, " ".join(str(error).split())[:200]
    else:
        why = f"its outputs differ by {wrong:.1g}"
    if wrong > TOLERANCE:
        raise UserError(
            f"prune.heads, prune.head_dims: attention of {found[0].path!r} or one after it cannot be cut ({why}); set "
            "both to 0, or name other prune.modules"
        )
    return part


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((one - other).abs().max() / one.abs().max().clamp(min=1e-6)).item()


def _normed(module: nn.Module) -> bool:
    """Whether a norm or a gate over all heads would have to be cut too."""
    return any(not isinstance(getattr(module, name, None), nn.Identity | None) for name in ("norm", "gate"))
