"""A recipe's student trained with one objective or another, and how often it is right: what studies compare."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import students
from benchmarks.seed_tables import mean_and_half
from distill import evaluate, pipeline
from distill.build import input_spec
from distill.config import Recipe, TermConfig
from distill.contracts import TEST, VALID
from distill.dual import DualEncoder
from distill.report import formats
from distill.report.compare import t_interval
from distill.runs import find, fingerprint, finish, start
from distill.step import TrainingError
from distill.workspace import STUDENT, Workspace

VERSION = 1  # raised when the code changes what is trained


@dataclass(frozen=True)
class Result:
    """How an arm of a seed ended.

    Attributes:
        accuracy: split -> task -> share of right predictions; empty where the training failed.
        failure: why it failed.
    """

    accuracy: dict[str, dict[str, float]]
    failure: str = ""

    @property
    def chosen_by(self) -> float:
        """What settings are chosen by: the mean over tasks on the validation rows."""
        return fmean(self.accuracy[VALID].values()) if self.accuracy else -1.0


def weighted(terms: Sequence[TermConfig], factor: float) -> list[TermConfig]:
    """The same terms at a multiple of their weights, none of which has a schedule."""
    found = []
    for term in terms:
        assert isinstance(term.weight, float)
        found.append(term.model_copy(update={"weight": term.weight * factor}))
    return found


def run_arm(recipe: Recipe, name: str, objective: list[TermConfig]) -> Result:
    """Train the recipe's student with an objective, or find what came of it.

    Raises:
        UserError: the recipe or the objective is wrong, which no training would change.
    """
    changed = recipe.model_copy(update={"student": recipe.student.model_copy(update={"objective": objective})})
    key = fingerprint(VERSION, changed.model_dump())
    place = pipeline.run_folder(recipe) / "arms" / re.sub(r"[^\w.]+", "_", name)
    artifact = find(place, name, key)
    if artifact is None:
        start(place, key)
        try:
            found = {"accuracy": _accuracy(changed), "failure": ""}
        except TrainingError as error:
            found = {"accuracy": {}, "failure": str(error)}
        artifact = finish(place, name, key, found)
    return Result(**artifact.info)


def _accuracy(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Split -> task, or direction and recall -> share that a student gets right, which the pipeline trains."""
    work = Workspace(recipe, pipeline.ENCODERS, students.INHERITANCES, pipeline.run(recipe, until=STUDENT))
    model = work.model(STUDENT)
    found = {}
    for split in (VALID, TEST):
        batches = evaluate.clean_batches(work.clean_loader(split, input_spec(model), STUDENT), STUDENT)
        if isinstance(model, DualEncoder):
            recalls = evaluate.validation_recall(model, batches, work.pairs(split))
            found[split] = {name.removeprefix("valid/"): share for name, share in recalls.items() if "_to_" in name}
        else:
            accuracies = evaluate.validation_scores(model, batches, work.tasks())
            found[split] = {
                name.removeprefix("valid/").removesuffix("_accuracy"): share
                for name, share in accuracies.items()
                if name != evaluate.ACCURACY
            }
    return found


def tasks_of(arms: Iterable[Sequence[Result]]) -> list[str]:
    """The tasks that test rows were asked for, of the first training that did not fail."""
    return next((list(run.accuracy[TEST]) for runs in arms for run in runs if run.accuracy), [])


def columns(runs: Sequence[Result], against: Sequence[Result], tasks: Sequence[str]) -> list[str]:
    """Cells of a table: validation, then each task on the test rows, with points against another arm seed by seed.

    Args:
        runs: of an arm, one a seed.
        against: of the other, in the same order; there are no points against itself, or against one that failed.
        tasks: which.

    Returns:
        The cells that :func:`titles` names; where a training failed, why, and empty ones.
    """
    failures = [run.failure for run in runs if run.failure]
    if failures:
        return [f"failed in {len(failures)} of {len(runs)}: {failures[0]}", *[""] * 2 * len(tasks)]
    comparable = runs is not against and not any(run.failure for run in against)
    cells = [formats.percent_number(fmean(run.chosen_by for run in runs))]
    for task in tasks:
        ours = [run.accuracy[TEST][task] for run in runs]
        cells.append(mean_and_half(ours))
        cells.append(points_against(ours, [run.accuracy[TEST][task] for run in against]) if comparable else "")
    return cells


def points_against(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean of paired differences in points, and over several seeds its interval."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = formats.points(fmean(gaps))
    return f"{mean} ({formats.points_range(t_interval(gaps))})" if len(gaps) > 1 else mean


def titles(tasks: Sequence[str], name: str) -> list[str]:
    """The titles of :func:`columns` against an arm of that name."""
    return ["validation, %", *(f"{task}, {what}" for task in tasks for what in ("%", f"points against {name}"))]
