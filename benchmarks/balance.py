"""Does balancing modalities help joint training? ``python -m benchmarks.balance [--recipe trimodal]``.

A recipe's student learns from labels alone and from scratch (the stage ``baseline``), once for each arm: as it is, with
modality dropout, with on-the-fly gradient modulation (OGM-GE, :mod:`distill.balance`), with both. Arms of a seed share
rows, their order and views, first weights and the number of steps. Every arm measures the modalities' scores.

What is finished is kept, so a second call goes on, and prints.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

import students
from benchmarks.quickstart_seeds import seed_recipes
from benchmarks.seed_tables import command_line, mean_and_half, put_out, table
from benchmarks.student_arms import points_against
from benchmarks.subset_accuracy import ALL, shares_right
from distill import pipeline
from distill.config import BalanceConfig, Recipe
from distill.contracts import IGNORE, TEST, UserError
from distill.report import formats
from distill.runs import find, fingerprint, finish, start
from distill.shapley import contributions
from distill.workspace import BASELINE, Workspace

VERSION = 1  # raised when the code changes what is trained or measured
PLAIN = "plain"
NOTHING = "most frequent class"

Result = dict[str, Any]
"""``accuracy``: task -> ALL, subset or NOTHING -> share of test rows; ``shapley``: task -> modality -> share;
``scores``: modality -> mean probability of the true class in the last epoch of training."""


def arms(dropout: float, alpha: float) -> dict[str, tuple[float, float]]:
    """Name -> probability of modality dropout, and alpha, of which 0 measures only."""
    return {
        PLAIN: (0.0, 0.0),
        "modality dropout": (dropout, 0.0),
        "OGM-GE": (0.0, alpha),
        "both": (dropout, alpha),
    }


def arm_recipe(recipe: Recipe, dropout: float, alpha: float) -> Recipe:
    """The recipe whose baseline is an arm."""
    train = recipe.student.train.model_copy(update={"balance": BalanceConfig(alpha=alpha)})
    student = recipe.student.model_copy(update={"train": train, "modality_dropout": dropout})
    return recipe.model_copy(update={"student": student})


def run_arm(recipe: Recipe, name: str) -> Result:
    """Train an arm and measure it, or find what came of it."""
    key = fingerprint(VERSION, recipe.model_dump())
    place = pipeline.run_folder(recipe) / "arms" / re.sub(r"\W+", "_", name)
    artifact = find(place, name, key)
    if artifact is None:
        start(place, key)
        artifact = finish(place, name, key, measured(recipe))
    return dict(artifact.info)


def measured(recipe: Recipe) -> Result:
    """Train the baseline, and ask it about the test rows with each subset of modalities."""
    done = pipeline.run(recipe, until=BASELINE)
    work = Workspace(recipe, pipeline.ENCODERS, students.INHERITANCES, done)
    data, accuracy, shapley = work.data(), shares_right(work, BASELINE), {}
    for task, found in accuracy.items():
        labels = data.targets[task][data.rows(TEST)]
        known = labels[labels != IGNORE]
        parts = {part: share for part, share in found.items() if part != ALL}
        found[NOTHING] = float(np.bincount(known).max() / len(known))
        shares = contributions(found[ALL], parts, found[NOTHING])
        shapley[task] = {name: float(share) for name, share in (shares or {}).items()}
    last = json.loads((work.path(BASELINE) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    scores = {name: last[f"train/balance/score/{name}"] for name in recipe.student.encoders}
    return {"accuracy": accuracy, "shapley": shapley, "scores": scores}


def measure(recipes: Sequence[Recipe], dropout: float, alpha: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Arm -> its results, seed by seed."""
    found: dict[str, list[Result]] = {name: [] for name in arms(dropout, alpha)}
    for recipe in recipes:
        for name, settings in arms(dropout, alpha).items():
            found[name].append(run_arm(arm_recipe(recipe, *settings), name))
            accuracies = {task: round(each[ALL], 4) for task, each in found[name][-1]["accuracy"].items()}
            say(f"{recipe.name}, {name}: {accuracies}")
    return found


