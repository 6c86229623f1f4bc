"""Accuracy of a recipe over seeds: the teacher by modality, student against baseline, and what each part adds.

Every seed is a run of its own (``OUTPUT/NAME-seedS``), from the teacher on. The ablation arms train the student again
with the same teacher, the same cache, the same order of rows and the same budget. What is finished is kept, so a
second call only prints.

    python -m benchmarks.quickstart_seeds --seeds 5 --markdown seeds.md --json seeds.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

import students
from benchmarks.seed_tables import add_outputs, command_line, markdown, put_out
from distill import evaluate, pipeline, stages
from distill.build import input_spec
from distill.config import Recipe
from distill.contracts import IGNORE, TEST, Artifact, UserError
from distill.data.loader import Loader
from distill.data_config import AugmentConfig, TextAugment
from distill.metrics import paired_cluster_bootstrap
from distill.recipe import load_recipe
from distill.report import compare_runs, render_comparison
from distill.report.compare import t_interval
from distill.runs import find, fingerprint, finish, locked, read_json, start
from distill.workspace import STUDENT, TEACHER, Workspace

INHERITANCE, KD = "inheritance alone", "KD alone"
MODELS = ("baseline", STUDENT, "pruned")
ARMS = {"baseline": "neither (baseline)", INHERITANCE: INHERITANCE, KD: KD, STUDENT: "both (student)"}
PAIRS = (
    (STUDENT, "baseline"),
    ("pruned", "baseline"),
    ("pruned", STUDENT),
    (INHERITANCE, "baseline"),
    (KD, "baseline"),
    (STUDENT, INHERITANCE),
    (STUDENT, KD),
)
FUSED = "fused"
HALF = AugmentConfig(text=TextAugment(word_dropout=0.5))
CONDITIONS: dict[str, AugmentConfig | None] = {"all words": None, "half of the words": HALF}
VERSION = 1  # raised when an arm's code changes what it trains or predicts

Correct = dict[str, NDArray[np.float64]]
"""Task -> float [N], 1 where a test row's prediction is right, NaN where the row has no target."""

Scores = dict[str, Correct]
"""Name of a model or arm -> its Correct under one seed."""


def seed_recipes(path: str, overrides: Sequence[str], output: str, num_seeds: int) -> list[Recipe]:
    """The recipe once for each seed from 0 on, each with a run folder of its own."""
    name = load_recipe(path, overrides).name
    own = [[f"seed={seed}", f"name={name}-seed{seed}", f"output={output}"] for seed in range(num_seeds)]
    return [load_recipe(path, [*overrides, *extra]) for extra in own]


def finished_run(recipe: Recipe, *, full: bool, say: Callable[[str], None]) -> Workspace:
    """Bring one seed's run up to date: to ``baseline`` and ``pruned``, or the whole pipeline."""
    done: dict[str, Artifact] = {}
    for last in (None,) if full else ("baseline", "pruned"):
        done |= pipeline.run(recipe, until=last, say=say)
    return Workspace(recipe, pipeline.ENCODERS, students.INHERITANCES, done)


def arm_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """The arms that are no stage of the pipeline: the baseline's objective, or no inheritance."""
    student = recipe.student
    changed = {
        INHERITANCE: student.model_copy(update={"objective": student.baseline}),
        KD: student.model_copy(update={"inherit": {}}),
    }
    return {name: recipe.model_copy(update={"student": part}) for name, part in changed.items()}


