"""Depth: which residual blocks of a list a model misses least."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from distill.config import nearest
from distill.contracts import Batch, UserError
from distill.prune.measuring import answers, drop
from distill.prune.plans import PrunePlan, apply, compose


def plan_depth(
    model: nn.Module, counts: Mapping[str, int], batches: Sequence[Batch], *, before: PrunePlan
) -> PrunePlan:
    """Decide which blocks go: one after the other the one without which the model's outputs change least.

    A residual block adds to what it reads, so that without it the next block reads the same space (Veit et al. 2016,
    arXiv 1605.06431). One whose absence changes a shape, as the first of a stage does, stays.

    Args:
        model: in eval mode, as the earlier plan leaves it.
        counts: path of a list of blocks, in the unpruned model -> how many of it go, with those of the earlier plan.
        batches: the rows whose outputs are compared.
        before: the earlier plan.

    Raises:
        UserError: a path is no list of blocks, or fewer of its blocks can go.
    """
    part, now = PrunePlan(), copy.deepcopy(model)
    whole = answers(model, batches)
    length = 0
    for path, count in counts.items():
        here = before.renamed(path) or path
        blocks = check_blocks(now, here)
        gone = len(before.removed.get(path, {"gone": []})["gone"])
        length += len(blocks)
        for _ in range(count - gone):
            changes = _changes(now, here, whole, batches) if len(blocks) > 1 else {}
            if not changes:
                raise UserError(
                    f"prune.depth.{path} is {count}, and no further block can go: it has {len(blocks)} left, of which "
                    "one stays, as do activations and those that change a shape; lower it"
                )
            least = min(changes, key=lambda index: (changes[index], index))
            step = PrunePlan(removed={here: {"of": len(blocks), "gone": [least]}})
            apply(now, step)
            part = compose(part, step)
    lost = sum(len(cut["gone"]) for cut in part.removed.values())
    part.report["blocks"] = [length, length - lost]
    return part


def check_blocks(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    """Return a model's list of blocks; a UserError if the path is none.

    Lists of a class of their own, or whose blocks have names, would be other ones without some of their blocks.
    """
    lists = {name: each for name, each in model.named_modules() if _is_plain(each)}
    if path not in lists:
        raise UserError(f"prune.depth: {path!r} is no plain list of blocks; {nearest(path, lists)}")
    blocks: Any = lists[path]
    return cast("nn.ModuleList | nn.Sequential", blocks)


def _is_plain(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_children()]
    return type(module) in (nn.ModuleList, nn.Sequential) and names == [str(number) for number in range(len(names))]


def _changes(model: nn.Module, path: str, whole: Mapping[str, Tensor], batches: Sequence[Batch]) -> dict[int, float]:
    """Index of a block that can be left out -> how much that changes the outputs."""
    found = {}
    for index, block in enumerate(model.get_submodule(path).children()):
        if next(block.parameters(), None) is None:
            continue  # an activation between blocks is none
        with _without(model, path, index):
            try:
                found[index] = drop(whole, answers(model, batches))
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue
    return found


@contextmanager
def _without(model: nn.Module, path: str, index: int) -> Iterator[None]:
    """Let a model do without one block."""
    path_above, _, leaf = path.rpartition(".")
    owner, blocks = model.get_submodule(path_above), model.get_submodule(path)
    rest = [block for place, block in enumerate(blocks.children()) if place != index]
    setattr(owner, leaf, nn.Sequential(*rest) if isinstance(blocks, nn.Sequential) else nn.ModuleList(rest))
    try:
        yield
    finally:
        setattr(owner, leaf, blocks)