def accuracy_table(found: dict[str, list[Result]], task: str) -> str:
    """Accuracy of each arm with everything, its difference to the plain arm, and accuracy with each subset."""
    subsets = [name for name in found[PLAIN][0]["accuracy"][task] if name not in (ALL, NOTHING)]
    rows = []
    for arm, runs in found.items():
        values = {name: [run["accuracy"][task][name] for run in runs] for name in (ALL, *subsets)}
        against = [run["accuracy"][task][ALL] for run in found[PLAIN]]
        points = "" if arm == PLAIN else points_against(values[ALL], against)
        rows.append([arm, mean_and_half(values[ALL]), points, *(mean_and_half(values[name]) for name in subsets)])
    return table(["arm", "all, %", f"points against {PLAIN}", *(f"{name}, %" for name in subsets)], rows)


def share_table(found: dict[str, list[Result]], pick: Callable[[Result], dict[str, float]], suffix: str) -> str:
    """A share of each modality in each arm."""
    names = list(pick(found[PLAIN][0]))
    rows = []
    for arm, runs in found.items():
        cells = [mean_and_half([pick(run)[name] for run in runs]) for name in names]
        rows.append([arm, *(cell.replace("-", formats.MINUS) for cell in cells)])
    return table(["arm", *(f"{name}{suffix}" for name in names)], rows)


def markdown(found: dict[str, list[Result]], recipe: Recipe, settings: argparse.Namespace, command: str) -> str:
    """The tables, with the command that makes them."""
    runs = found[PLAIN]
    title = f"# Balance of modalities: {recipe.name.removesuffix('-seed0')}, seeds 0 to {len(runs) - 1}"
    parts = [title, f"    {command}", fill(about(recipe, settings), 118)]
    for task, accuracy in runs[0]["accuracy"].items():
        nothing = f"The most frequent class has {formats.percent(accuracy[NOTHING])} of the test rows."
        parts += [f"## {task}: accuracy", nothing, accuracy_table(found, task)]
        if runs[0]["shapley"][task]:
            shares = share_table(found, lambda run, name=task: run["shapley"][name], ", points")  # type: ignore[misc]
            parts += [f"## {task}: contributions", shares]
    parts += ["## Scores at the end of training", share_table(found, lambda run: run["scores"], ", %")]
    return "\n\n".join(parts) + "\n"


def about(recipe: Recipe, settings: argparse.Namespace) -> str:
    """What was done, and what the numbers are."""
    train = recipe.student.train
    return (
        f"The student alone, from scratch, on labels: {train.epochs} epochs of batches of {train.batch_size}, "
        f"{train.optimizer}, learning rate {train.lr:g}. ± is half of the 95 % t-interval over seeds, each with first "
        "weights, orders and views of its own; differences are paired, with their interval. Modality dropout "
        f"{settings.modality_dropout:g}; OGM-GE with alpha {settings.alpha:g} and noise, in all steps. Contributions "
        "are Shapley values: they divide the accuracy above that of the most frequent class. A score is the mean "
        "probability that a modality's own head gives the true class in the last epoch of training, augmented and with "
        "dropout, over all tasks."
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, such as student.train.epochs=5")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--recipe", default="quickstart", help="any with heads of single modalities")
    parser.add_argument("--alpha", type=float, default=BalanceConfig().alpha, help="of OGM-GE")
    parser.add_argument("--modality-dropout", type=float, default=0.2)
    parser.add_argument("--output", default="runs/balance", help="folder of the runs")
    parser.add_argument("--out", dest="markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Train what is not trained yet, and print the tables."""
    options = parse(arguments)
    recipes = seed_recipes(options.recipe, options.overrides, options.output, options.seeds)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = measure(recipes, options.modality_dropout, options.alpha, say)
    command = command_line("benchmarks.balance", arguments)
    put_out(options, markdown(found, recipes[0], options, command), {"command": command, "arms": found})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
