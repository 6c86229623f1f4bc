"""What a search may change of a recipe: the knobs, their choices, and the recipe that a choice of each makes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.bundles import BUNDLES, QAT
from distill.config import FP32, INT8, PruneConfig, Recipe, nearest, one_line
from distill.contracts import UserError
from distill.decision import FUSED
from distill.export.conversion import missing_packages
from distill.inheritance import check_inheritance
from distill.predict import RUNTIME
from distill.recipe import changed
from distill.runtimes import RUNTIMES
from distill.workspace import Registry

WIDTHS = ("widths", "dim", "hidden", "channels")
"""Parameters of encoders and fusions that say how wide they are: a number, or a list of them."""
DEPTHS = ("blocks", "layers", "depth")
"""The same of how deep."""
TABLES = ("vocab_size",)
"""The same of how large a table is, which costs bytes and no time."""
OTHERS = {("text_cnn", "widths")}
"""A type and a parameter of such a name that means something else."""
SHARES, LEAST_SHARE = (0.75, 0.5, 0.25), 0.25
ROUND_TO = 8
HEADS = "student.head_weights"
"""The knob of heads of single modalities: with a weight of 0 they teach their encoders, and are not exported."""
RATIO, RATIOS = "prune.ratio", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
PRECISION = "precision"
"""The knob that is no key of the recipe: which bundle is meant."""
SEARCHABLE = ("student", "prune", "export")
BUNDLES_KEY = "export.bundles"
WHERE = "fit.space"


@dataclass(frozen=True)
class Knob:
    """One thing that a search changes.

    Attributes:
        path: dotted key of the recipe, or PRECISION.
        choices: JSON values; of the default space the smallest model last.
        own: index of the one that leaves the recipe as it is, where there is one.
    """

    path: str
    choices: tuple[Any, ...]
    own: int = 0


def target_bundles(target: str) -> list[str]:
    """Names of the bundles that run on a target.

    Raises:
        UserError: there is no such target.
    """
    runtimes = sorted({kind.runtime for kind in BUNDLES.values()})
    if target not in runtimes:
        raise UserError(f"--target: latency cannot be measured on {target!r}; {nearest(target, runtimes)}")
    return [name for name, kind in BUNDLES.items() if kind.runtime == target]


def check_target(target: str) -> None:
    """Check that bundles can be made for a target and run here.

    Raises:
        UserError: there is no such target, or a package that it needs is missing.
    """
    target_bundles(target)
    elsewhere = RUNTIMES[target].elsewhere()
    if elsewhere:
        raise UserError(f"--target: latency cannot be measured here: {elsewhere}; search on such a machine")
    missing = missing_packages(target)
    if missing:
        raise UserError(
            f"--target: {target} needs {' and '.join(missing)}, which this installation lacks; "
            f"pip install 'multidistill[{RUNTIMES[target].extra}]'"
        )


def _candidate_bundles(target: str) -> list[str]:
    """Names of a target's bundles that candidates can have: those of a student that is not trained for them."""
    return [name for name in target_bundles(target) if BUNDLES[name].source != QAT]


def read_space(recipe: Recipe, target: str) -> list[Knob]:
    """The space that a recipe's ``fit.space`` spells out.

    Raises:
        UserError: a key that no search may change, a range without values, or a bundle that is unknown or needs a
            training of its own.
    """
    known, knobs = _candidate_bundles(target), []
    for path, given in recipe.fit.space.items():
        if path != PRECISION and path.split(".")[0] not in SEARCHABLE:
            allowed = ", ".join(f"{name}.…" for name in SEARCHABLE)
            raise UserError(f"{WHERE}: {path!r} cannot be searched; name {PRECISION}, or keys of {allowed}")
        if path == BUNDLES_KEY:
            raise UserError(
                f"{WHERE}: {path!r} cannot be searched, as {PRECISION} says which bundle is meant; name that"
            )
        choices = given if isinstance(given, list) else _range(path, given)
        if not choices or any(choice in choices[:at] for at, choice in enumerate(choices)):
            raise UserError(f"{WHERE}.{path}: give one value or more, each once")
        for name in choices if path == PRECISION else ():
            _check_bundle(name, target, known)
        knobs.append(Knob(path, tuple(choices)))
    names = [name for name in recipe.export.bundles if name in known] or known
    return knobs if PRECISION in recipe.fit.space else [*knobs, Knob(PRECISION, tuple(names))]


