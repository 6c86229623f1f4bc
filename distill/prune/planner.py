"""Deciding what of a model stays: blocks, heads, dimensions of heads, channels, in this order.

Channels that must go together are found with a dependency graph (Fang et al. 2023, "DepGraph", arXiv 2301.12900,
through the torch-pruning package). Each decision is a plan of its own, for what the one before leaves; the result is
their composition.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import PruneConfig, nearest
from distill.contracts import Batch, UserError
from distill.prune.channels import ChannelGroup, channel_groups, importance
from distill.prune.checks import modules_of
from distill.prune.depth import plan_depth
from distill.prune.heads import plan_dims, plan_heads
from distill.prune.measuring import answers, drop, run
from distill.prune.plans import PrunePlan, apply, compose
from distill.prune.reading import changed_attributes, kept_indices, number_elements
from distill.prune.saliency import Loss, saliency
from distill.prune.selection import choose_in_sets, ranked_together
from distill.prune.sensitivity import scan, stage_of


def prune(
    model: nn.Module,
    example: Batch,
    config: PruneConfig,
    *,
    rows: Sequence[Batch] = (),
    loss: Loss | None = None,
    seed: int = 0,
) -> tuple[nn.Module, PrunePlan]:
    """Return a pruned copy of a model, and the plan that made it; see :func:`plan` for arguments and errors."""
    made = plan(model, example, config, rows=rows, loss=loss, seed=seed)
    return apply(copy.deepcopy(model), made), made


@torch.enable_grad()
def plan(
    model: nn.Module,
    example: Batch,
    config: PruneConfig,
    *,
    rows: Sequence[Batch] = (),
    loss: Loss | None = None,
    seed: int = 0,
    before: PrunePlan | None = None,
) -> PrunePlan:
    """Decide what stays.

    Channels of all groups under ``config.modules`` (absent: :func:`distill.prune.checks.modules_of`) are ranked
    together, or in the sets that ``scope`` and ``ratios`` make; other modules only lose the inputs that vanish. Outputs
    of the model keep their widths.

    Args:
        model: any ``Batch -> Outputs`` module, without taps (hooks do not survive copying); it is not changed.
        example: at least two rows, with every modality present.
        config: what to remove, and by which importance; ``steps``, ``rows`` and ``train`` are not read.
        rows: batches for "taylor" and "hessian" importance, ``depth`` and ``sensitivity``; the example if there are
            none. "hessian" is exact for batches of one row.
        loss: ``(outputs, batch) -> scalar``, for "taylor" and "hessian"; the labels' cross-entropy if None.
        seed: for "random" importance.
        before: a plan by which the model was pruned already: what that removed counts towards the ratios.

    Returns:
        The plan from the unpruned model on, with its report.

    Raises:
        UserError: the config names nothing that can be pruned, the pruned model does not run, or the importance has
            neither a loss nor labels, or no BatchNorm.
    """
    whole = copy.deepcopy(model).cpu().eval()
    example = _on_cpu(example)
    batches = [_on_cpu(batch) for batch in rows] or [example]
    search = _Search(whole, example, config, batches, loss, seed, before or PrunePlan())
    if config.depth:
        search.depth()
    if config.heads or config.head_dims:
        search.heads()
    if config.ratio or config.ratios:
        search.channels()
    return _measured(whole, search.now, search.made, example)


class _Search:
    """A model on its way, and the plan that made it."""

    def __init__(
        self,
        model: nn.Module,
        example: Batch,
        config: PruneConfig,
        batches: Sequence[Batch],
        loss: Loss | None,
        seed: int,
        before: PrunePlan,
    ) -> None:
        self.now = copy.deepcopy(model).requires_grad_(True)
        self.example, self.config, self.batches, self.loss, self.seed = example, config, batches, loss, seed
        self.made = before

    def depth(self) -> None:
        """Remove blocks."""
        self._take(plan_depth(self.now, self.config.depth, self.batches, before=self.made))

    def heads(self) -> None:
        """Remove heads, and then dimensions of those that stay."""
        prefixes = self._prefixes()
        given = (self.now, self.example, self.config, prefixes)
        if self.config.heads:
            self._take(plan_heads(*given, self._weights(), before=self.made, seed=self.seed))
        if self.config.head_dims:
            self._take(plan_dims(*given, self._weights(), seed=self.seed))

    def channels(self) -> None:
        """Remove channels."""
        twin, groups = self._traced()
        judged = importance(groups, self.config.importance, twin, self._weights(), self.seed)
        able = [group for group, score in zip(groups, judged, strict=True) if score is not None]
        scores = [score for score in judged if score is not None]
        if not able:
            self._refuse(groups)
        units = [self.config.round_to // math.gcd(self.config.round_to, group.parts) for group in able]
        gone = [group.gone(self.made) for group in able]
        report: dict[str, Any] = {}
        if self.config.sensitivity:
            sets, report["sensitivity"] = self._scanned(able, scores, units, gone)
            lost = choose_in_sets(sets, scores, units, [0] * len(able))
        else:
            layers, alone = [group.layers for group in able], self.config.scope == "layer"
            sets = ranked_together(layers, self.config.ratio, self._ratios(layers), alone=alone)
            lost = choose_in_sets(sets, scores, units, gone)
        part = self._cut(twin, able, lost)
        before = sum((group.size + count) * group.parts for group, count in zip(able, gone, strict=True))
        left = sum((group.size - len(indices)) * group.parts for group, indices in zip(able, lost, strict=True))
        part.report.update(report, channels=[before, left])
        self._take(part)

    def _scanned(
        self, groups: Sequence[ChannelGroup], scores: Sequence[Tensor], units: Sequence[int], gone: Sequence[int]
    ) -> tuple[list[tuple[float, list[int]]], dict[str, Any]]:
        """The stages with the ratios that a scan gives them, and its table."""
        stages: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            stages.setdefault(stage_of(group.layers), []).append(index)
        whole = answers(self.now, self.batches)

        def cost(lost: list[list[int]]) -> float:
            twin, again = self._traced()
            mine = {group.layers[0]: group for group in again}
            part = self._cut(twin, [mine[group.layers[0]] for group in groups], lost)
            return drop(whole, answers(apply(copy.deepcopy(self.now), part), self.batches))

        there = sum(len(score) for score in scores) + sum(gone)
        ratios, table = scan(stages, scores, units, cost, int(self.config.ratio * there) - sum(gone))
        return [(ratios[stage], members) for stage, members in stages.items()], table

    def _traced(self) -> tuple[nn.Module, list[ChannelGroup]]:
        twin = copy.deepcopy(self.now)
        return twin, channel_groups(twin, self.example, self._prefixes())

    def _cut(self, twin: nn.Module, groups: Sequence[ChannelGroup], lost: Sequence[list[int]]) -> PrunePlan:
        """The plan by which a traced twin's groups lose channels; the twin is of no use afterwards."""
        number_elements(twin)  # importance is known: from here on each element says where it came from
        for group, indices in zip(groups, lost, strict=True):
            if indices:
                group.cut(indices)
        return PrunePlan(kept_indices(self.now, twin), changed_attributes(self.now, twin))

    def _take(self, part: PrunePlan) -> None:
        apply(self.now, part)
        self.made = compose(self.made, part)

    def _weights(self) -> dict[str, Tensor]:
        return saliency(self.now, self.config.importance, self.batches, self.loss)

    def _prefixes(self) -> list[str]:
        if not self.config.modules:
            return modules_of(self.now)
        return list(self._here(self.config.modules, "modules").values())

    def _ratios(self, layers: Sequence[Sequence[str]]) -> dict[str, float]:
        """Ratios by the prefixes that the model has now; under each is some of the groups' layers."""
        config, known = self.config.ratios, [path for paths in layers for path in paths]
        here = self._here(config, "ratios")
        for prefix, now in here.items():
            if not any(f"{path}.".startswith(f"{now}.") for path in known):
                raise UserError(f"prune.ratios: {prefix!r} has no channels to prune; {nearest(now, known)}")
        return {now: config[prefix] for prefix, now in here.items()}

    def _here(self, paths: Iterable[str], field: str) -> dict[str, str]:
        """Path of a module in the unpruned model -> that in the model as it is, if it is there still."""
        names = dict(self.now.named_modules())
        found = {}
        for path in paths:
            now = self.made.renamed(path)
            if now is not None and now not in names:
                raise UserError(
                    f"prune.{field}: the model has no module {path!r}; {nearest(path, filter(None, names))}"
                )
            if now is not None:
                found[path] = now
        return found

    def _refuse(self, groups: Sequence[ChannelGroup]) -> None:
        if groups and self.config.importance == "bn_scale":
            raise UserError(
                "prune.importance=bn_scale: no channels there have a BatchNorm; choose prune.importance=magnitude"
            )
        raise UserError(f"prune.modules={self._prefixes()}: no channels can be pruned there; name other modules")


def _measured(whole: nn.Module, pruned: nn.Module, made: PrunePlan, example: Batch) -> PrunePlan:
    """Run the model before and after; add the report, and the encoders' new widths."""
    before, flops_before, _ = run(whole, example)
    try:
        after, flops_after, widths = run(pruned, example)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the pruned model does not run ({' '.join(str(error).split())[:200]}); leave out some of prune.modules"
        ) from error
    for part_before, part_after in zip(before, after, strict=True):
        for name, tensor in part_before.items():
            assert part_after[name].shape == tensor.shape or part_before is before.features, f"{name} was pruned"
    modules = dict(pruned.named_modules())
    attributes = {path: {"out_dim": width} for path, width in widths.items() if modules[path].out_dim != width}
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (whole, pruned)]
    report = {"parameters": sizes, "flops": [flops // len(example.ids) for flops in (flops_before, flops_after)]}
    return compose(made, PrunePlan(attributes=attributes, report=report))


def _on_cpu(batch: Batch) -> Batch:
    move = {name: {key: tensor.cpu() for key, tensor in getattr(batch, name).items()} for name in batch._fields[2:]}
    return Batch(batch.ids.cpu(), batch.views.cpu(), **move)
