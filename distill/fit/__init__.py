"""``distill fit``: the student, pruning and precision that keep most inside a budget of the exported bundle.

First the recipe's own run is brought up to date as far as its bundles: its teacher answers for all candidates. Choices
of the space (:mod:`distill.fit.space`) are then built untrained, pruned, exported and quantized, which takes seconds
and tells latency and size; those outside the budget go. The others are trained with a third of the epochs, and the best
with all of them (successive halving, Jamieson & Talwalkar 2016, arXiv 1502.07943, with two rungs); the best of these
for longer, while it keeps more by that. What they keep is measured on the validation rows, of the bundle on its
runtime. Optuna's Parzen estimator (TPE, Bergstra et al. 2011) chooses what is looked at, for the most retained under
the limits as constraints: a search for whole fronts would spend its few trials on bundles that nobody asked for.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill import pipeline
from distill.build import Model
from distill.config import Recipe
from distill.contracts import Artifact, UserError
from distill.fit.budget import Budget
from distill.fit.candidates import Candidates, Made
from distill.fit.outcome import BEST_FILE, MARKDOWN_FILE, closest, write_outcome
from distill.fit.records import Records, Trial
from distill.fit.search import Clock, check_sampler, finals, longer, rank, search
from distill.fit.space import (
    PRECISION,
    Knob,
    candidate,
    check_space,
    check_target,
    default_space,
    read_space,
    target_bundles,
)
from distill.gate import SHIPPED
from distill.progress import progress
from distill.recipe import as_yaml, changed
from distill.runs import atomic, locked
from distill.workspace import TEACHER, untrained

__all__ = ["Budget", "NothingFitsError", "fit"]

REFERENCE = ("data", TEACHER, "cache", SHIPPED, "export")
"""Stages of the recipe's own run that figures depend on: with others the same recipe is another search."""


class NothingFitsError(RuntimeError):
    """No bundle inside the budget was found."""


