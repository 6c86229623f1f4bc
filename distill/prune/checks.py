"""What of a student may be pruned, as far as its config tells: checked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import nn

from distill.config import PruneConfig, Recipe, nearest
from distill.contracts import UserError
from distill.formats import TEXT
from distill.fusion import FUSIONS
from distill.multimodal import Encoder
from distill.prune.depth import check_blocks
from distill.prune.heads import check_attention
from distill.prune.saliency import FROM_DATA


def judges(config: PruneConfig) -> list[str]:
    """Return the fields of the student that a plan follows from: the terms without a teacher, if it reads rows."""
    return ["baseline"] if config.importance in FROM_DATA or config.depth or config.sensitivity else []


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's ``prune`` as the stage's fingerprint sees it.

    What is younger than finished runs counts if it is set, so that those stay up to date.
    """
    tree = younger(recipe.prune.model_dump(exclude={"train": {"shard"}}))
    prompts = {} if recipe.retrieval is None else recipe.retrieval.prompts
    return tree | ({"prompts": prompts} if recipe.prune.vocabulary and prompts else {})


def younger(tree: dict[str, Any]) -> dict[str, Any]:
    """Return ``prune`` without keys that finished runs lack, where they are not set."""
    return {name: value for name, value in tree.items() if name != "vocabulary" or value is not None}


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
        UserError: it has no table of word embeddings and ``prune.vocabulary`` is set; or it lacks an encoder, or the
            fusion, that a path of ``prune.modules``, ``prune.ratios`` or
            ``prune.depth`` names, that encoder has no channels to remove, or one list of blocks lies in another.
    """
    student, structured = recipe.student, recipe.prune.structured
    if recipe.prune.vocabulary is not None:
        text = student.encoders.get(TEXT)
        if text is None or not getattr(encoders[text.type], "word_table", ""):
            why = "it reads no text" if text is None else f"its text encoder, {text.type}, has none"
            raise UserError(f"prune.vocabulary: the student has no table of word embeddings: {why}; leave it out")
    whole = {name: getattr(encoders[part.type], "unprunable", "") for name, part in student.encoders.items()}
    prunable = [name for name, reason in whole.items() if not reason]
    fused = student.fusion is not None and not FUSIONS[student.fusion.type].plain
    able = [*(f"encoders.{name}" for name in prunable), *(["fusion"] if fused else [])]
    hint = f"set it to [{', '.join(able)}]"
    if structured and not able:
        raise UserError("prune.modules: the student has no channels to prune; end with 'distill train'")
    for path in recipe.prune.modules or (default_modules(prunable, fusion=fused) if structured else []):
        _check_path(recipe, path, "prune.modules", hint)
        owner, *inner = path.split(".")
        if structured and owner == "encoders" and inner and whole[inner[0]]:
            raise UserError(f"prune.modules: {path!r} has no channels to remove: {whole[inner[0]]}; {hint}")
    paths: Iterable[str]
    for where, paths in (("ratios", recipe.prune.ratios), ("depth", recipe.prune.depth)):
        for path in paths:
            _check_path(recipe, path, f"prune.{where}", f"it has {', '.join(able)}")
    for number, term in enumerate(student.objective):
        for tap in term.tapped("student"):
            for path in recipe.prune.depth:
                if tap.partition(":")[0].startswith(f"{path}."):
                    raise UserError(
                        f"student.objective[{number}].taps: {tap!r} lies in {path!r}, whose blocks may go "
                        "(prune.depth); tap the list itself, or leave one out"
                    )
    for outer, inner_path in combinations(sorted(recipe.prune.depth), 2):
        if inner_path.startswith(f"{outer}."):
            raise UserError(f"prune.depth: {inner_path!r} lies in {outer!r}, whose blocks may go; leave one out")


def modules_of(model: nn.Module) -> list[str]:
    """Return the paths in a model under which it is pruned where a recipe names nothing."""
    parts = {path: module for path, module in model.named_modules() if isinstance(module, Encoder)}
    able = [path.removeprefix("encoders.") for path, module in parts.items() if not module.unprunable]
    found = default_modules(able, fusion=hasattr(model, "fusion"))
    return [*found, "exchange"] if getattr(model, "exchange", None) is not None else found


def check_names(model: nn.Module, config: PruneConfig) -> None:
    """Check that a model has what a config names.

    Raises:
        UserError: it has no such module, no attention whose heads may go, or no list of as many blocks.
    """
    names = dict(model.named_modules())
    for field, paths in (("modules", config.modules or []), ("ratios", config.ratios)):
        for path in paths:
            if path not in names:
                raise UserError(
                    f"prune.{field}: the model has no module {path!r}; {nearest(path, filter(None, names))}"
                )
    check_attention(model, config, config.modules or modules_of(model))
    for path, count in config.depth.items():
        blocks = check_blocks(model, path)
        if count >= len(blocks):
            raise UserError(f"prune.depth.{path} is {count}, and one of its {len(blocks)} blocks stays; lower it")


def _check_path(recipe: Recipe, path: str, where: str, hint: str) -> None:
    student = recipe.student
    owner, *inner = path.split(".")
    foreign = owner in ("encoders", "necks") and not {*inner[:1]} <= {*student.encoders}
    if foreign or (student.fusion is None and owner in ("fusion", "necks")):
        raise UserError(f"{where}: the student has no module {path!r}; {hint}")
