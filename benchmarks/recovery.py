"""What pruning and int8 cost a recipe's student, and what training gives back: with a teacher, and with labels alone.

Every seed is a run of its own (``OUTPUT/NAME-seedS``) with the bundles ``onnx-int8`` and ``onnx-int8-qat``. Two arms
beside it learn from the objective of the baseline, for as many epochs: the recovery from the same pruning plan, and the
quantization-aware training of the same pruned student. What is finished is kept, so a second call only prints.

    python -m benchmarks.recovery --seeds 3 --markdown recovery.md --json recovery.json
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import students
from benchmarks.quickstart_seeds import Scores, compare, correct, kept, seed_recipes, student_predictions
from benchmarks.seed_tables import (
    accuracy_rows,
    command_line,
    difference_rows,
    put_out,
    seed_parser,
    table,
)
from distill import aware, evaluate, pipeline, prune
from distill.build import input_spec
from distill.bundles import AWARE, QAT
from distill.config import INT8, Recipe
from distill.contracts import TEST, Artifact, UserError
from distill.jobs import run_engine
from distill.predict import open_graph
from distill.quantization.static import StaticQuantizer
from distill.recovery import recovery
from distill.report import formats
from distill.runs import find, fingerprint, finish, locked, start
from distill.workspace import PLAN_FILE, PRUNED, STUDENT, TEACHER, Workspace

VERSION = 1  # raised when an arm's code changes what it trains or predicts
DENSE, ONE_SHOT = "dense, fp32", "pruned, not recovered"
BY_KD, BY_LABELS = "pruned, recovered by KD", "pruned, recovered by labels"
PTQ, QAT_LABELS, QAT_KD = "int8, not trained (PTQ)", "int8, trained by labels (QAT)", "int8, trained by KD (QAT)"
ARMS = (DENSE, ONE_SHOT, BY_LABELS, BY_KD, PTQ, QAT_LABELS, QAT_KD)
PAIRS = (
    (ONE_SHOT, DENSE),
    (BY_KD, ONE_SHOT),
    (BY_KD, BY_LABELS),
    (BY_KD, DENSE),
    (PTQ, BY_KD),
    (QAT_LABELS, PTQ),
    (QAT_KD, PTQ),
    (QAT_KD, QAT_LABELS),
    (PTQ, DENSE),
    (QAT_KD, DENSE),
)
BUNDLES = f"export.bundles=[{INT8},{AWARE}]"


def labels_alone(recipe: Recipe) -> Recipe:
    """The recipe whose student learns from the objective of its baseline, for int8 too."""
    labels, quantize = {"objective": recipe.student.baseline}, recipe.export.quantize
    aware_too = quantize.model_copy(update={"qat": quantize.qat.model_copy(update=labels)})
    changes = {
        "student": recipe.student.model_copy(update=labels),
        "export": recipe.export.model_copy(update={"quantize": aware_too}),
    }
    return recipe.model_copy(update=changes)


def trained_arm(
    work: Workspace, stage: str, recipe: Recipe, train: Callable[[Workspace, Path], dict[str, Any]]
) -> Workspace:
    """A stage of the run, trained with another recipe beside it, or found; the workspace returned has it instead."""
    of = work.done[stage]
    key = fingerprint(VERSION, stage, of.fingerprint, recipe.student.model_dump())
    folder = pipeline.run_folder(recipe) / "arms" / stage
    variant = replace(work, recipe=recipe, done={**work.done, stage: Artifact(stage, folder, key)})
    found = find(folder, stage, key)
    if found is None:
        start(folder, key, resume=True)
        found = finish(folder, stage, key, train(variant, folder))
    variant.done[stage] = found
    return variant


def recovered_by_labels(work: Workspace) -> Workspace:
    """The run's pruned student, recovered from the same plan without a teacher."""

    def train(variant: Workspace, folder: Path) -> dict[str, Any]:
        shutil.copyfile(work.path(PRUNED) / PLAN_FILE, folder / PLAN_FILE)
        one = variant.recipe.prune.model_copy(update={"steps": 1})
        job = recovery(replace(variant, recipe=variant.recipe.model_copy(update={"prune": one})), folder, 1)
        return run_engine(variant, job, "recover by labels")

    return trained_arm(work, PRUNED, labels_alone(work.recipe), train)


def aware_by_labels(work: Workspace) -> Workspace:
    """The run's pruned student, trained for int8 without a teacher."""
    return trained_arm(work, QAT, labels_alone(work.recipe), aware.train_aware)


def one_shot_predictions(work: Workspace) -> evaluate.Arrays:
    """What the pruned student says before it is recovered."""
    plan = prune.PrunePlan.load(work.path(PRUNED) / PLAN_FILE)
    model: Any = prune.apply(work.model(STUDENT), plan)
    loader = work.clean_loader(TEST, input_spec(model), STUDENT)
    return evaluate.predict_torch(model.eval(), evaluate.clean_batches(loader, STUDENT))


def int8_predictions(work: Workspace, *, trained: bool) -> evaluate.Arrays:
    """What the int8 graph of the pruned student says, or of what was trained for int8, on onnxruntime."""
    model, ranges = aware.plain(work) if trained else (work.model(PRUNED), None)
    with tempfile.TemporaryDirectory() as folder:
        graph, int8 = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        aware.export_graph(work, model, graph)
        StaticQuantizer(graph, aware.calibration(work, model), aware.settings(work, model), ranges).write(int8)
        loader = work.clean_loader(TEST, input_spec(model), STUDENT)
        return evaluate.predict_bundle(open_graph(int8), evaluate.clean_batches(loader, STUDENT))