def train_arm(work: Workspace, name: str, recipe: Recipe) -> Workspace:
    """Train one arm, or find it trained; the workspace returned holds it as its ``student``."""
    parents = [work.done[stage].fingerprint for stage in ("data", "transfer", "teacher", "cache", "vocabulary")]
    key = fingerprint(name, VERSION, recipe.student.model_dump(), recipe.transfer.ratio, parents)
    folder = pipeline.run_folder(recipe) / "ablation" / name.replace(" ", "_")
    variant = replace(work, recipe=recipe, done=dict(work.done))
    variant.done["inherit"] = Artifact("inherit", folder / "inherit", key)
    artifact = find(folder, name, key)
    if artifact is None:
        start(folder, key, resume=True)
        variant.path("inherit").mkdir(exist_ok=True)
        stages.inherit(variant, variant.path("inherit"))
        artifact = finish(folder, name, key, stages.distil_student(variant, folder))
    variant.done[STUDENT] = artifact
    return variant


def kept(folder: Path, name: str, key: str, compute: Callable[[], evaluate.Arrays]) -> evaluate.Arrays:
    """Predictions that are computed once."""
    file = folder / "predictions.safetensors"
    if find(folder, name, key) is None:
        start(folder, key)
        evaluate.write_arrays(file, dict(compute()))
        finish(folder, name, key, {})
    return {name: values.astype(np.float32) for name, values in evaluate.read_arrays(file).items()}


def teacher_predictions(work: Workspace, augment: AugmentConfig | None) -> evaluate.Arrays:
    """The teacher's logits on the test rows, with all modalities and with each alone.

    Dropped words change what a frozen tower reads, so then it runs live.
    """
    model = work.teacher()
    spec = input_spec(model)
    loader: Any = work.towers(work.clean_loader(TEST, spec, TEACHER), model)
    if augment is not None:
        loader = Loader(
            work.data(),
            TEST,
            {TEACHER: spec},
            batch_size=stages.EVALUATION_BATCH,
            seed=work.recipe.seed,
            augment=augment,
            view=0,
            shuffle=False,
        )
    return evaluate.predict_torch(model, evaluate.clean_batches(loader, TEACHER), subsets=list(model.encoders))


def student_predictions(work: Workspace, name: str) -> evaluate.Arrays:
    """A student's logits on the clean test rows."""
    model = work.model(name)
    loader = work.clean_loader(TEST, input_spec(model), STUDENT)
    return evaluate.predict_torch(model, evaluate.clean_batches(loader, STUDENT))


def correct(predicted: evaluate.Arrays, prefix: str, targets: dict[str, NDArray[np.int64]]) -> Correct:
    """Where the predictions with a prefix ("logits", "subset.text") are right."""
    found = {}
    for task, labels in targets.items():
        right = (predicted[f"{prefix}.{task}"].argmax(axis=1) == labels).astype(np.float64)
        found[task] = np.where(labels == IGNORE, np.nan, right)
    return found


def score_seed(work: Workspace) -> Scores:
    """Train the arms of one seed and predict the test rows with everything."""
    data = work.data()
    rows = data.rows(TEST)
    targets = {task: values[rows] for task, values in data.targets.items()}
    folder = pipeline.run_folder(work.recipe) / "ablation"
    prefixes = {FUSED: "logits", **{f"{name} alone": f"subset.{name}" for name in work.recipe.teacher.encoders}}
    scores: Scores = {}
    with locked(pipeline.run_folder(work.recipe)):
        for condition, augment in CONDITIONS.items():
            key = fingerprint(VERSION, work.done[TEACHER].fingerprint, condition)
            place = folder / f"predict_{TEACHER}_{condition.replace(' ', '_')}"
            arrays = kept(place, TEACHER, key, partial(teacher_predictions, work, augment))
            scores |= {f"{reads}, {condition}": correct(arrays, prefix, targets) for reads, prefix in prefixes.items()}
        arms = {arm: (train_arm(work, arm, recipe), STUDENT) for arm, recipe in arm_recipes(work.recipe).items()}
        for name, (owner, model) in ({model: (work, model) for model in MODELS} | arms).items():
            key = fingerprint(VERSION, owner.done[model].fingerprint)
            place = folder / f"predict_{name.replace(' ', '_')}"
            arrays = kept(place, name, key, partial(student_predictions, owner, model))
            scores[name] = correct(arrays, "logits", targets)
    return scores