def _check_bundle(name: Any, target: str, known: Sequence[str]) -> None:
    """Check that a bundle is one of those that candidates can have."""
    where = f"{WHERE}.{PRECISION}"
    if name in known:
        return
    if name in target_bundles(target):
        raise UserError(
            f"{where}: a search does not train for int8, as {name!r} needs; name {INT8}, and add the bundle to "
            f"{BUNDLES_KEY} of the best recipe by hand"
        )
    raise UserError(f"{where}: no bundle {name!r} runs on {target}; {nearest(str(name), known)}")


def _range(path: str, given: Mapping[str, float]) -> list[float]:
    """Values from low up to high, both included where steps end there."""
    if set(given) != {"low", "high", "step"}:
        raise UserError(f"{WHERE}.{path}: a range has low, high and step, not {', '.join(given) or 'nothing'}")
    low, high, step = (given[name] for name in ("low", "high", "step"))
    if not all(map(math.isfinite, (low, high, step))) or step <= 0 or high < low:
        raise UserError(f"{WHERE}.{path}: no value lies between {low:g} and {high:g} in steps of {step:g}")
    values = [round(low + index * step, 9) for index in range(int((high - low) / step + 1e-9) + 1)]
    whole = all(float(value).is_integer() for value in (low, step))
    return [int(value) for value in values] if whole else values


def default_space(
    recipe: Recipe, target: str, encoders: Registry, fits: Callable[[Mapping[str, Any]], bool], *, tables: bool
) -> list[Knob]:
    """The space that follows from a recipe's student: widths and depths down to a quarter, pruning and precision.

    Args:
        recipe: a valid recipe.
        target: the runtime.
        encoders: encoder type -> class, whose defaults count where the recipe says nothing.
        fits: whether the recipe stays valid with some values changed.
        tables: also sizes of tables.

    Returns:
        Knobs of two choices or more.
    """
    wanted: dict[str, list[Any]] = {}
    names = WIDTHS + DEPTHS + (TABLES if tables else ())
    for modality, part in recipe.student.encoders.items():
        given = {**_defaults(encoders[part.type]), **part.params}
        for name in names:
            if name in given and (part.type, name) not in OTHERS and smaller(name, given[name]):
                wanted[f"student.encoders.{modality}.{name}"] = smaller(name, given[name])
    fusion = recipe.student.fusion
    for name in WIDTHS + DEPTHS if fusion else ():
        if fusion and name in fusion.params and smaller(name, fusion.params[name]):
            wanted[f"student.fusion.{name}"] = smaller(name, fusion.params[name])
    heads = {**recipe.student.head_weights, **dict.fromkeys(recipe.student.encoders, 0.0)}
    if fusion and recipe.student.unimodal_heads and recipe.student.head_weights.get(FUSED, 1.0) > 0:
        wanted[HEADS] = [recipe.student.head_weights, heads]
    knobs = [
        Knob(path, (first, *(one for one in rest if fits({path: one})))) for path, (first, *rest) in wanted.items()
    ]
    own = recipe.prune.ratio
    ratios = sorted({own, *(ratio for ratio in RATIOS if fits({RATIO: ratio}))})
    knobs.append(Knob(RATIO, tuple(ratios), ratios.index(own)))
    on_target = _candidate_bundles(target)
    usual = (FP32, INT8) if target == RUNTIME else on_target
    bundles = [name for name in dict.fromkeys([*recipe.export.bundles, *usual]) if name in on_target]
    return [knob for knob in [*knobs, Knob(PRECISION, tuple(bundles))] if len(knob.choices) > 1]


def _defaults(builder: Callable[..., Any]) -> dict[str, Any]:
    found = inspect.signature(builder).parameters.items()
    return {name: value.default for name, value in found if value.default is not inspect.Parameter.empty}