def score_seed(work: Workspace) -> Scores:
    """Train the arms of one seed and predict the test rows with everything."""
    data = work.data()
    rows = data.rows(TEST)
    targets = {task: values[rows] for task, values in data.targets.items()}
    with locked(pipeline.run_folder(work.recipe)):
        by_labels, aware_labels = recovered_by_labels(work), aware_by_labels(work)
        of = {
            DENSE: (work, STUDENT, lambda: student_predictions(work, STUDENT)),
            ONE_SHOT: (work, PRUNED, lambda: one_shot_predictions(work)),
            BY_LABELS: (by_labels, PRUNED, lambda: student_predictions(by_labels, PRUNED)),
            BY_KD: (work, PRUNED, lambda: student_predictions(work, PRUNED)),
            PTQ: (work, PRUNED, lambda: int8_predictions(work, trained=False)),
            QAT_LABELS: (aware_labels, QAT, lambda: int8_predictions(aware_labels, trained=True)),
            QAT_KD: (work, QAT, lambda: int8_predictions(work, trained=True)),
        }
        scores: Scores = {}
        for number, name in enumerate(ARMS):
            owner, stage, predict = of[name]
            key = fingerprint(VERSION, name, owner.done[stage].fingerprint, owner.recipe.export.quantize.model_dump())
            place = pipeline.run_folder(work.recipe) / "arms" / f"predict_{number}"
            scores[name] = correct(kept(place, name, key, predict), "logits", targets)
    return scores


def costs(work: Workspace) -> dict[str, dict[str, float]]:
    """Bytes and median milliseconds of the teacher and of the int8 bundles on onnxruntime."""
    measured = work.done["bench"].info["models"]
    return {
        name: {"bytes": measured[name]["size_bytes"], "ms": measured[name]["latency_ms"]["p50"]}
        for name in (TEACHER, STUDENT, INT8, AWARE)
    }


def summarize(recipes: Sequence[Recipe], scores: Sequence[Scores], works: Sequence[Workspace]) -> dict[str, Any]:
    """What the seeds say together, as JSON values."""
    data = works[0].data()
    groups, tasks = data.groups[data.rows(TEST)], list(data.targets)
    return {
        "recipe": recipes[0].name.removesuffix("-seed0"),
        "seeds": [recipe.seed for recipe in recipes],
        "ratio": recipes[0].prune.ratio,
        "epochs": {"recovery": recipes[0].prune.train.epochs, "qat": recipes[0].export.quantize.qat.train.epochs},
        "accuracy": {n: {t: [float(np.nanmean(one[n][t])) for one in scores] for t in tasks} for n in ARMS},
        "differences": [compare(scores, ours, theirs, task, groups) for ours, theirs in PAIRS for task in tasks],
        "costs": [costs(work) for work in works],
    }


def cost_rows(summary: dict[str, Any]) -> list[list[str]]:
    """One row a model: size and latency, and how many times smaller and faster than the teacher it is."""
    rows = []
    for name in summary["costs"][0]:
        size, ms = ([one[name][field] for one in summary["costs"]] for field in ("bytes", "ms"))
        smaller, faster = (
            [one[TEACHER][field] / one[name][field] for one in summary["costs"]] for field in ("bytes", "ms")
        )
        found = [f"{fmean(size) / 1e6:.2f} MB", f"{fmean(ms):.3f} ms"]
        rows.append([name, *found, f"{fmean(smaller):.1f}×", f"{fmean(faster):.1f}×", *(f"{x:.1f}×" for x in faster)])
    return rows


def markdown(summary: dict[str, Any]) -> str:
    """The tables, with the command that makes them."""
    seeds = [f"seed {seed}" for seed in summary["seeds"]]
    half = formats.percent_number(summary["ratio"])
    epochs = summary["epochs"]
    parts = [
        f"# {summary['recipe']}: what pruning and int8 cost, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}",
        f"    {summary['command']}",
        f"Test rows. {half} % of channels pruned at once, {epochs['recovery']} epochs of recovery, {epochs['qat']} of\n"
        "quantization-aware training. ± and “over seeds”: 95 % t-interval over seeds, each with a teacher of its own.\n"
        "“Over families”: cluster bootstrap of the mean over these seeds. All int8 graphs are of the student that was\n"
        "recovered by KD, have the same operators and run on onnxruntime.",
        table(["model", "task", "accuracy, %", *seeds], accuracy_rows(summary, {name: name for name in ARMS})),
        table(
            ["difference", "task", "points", "95 % over seeds", "95 % over families", *seeds],
            difference_rows(summary, lambda ours, theirs: True),
        ),
        "Sizes and median latencies, all on onnxruntime, batch 1; each seed's speed-up in the last columns.",
        table(["model", "size", "latency", "smaller", "faster", *seeds], cost_rows(summary)),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Run all seeds and print the tables."""
    parser = seed_parser(
        "benchmarks.recovery", __doc__, recipe="configs/quickstart.yaml", any_recipe="any whose tasks have classes"
    )
    options = parser.parse_intermixed_args(arguments)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    recipes = seed_recipes(options.recipe, [*options.overrides, BUNDLES], options.output, options.seeds)
    works, scores = [], []
    for recipe in recipes:
        say(f"== {recipe.name}")
        done = pipeline.run(recipe, say=say)
        works.append(Workspace(recipe, pipeline.ENCODERS, students.INHERITANCES, done))
        scores.append(score_seed(works[-1]))
    summary = {"command": command_line("benchmarks.recovery", arguments), **summarize(recipes, scores, works)}
    put_out(options, markdown(summary), summary)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