def summarize(recipes: Sequence[Recipe], scores: Sequence[Scores], works: Sequence[Workspace]) -> dict[str, Any]:
    """What the seeds say together, as JSON values: accuracies a seed, and paired differences with two intervals."""
    data = works[0].data()
    groups, tasks = data.groups[data.rows(TEST)], list(data.targets)
    accuracy = {n: {t: [float(np.nanmean(one[n][t])) for one in scores] for t in tasks} for n in scores[0]}
    pairs = [(ours, theirs, task) for ours, theirs in PAIRS for task in tasks] + fusion_pairs(accuracy, tasks)
    return {
        "recipe": recipes[0].name.removesuffix("-seed0"),
        "seeds": [recipe.seed for recipe in recipes],
        "test_rows": len(groups),
        "families": len(np.unique(groups)),
        "num_params": {name: works[0].done[name].info["num_params"] for name in (TEACHER, STUDENT, "pruned")},
        "teacher_passes": [name for name in accuracy if name.endswith(tuple(CONDITIONS))],
        "models": list(MODELS),
        "arms": ARMS,
        "accuracy": accuracy,
        "differences": [compare(scores, ours, theirs, task, groups) for ours, theirs, task in pairs],
    }


def compare(scores: Sequence[Scores], ours: str, theirs: str, task: str, groups: NDArray[np.int64]) -> dict[str, Any]:
    """A paired difference: its mean, each seed's, and how sure it is over seeds and over test families."""
    a, b = (np.stack([one[name][task] for one in scores]) for name in (ours, theirs))  # [seeds, rows]
    known = ~np.isnan(a[0])
    values = [float(gap) for gap in np.nanmean(a, axis=1) - np.nanmean(b, axis=1)]
    over_families = paired_cluster_bootstrap(a.mean(axis=0)[known], b.mean(axis=0)[known], groups[known])
    return {
        "of": ours,
        "against": theirs,
        "task": task,
        "mean": fmean(values),
        "seeds_ci95": t_interval(values),
        "families_ci95": list(over_families.ci95),
        "values": values,
    }


def fusion_pairs(accuracy: dict[str, dict[str, list[float]]], tasks: Sequence[str]) -> list[tuple[str, str, str]]:
    """Fusion against the modality that alone is better on average over seeds, a condition and task."""
    pairs = []
    for condition in CONDITIONS:
        alone = [name for name in accuracy if name.endswith(f"alone, {condition}")]
        for task in tasks:
            best = max(alone, key=lambda name: fmean(accuracy[name][task]), default=None)
            pairs += [(f"{FUSED}, {condition}", best, task)] if best else []
    return pairs


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    about = "Accuracy of a recipe over seeds, with an ablation; finished runs are not repeated."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart_seeds", description=about)
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, such as student.train.epochs=5")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on")
    parser.add_argument("--recipe", default="configs/quickstart.yaml")
    parser.add_argument("--output", default="runs/seeds", help="folder of the runs")
    add_outputs(parser)
    parser.add_argument("--full", action="store_true", help="run every stage and compare the reports, bundles included")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Run all seeds and print the tables."""
    options = parse(arguments)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    recipes = seed_recipes(options.recipe, options.overrides, options.output, options.seeds)
    works, scores = [], []
    for recipe in recipes:
        say(f"== {recipe.name}")
        works.append(finished_run(recipe, full=options.full, say=say))
        scores.append(score_seed(works[-1]))
    command = command_line("benchmarks.quickstart_seeds", arguments)
    summary = {"command": command, **summarize(recipes, scores, works)}
    text = markdown(summary)
    if options.full:
        reports = [read_json(work.path("report") / "report.json") for work in works]
        summary["reports"] = compare_runs(reports, [recipe.name for recipe in recipes])
        text += "\n" + render_comparison(summary["reports"])
    put_out(options, text, summary)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