def smaller(name: str, value: Any) -> list[Any]:
    """A size and smaller ones, down to about a quarter; nothing of what is no size."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if not numbers or not all(type(number) is int for number in numbers):
        return []
    lists = _shallower(list(numbers)) if name in DEPTHS else _narrower(list(numbers))
    found = [list(numbers), *lists]
    return [one if isinstance(value, list | tuple) else one[0] for one in found]


def _narrower(widths: list[int]) -> list[list[int]]:
    """Widths times each share, in multiples of eight where they are wider than that."""
    found: list[list[int]] = []
    for share in SHARES:
        made = [min(width, max(ROUND_TO, round(width * share / ROUND_TO) * ROUND_TO)) for width in widths]
        if made not in (widths, *found):
            found.append(made)
    return found


def _shallower(depths: list[int]) -> list[list[int]]:
    """One layer less each time, of the first among the deepest parts, down to a quarter of all."""
    found, now, least = [], list(depths), math.ceil(sum(depths) * LEAST_SHARE)
    if len(depths) > 1:
        least = 0  # stages reduce without further blocks
    while sum(now) > least:
        now[now.index(max(now))] -= 1
        found.append(list(now))
    return found


def candidate(recipe: Recipe, values: Mapping[str, Any], encoders: Registry, inheritances: Registry) -> Recipe:
    """A recipe with a choice of each knob: it writes the chosen bundle, beside fp32, and searches nothing.

    An encoder that is no longer built as the teacher's does not inherit its weights.

    Args:
        recipe: the reference.
        values: path -> choice.
        encoders: encoder type -> class.
        inheritances: inheritance type -> function.

    Raises:
        UserError: the schema refuses a value.
    """
    made = changed(recipe, {path: value for path, value in values.items() if path != PRECISION}, WHERE)
    bundles = [FP32, values[PRECISION]] if PRECISION in values else made.export.bundles
    least = {name: value for name, value in made.export.min_agreement.items() if name in bundles}
    kept = {}
    for name, part in made.student.inherit.items():
        alone = made.model_copy(update={"student": made.student.model_copy(update={"inherit": {name: part}})})
        try:
            check_inheritance(alone, encoders, inheritances)
        except UserError:
            continue
        kept[name] = part.model_dump()
    settings = {"student.inherit": kept, "export.bundles": bundles, "export.min_agreement": least, "fit": {}}
    return changed(made, settings, WHERE)


def differences(recipe: Recipe, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the recipe's; PRECISION, of which it has several, always."""
    found = {}
    for path, value in values.items():
        node: Any = recipe.model_dump()
        for step in path.split("."):
            node = node.get(step) if isinstance(node, dict) else None
        if path == PRECISION or node != value:
            found[path] = value
    return found


def with_epochs(recipe: Recipe, share: float, *, student: bool) -> Recipe:
    """A recipe with a share of the epochs of recovery, and of the student's if asked for; a share may be above 1."""

    def part(count: int | None, least: int = 1) -> int | None:
        return None if count is None else max(least, math.ceil(count * share))

    prune, train = recipe.prune, recipe.student.train
    changes: dict[str, Any] = {
        "prune.train.epochs": part(prune.train.epochs, prune.steps),
        "prune.train.max_steps": part(prune.train.max_steps, prune.steps),
    }
    if student:
        changes |= {"student.train.epochs": part(train.epochs), "student.train.max_steps": part(train.max_steps)}
    return changed(recipe, changes, WHERE)


def prunes(config: PruneConfig) -> bool:
    """Whether a pruning reads no training rows, so that an untrained student tells what it leaves."""
    return config.importance in ("magnitude", "random") and not config.sensitivity


def check_space(knobs: Sequence[Knob], make: Callable[[Mapping[str, Any]], Any]) -> None:
    """Check that each choice of each knob, alone, makes a valid recipe.

    Raises:
        UserError: one does not; knob and value are named.
    """
    for knob in knobs:
        for choice in knob.choices:
            try:
                make({knob.path: choice})
            except UserError as error:
                raise UserError(f"{WHERE}.{knob.path}: {choice!r} does not fit: {one_line(error)}") from error