def fit(
    recipe: Recipe,
    budget: Budget,
    folder: Path,
    *,
    target: str,
    minutes: float,
    most: int | None = None,
    seed: int = 0,
    quiet: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Search a bundle inside a budget; a killed search goes on in its folder.

    Args:
        recipe: the validated recipe, whose run is brought up to date first.
        budget: what the bundle may cost and must keep.
        folder: of the search.
        target: the runtime.
        minutes: of this call, with the recipe's own run.
        most: trials, with those of earlier calls in the folder.
        seed: of the sampler.
        quiet: show no progress.
        say: called with one line a stage and a trial.

    Returns:
        The content of ``fit.json``.

    Raises:
        UserError: budget, target, space or teacher allow no search, or the folder holds another one.
        NothingFitsError: no bundle is inside the budget; what comes closest is named.
    """
    began = time.monotonic()
    _check(budget, minutes, most)
    _check_parts(recipe, target)
    plain = changed(recipe, {"fit": {}}, "fit")
    done, knobs = _begun(recipe, target, budget, quiet=quiet, say=say)
    asked: dict[str, Any] = {"recipe": plain.model_dump(), "run": made_of(done)}
    asked["space"] = {knob.path: list(knob.choices) for knob in knobs}
    with locked(folder):
        records = Records(folder, {**asked, "budget": vars(budget), "target": target, "seed": seed})
        candidates = Candidates(plain, done, folder, records.yardstick_ms)
        candidates.check_teacher()
        records.begin(candidates.yardstick_ms)
        clock = Clock(minutes, done, began)
        with progress("fit", quiet=quiet) as report:
            options: dict[str, Any] = {"say": say, "report": report}
            trials, whole = _rounds(
                lambda: search(candidates, knobs, budget, records, clock, most=most, seed=seed, **options),
                lambda given: finals(candidates, *given, budget, clock, **options),
            )
            whole += longer(candidates, [trial for trial, _ in whole], budget, clock, **options)
        whole = _measured_again(candidates, [*_own(candidates, target), *whole])
        best = _best_of([trial for trial, _ in whole], budget)
        everything = [*trials, *(trial for trial, _ in whole)]
        found = {"name": recipe.name, "target": target, "seed": seed, "seconds": time.monotonic() - began, "best": best}
        found |= {"space": asked["space"], **_best(candidates, best, whole, folder)}
        content = write_outcome(folder, found, everything, budget)
    if best is None:
        raise NothingFitsError(f"{_nothing(budget, everything, minutes)}; see {folder / MARKDOWN_FILE}")
    return content


def _check(budget: Budget, minutes: float, most: int | None) -> None:
    budget.check()
    if not (math.isfinite(minutes) and minutes > 0):
        raise UserError(f"--minutes is {minutes:g}, which is no time to search in; give a number above 0")
    if most is not None and most < 1:
        raise UserError(f"--trials is {most}; give at least 1")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("distill fit times one process; start it without a launcher")


def _check_parts(recipe: Recipe, target: str) -> None:
    """Check what is known before any work: the target, the recipe, the space that it spells out, and the sampler."""
    check_target(target)
    pipeline.check(recipe)
    if recipe.fit.space:
        check_space(read_space(recipe, target), lambda values: _checked(recipe, values))
    check_sampler()


def _nothing(budget: Budget, trials: list[Trial], minutes: float) -> str:
    """What comes closest where nothing fits, and whether there was time for more than the recipe's own bundles."""
    late = (
        "" if any(trial.number for trial in trials) else f"; no trial fitted into {minutes:g} minutes, so give it more"
    )
    return f"nothing fits ({budget.said}): {closest(trials, budget)}{late}"


def _best_of(trials: list[Trial], budget: Budget) -> Trial | None:
    """The best of those that fit, if one does."""
    fitting = [trial for trial in trials if trial.figures and not budget.misses(trial.figures)]
    return min(fitting, key=lambda trial: rank(budget, trial.figures), default=None)


def made_of(done: Mapping[str, Artifact]) -> dict[str, str]:
    """Stage -> fingerprint, of those of the recipe's own run that figures depend on."""
    return {name: done[name].fingerprint for name in REFERENCE if name in done}


def _begun(
    recipe: Recipe, target: str, budget: Budget, *, quiet: bool, say: Callable[[str], None]
) -> tuple[dict[str, Artifact], list[Knob]]:
    """The recipe's own run as far as its bundles, and the space; one that is spelt out is built before any training."""
    if recipe.fit.space:
        prepared = pipeline.run(recipe, until="data", quiet=quiet, say=say)
        check_space(read_space(recipe, target), _builder(recipe, prepared))
    done = pipeline.run(recipe, until="quantize", quiet=quiet, say=say)
    return done, read_space(recipe, target) if recipe.fit.space else _default_space(recipe, done, target, budget)


def _rounds(
    look: Callable[[], list[Trial]], full: Callable[[tuple[list[Trial], list[Trial]]], Iterator[tuple[Trial, Made]]]
) -> tuple[list[Trial], list[tuple[Trial, Made]]]:
    """Look at choices and train the best in full, by turns, as long as there is time to look at another one."""
    trials = look()
    whole: list[tuple[Trial, Made]] = []
    while True:
        whole += full((trials, [trial for trial, _ in whole]))
        before, trials = len(trials), look()
        if len(trials) == before:
            return trials, whole


def _checked(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe of a choice, whose parts fit each other."""
    work = pipeline.workspace(recipe, {})
    made = candidate(recipe, values, work.encoders, work.inheritances)
    pipeline.check(made)
    return made


def _builder(recipe: Recipe, done: dict[str, Artifact]) -> Callable[[Mapping[str, Any]], Model]:
    """A function that builds the untrained student of a choice, or refuses it; the run has its data."""
    work = pipeline.workspace(recipe, done)
    tasks = work.tasks()

    def build(values: Mapping[str, Any]) -> Model:
        made = _checked(recipe, values)
        return untrained(made.student, "student", work.encoders, tasks, made.data)

    return build


def _default_space(recipe: Recipe, done: dict[str, Artifact], target: str, budget: Budget) -> list[Knob]:
    """The space of a recipe that names none: choices of which a student can be built."""
    work, build = pipeline.workspace(recipe, done), _builder(recipe, done)

    def fits(values: Mapping[str, Any]) -> bool:
        try:
            build(values)
        except UserError:
            return False
        return True

    return default_space(recipe, target, work.encoders, fits, tables=budget.max_size_mb is not None)


def _own(candidates: Candidates, target: str) -> list[tuple[Trial, Made]]:
    """The recipe's own bundles as trials of number 0."""
    found = []
    for name in candidates.recipe.export.bundles:
        if name in target_bundles(target):
            made = candidates.reference(name)
            found.append((Trial(0, {PRECISION: name}, "full", 1.0, made.figures, made.retention), made))
    return found


def _measured_again(candidates: Candidates, whole: list[tuple[Trial, Made]]) -> list[tuple[Trial, Made]]:
    """The same with latencies that were measured side by side."""
    times = candidates.side_by_side({str(index): made.timed for index, (_, made) in enumerate(whole)})
    return [
        (replace(trial, figures=made.figures._replace(latency_ms=times[str(index)])), made)
        for index, (trial, made) in enumerate(whole)
    ]


def _best(
    candidates: Candidates, best: Trial | None, whole: list[tuple[Trial, Made]], folder: Path
) -> dict[str, str | None]:
    """Where bundle and recipe of the best trial lie; without one, no recipe of an earlier call stays."""
    if best is None:
        (folder / BEST_FILE).unlink(missing_ok=True)
        return {"bundle": None, "recipe": None}
    (bundle,) = (str(made.timed.path.parent) for trial, made in whole if trial is best)
    return {"bundle": bundle, "recipe": str(_write_best(candidates, best, folder))}


def _write_best(candidates: Candidates, best: Trial, folder: Path) -> Path:
    """Write the recipe of the best trial, whose run is ``FOLDER/best``, and put its finished stages there."""
    place = {"name": "best", "output": str(folder.resolve())}
    recipe = changed(candidates.recipe_of(best.values, best.share), place, BEST_FILE)
    candidates.keep(recipe)
    with atomic(folder / BEST_FILE) as temporary:
        temporary.write_text(as_yaml(recipe), encoding="utf-8")
    return folder / BEST_FILE
