"""Structured pruning as a plan: which channels stay, found once with a dependency graph, applied anywhere.

:func:`plan` groups the channels that must go together (Fang et al. 2023, "DepGraph", arXiv 2301.12900, through
the torch-pruning package), ranks them over all prunable modules, and writes down what remains as JSON.
:func:`apply` needs just that JSON: it cuts a model's tensors, so the same call prunes trained weights, and
rebuilds the small architecture before ``load_weights`` reads them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.channels import channel_groups, importance
from distill.config import PruneConfig, Recipe
from distill.contracts import Batch, Outputs, UserError
from distill.formats import TEXT
from distill.fusion import FUSIONS
from distill.multimodal import Encoded, Encoder
from distill.operations import flop_counter
from distill.runs import read_json, write_json

LEAST_KEPT = 0.1
"""Share of a group's channels that always stays, so that no layer collapses under global ranking."""


@dataclass(frozen=True)
class PrunePlan:
    """What remains of a model.

    Attributes:
        tensors: state-dict name -> dimension (as a string, for JSON) -> ``{"of": old size, "kept": [indices]}``.
        attributes: module path -> plain attribute -> new value (``in_channels``, ``normalized_shape``, ``out_dim``...).
        report: ``parameters``, ``flops`` (a row; a multiply-add is two) and ``channels`` (of what may be pruned), each
            ``[before, after]``.
    """

    tensors: dict[str, dict[str, dict[str, Any]]]
    attributes: dict[str, dict[str, Any]]
    report: dict[str, list[int]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> PrunePlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            UserError: the file is absent or is no plan.
        """
        try:
            return cls(**read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not readable as a pruning plan: {error}; prune again") from error


def prune(
    model: nn.Module,
    example: Batch,
    config: PruneConfig,
    *,
    loss: Callable[[Outputs], Tensor] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, PrunePlan]:
    """Return a pruned copy of a model, and the plan that made it; see :func:`plan` for arguments and errors."""
    made = plan(model, example, config, loss=loss, seed=seed)
    return apply(copy.deepcopy(model), made), made


def apply(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Cut a model's tensors and set its sizes, in place.

    Make optimizers afterwards: cut parameters are new objects.

    Args:
        model: as large as the one that was planned for; its weights may be anything.
        plan: from :func:`plan` or :meth:`PrunePlan.load`.

    Returns:
        The same model.

    Raises:
        UserError: the plan is for another architecture, or was applied before; the model is untouched.
    """
    owners, before = dict(model.named_modules()), model.state_dict()
    for name, cuts in plan.tensors.items():
        sizes = {int(dim): cut["of"] for dim, cut in cuts.items()}
        if name not in before or any(before[name].shape[dim] != size for dim, size in sizes.items()):
            found = tuple(before[name].shape) if name in before else "absent"
            raise UserError(
                f"pruning plan: {name!r} is {found}, expected sizes {sizes}; build the model it was made for"
            )
    for name, cuts in plan.tensors.items():
        path, _, leaf = name.rpartition(".")
        old = getattr(owners[path], leaf)
        new = old.detach()
        for dim, cut in cuts.items():
            new = new.index_select(int(dim), torch.tensor(cut["kept"], device=new.device))
        setattr(owners[path], leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for path, values in plan.attributes.items():
        for attribute, value in values.items():
            setattr(owners[path], attribute, tuple(value) if isinstance(value, list) else value)
    return model


def default_modules(able: Sequence[str], *, fusion: bool) -> list[str]:
    """Return what is pruned where a recipe names nothing: all encoders that have channels, but that of text.

    Where there are none that is the text's, and where this has no channels either, the fusion.

    Args:
        able: modalities whose encoders have channels.
        fusion: whether there is a fusion with channels.
    """
    chosen = [f"encoders.{name}" for name in able if name != TEXT] or [f"encoders.{name}" for name in able]
    return chosen or (["fusion"] if fusion else [])


def check_pruning(recipe: Recipe, encoders: Mapping[str, Any]) -> None:
    """Check that the student has what may be pruned, as far as its config tells.

    Raises:
        UserError: it lacks an encoder, or the fusion, that a path of ``prune.modules`` names, or that encoder has no
            channels to remove.
    """
    student = recipe.student
    whole = {name: getattr(encoders[part.type], "unprunable", "") for name, part in student.encoders.items()}
    prunable = [name for name, reason in whole.items() if not reason]
    fused = student.fusion is not None and not FUSIONS[student.fusion.type].plain
    able = [*(f"encoders.{name}" for name in prunable), *(["fusion"] if fused else [])]
    hint = f"set it to [{', '.join(able)}]"
    if not able:
        raise UserError("prune.modules: the student has no channels to prune; end with 'distill train'")
    for path in recipe.prune.modules or default_modules(prunable, fusion=fused):
        owner, *inner = path.split(".")
        foreign = owner in ("encoders", "necks") and not {*inner[:1]} <= {*student.encoders}
        if foreign or (student.fusion is None and owner in ("fusion", "necks")):
            raise UserError(f"prune.modules: the student has no module {path!r}; {hint}")
        if owner == "encoders" and inner and whole[inner[0]]:
            raise UserError(f"prune.modules: {path!r} has no channels to remove: {whole[inner[0]]}; {hint}")


@torch.enable_grad()
def plan(
    model: nn.Module,
    example: Batch,
    config: PruneConfig,
    *,
    loss: Callable[[Outputs], Tensor] | None = None,
    seed: int = 0,
) -> PrunePlan:
    """Decide which channels stay.

    Channels of all groups under ``config.modules`` (absent: :func:`default_modules`) are ranked together; other modules
    only lose the inputs that vanish. Attention keeps its heads (their inputs and MLPs are pruned); outputs of the model
    keep their widths.

    Args:
        model: any ``Batch -> Outputs`` module, without taps (hooks do not survive copying); it is not changed.
        example: at least two rows, with every modality present.
        config: ``ratio`` of channels to remove, ``importance``, ``round_to``, ``modules``.
        loss: ``Outputs -> scalar`` on ``example``'s rows, for "taylor" importance; the labels' cross-entropy if None.
        seed: for "random" importance.

    Returns:
        The plan, with its report.

    Raises:
        UserError: ``config.modules`` names nothing that can be pruned, the pruned model does not run, or "taylor"
            has neither a loss nor labels.
    """
    original = copy.deepcopy(model).cpu().eval()
    example = _on_cpu(example)
    twin = copy.deepcopy(original).requires_grad_(True)
    modules = config.modules or _default_modules(twin)
    groups = channel_groups(twin, example, modules)
    judged = importance(groups, config.importance, twin, example, loss, seed)
    scored = [(group, score) for group, score in zip(groups, judged, strict=True) if score is not None]
    if not scored:
        raise UserError(f"prune.modules={modules}: no channels can be pruned there; name other modules")
    units = [config.round_to // math.gcd(config.round_to, group.parts) for group, _ in scored]
    removed = choose([score for _, score in scored], config.ratio, units)
    _number_elements(twin)  # importance is known: from here on each element says where it came from
    for (group, _), lost in zip(scored, removed, strict=True):
        if lost:
            group.cut(lost)
    before = sum(group.size * group.parts for group, _ in scored)
    gone = sum(len(lost) * group.parts for (group, _), lost in zip(scored, removed, strict=True))
    made = PrunePlan(_kept(original, twin), _changed_attributes(original, twin), {"channels": [before, before - gone]})
    return _measured(original, made, example)


def choose(scores: Sequence[Tensor], ratio: float, units: Sequence[int]) -> list[list[int]]:
    """Rank channels of all groups together and pick those to remove.

    Args:
        scores: importance of each group's channels, comparable between groups.
        ratio: share of all channels to remove, before rounding.
        units: the number kept in each group is rounded to the nearest multiple of its unit, at least one; a group
            that is smaller than its unit stays whole.

    Returns:
        For each group the sorted indices to remove.
    """
    guarded = []
    for score, unit in zip(scores, units, strict=True):
        least = min(len(score), max(unit, math.ceil(LEAST_KEPT * len(score))))
        safe = score.double().clone()
        safe[score.topk(least).indices] = torch.inf
        guarded.append(safe)
    joined = torch.cat(guarded)
    cut = torch.zeros(len(joined), dtype=torch.bool)
    cut[joined.argsort(stable=True)[: int(ratio * len(joined))]] = True
    cut &= joined.isfinite()
    result = []
    for score, unit, part in zip(scores, units, cut.split([len(score) for score in scores]), strict=True):
        kept = len(score) - int(part.sum())
        if kept < len(score):
            kept = min(len(score), max(unit, int(kept / unit + 0.5) * unit))
        result.append(sorted(score.argsort(stable=True)[: len(score) - kept].tolist()))
    return result


def _number_elements(module: nn.Module) -> None:
    """Replace every floating value by its place in its tensor; float64 holds them exactly."""
    module.zero_grad(set_to_none=True)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)


def _kept(original: nn.Module, twin: nn.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """Read from a numbered and pruned twin which indices of each tensor remain."""
    before, result = original.state_dict(), {}
    for name, numbers in twin.state_dict().items():
        shape = tuple(before[name].shape)
        if tuple(numbers.shape) == shape:
            continue
        places, cuts = numbers.long(), {}
        for dim, size in enumerate(shape):
            # sorted, since torch-pruning 1.6.1 may leave those of a LayerNorm in the order of a set
            kept = (places // math.prod(shape[dim + 1 :]) % size).unique()
            if len(kept) != numbers.shape[dim]:
                raise UserError(
                    f"prune.modules: the dependencies of {name!r} cannot be followed; leave out the part that holds it"
                )
            if len(kept) < size:
                cuts[str(dim)] = {"of": size, "kept": kept.tolist()}
        result[name] = cuts
    return result


def _changed_attributes(original: nn.Module, twin: nn.Module) -> dict[str, dict[str, Any]]:
    changed = {}
    after = dict(twin.named_modules())
    for path, module in original.named_modules():
        now = vars(after[path])
        values = {name: now[name] for name, value in vars(module).items() if _is_size(value) and now.get(name) != value}
        if values:
            changed[path] = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return changed


def _is_size(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(item, int) for item in value))


def _measured(original: nn.Module, made: PrunePlan, example: Batch) -> PrunePlan:
    """Run the model before and after; add the report, and the encoders' new widths."""
    before, flops_before, _ = _run(original, example)
    parameters_before = sum(parameter.numel() for parameter in original.parameters())
    pruned = apply(original, made)
    try:
        after, flops_after, widths = _run(pruned, example)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the pruned model does not run ({' '.join(str(error).split())[:200]}); leave out some of prune.modules"
        ) from error
    for part_before, part_after in zip(before, after, strict=True):
        for name, tensor in part_before.items():
            assert part_after[name].shape == tensor.shape or part_before is before.features, f"{name} was pruned"
    attributes = dict(made.attributes)
    modules = dict(pruned.named_modules())
    for path, width in widths.items():
        if modules[path].out_dim != width:
            attributes[path] = attributes.get(path, {}) | {"out_dim": width}
    report = {
        "parameters": [parameters_before, sum(parameter.numel() for parameter in pruned.parameters())],
        "flops": [flops_before // len(example.ids), flops_after // len(example.ids)],
    }
    return PrunePlan(made.tensors, attributes, made.report | report)


def _run(model: nn.Module, example: Batch) -> tuple[Outputs, int, dict[str, int]]:
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


def _default_modules(model: nn.Module) -> list[str]:
    parts = {path: module for path, module in model.named_modules() if isinstance(module, Encoder)}
    able = [path.removeprefix("encoders.") for path, module in parts.items() if not module.unprunable]
    found = default_modules(able, fusion=hasattr(model, "fusion"))
    return [*found, "exchange"] if getattr(model, "exchange", None) is not None else found


def _on_cpu(batch: Batch) -> Batch:
    move = {name: {key: tensor.cpu() for key, tensor in getattr(batch, name).items()} for name in batch._fields[2:]}
    return Batch(batch.ids.cpu(), batch.views.cpu(), **move)
