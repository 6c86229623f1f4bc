"""What each set of modalities is worth: ``python -m benchmarks.subset_accuracy [--recipe trimodal] [--seeds 3]``.

Every seed is a run of its own, from the teacher on. Teacher, baseline and student answer for the test rows with all
modalities and with each part of them; fusion is worth what all of them give over the best one alone.

What is finished is kept, so a second call only prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import students
from benchmarks.quickstart_seeds import seed_recipes
from benchmarks.seed_tables import command_line, mean_and_half, put_out, seed_parser, table
from benchmarks.student_arms import points_against
from distill import evaluate, pipeline
from distill.build import input_spec
from distill.config import Recipe
from distill.contracts import AND, IGNORE, TEST, UserError
from distill.report import formats
from distill.workspace import BASELINE, STUDENT, TEACHER, Workspace

ALL = "all"
MODELS = (TEACHER, BASELINE, STUDENT)

Shares = dict[str, dict[str, float]]
"""Task -> :data:`ALL` or modalities such as "image+text" -> share of test rows that are right."""


def shares_right(work: Workspace, name: str) -> Shares:
    """How often a model of a run is right about the test rows with each set of modalities."""
    model: Any = work.model(name)
    reads = TEACHER if name == TEACHER else STUDENT
    loader = work.towers(work.clean_loader(TEST, input_spec(model), reads), model, reads)
    parts = evaluate.subsets_of(list(model.encoders))
    arrays = evaluate.predict_torch(model, evaluate.clean_batches(loader, reads), subsets=parts)
    data, found = work.data(), {}
    for task, targets in data.targets.items():
        labels = targets[data.rows(TEST)]
        known = labels != IGNORE
        passes = {ALL: f"logits.{task}", **{part: f"subset.{part}.{task}" for part in parts}}
        found[task] = {part: float((arrays[key].argmax(1) == labels)[known].mean()) for part, key in passes.items()}
    return found


def measure(recipe: Recipe) -> dict[str, Shares]:
    """Train what one seed lacks, and ask its models."""
    done = pipeline.run(recipe, until=BASELINE) | pipeline.run(recipe, until=STUDENT)
    work = Workspace(recipe, pipeline.ENCODERS, students.INHERITANCES, done)
    return {name: shares_right(work, name) for name in MODELS}


def subset_table(found: Sequence[dict[str, Shares]], task: str) -> str:
    """A row a set of modalities, a column a model; then what fusion is worth."""
    rows = []
    for part in found[0][TEACHER][task]:
        values = {name: [run[name][task][part] for run in found] for name in MODELS}
        gain = "" if part != ALL else points_against(values[STUDENT], values[BASELINE])
        rows.append([part, *(mean_and_half(values[name]) for name in MODELS), gain])
    worth = ["all − the best one alone"]
    for name in MODELS:
        shares = {part: [run[name][task][part] for run in found] for part in found[0][name][task]}
        alone = max((part for part in shares if part != ALL and AND not in part), key=lambda part: fmean(shares[part]))
        worth.append(f"{points_against(shares[ALL], shares[alone])}, {alone}")
    titles = ["modalities", *(f"{name}, %" for name in MODELS), "student − baseline, points"]
    return table(titles, [*rows, [*worth, ""]])


def markdown(found: Sequence[dict[str, Shares]], recipe: Recipe, command: str) -> str:
    """The tables, with the command that makes them."""
    name = recipe.name.removesuffix("-seed0")
    about = (
        f"Test rows, seeds 0 to {len(found) - 1}, each with a teacher of its own. ± is half of the 95 % t-interval\n"
        "over seeds; differences are paired, with their interval."
    )
    parts = [f"# What each set of modalities is worth: {name}", f"    {command}", about]
    for task in found[0][TEACHER]:
        parts += [f"## {task}", subset_table(found, task)]
    return "\n\n".join(parts) + "\n"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    any_recipe = "any of two modalities or more whose tasks have classes"
    parser = seed_parser("benchmarks.subset_accuracy", __doc__, recipe="trimodal", any_recipe=any_recipe)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Train what is not trained yet, and print the tables."""
    options = parse(arguments)
    recipes = seed_recipes(options.recipe, options.overrides, options.output, options.seeds)
    for part in (recipes[0].teacher, recipes[0].student):
        if len(part.encoders) < 2:
            raise UserError(f"{options.recipe} has a model of one modality, which has no sets; name another recipe")
    found = []
    for recipe in recipes:
        found.append(measure(recipe))
        said = {name: {task: formats.percent(each[ALL]) for task, each in found[-1][name].items()} for name in MODELS}
        print(f"{recipe.name}: {said}", file=sys.stderr, flush=True)
    command = command_line("benchmarks.subset_accuracy", arguments)
    put_out(options, markdown(found, recipes[0], command), {"command": command, "seeds": found})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
