"""What captions a student learns to write: ``python -m benchmarks.caption_kd [--recipe speech_to_text] [--seeds 3]``.

Every seed has a teacher of its own. One student learns in four ways, for as many steps and in the same order of rows:
from the true captions; from the teacher's probabilities of each word beside them; from captions that the teacher wrote
by beam search in their place (Kim & Rush 2016, arXiv 1606.07947); from both. What each writes for the test rows is
compared with the true captions.

What is finished is kept, so a second call only prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import students
from benchmarks.quickstart_seeds import seed_recipes
from benchmarks.seed_tables import command_line, mean_and_half, put_out, seed_parser, table
from benchmarks.student_arms import points_against
from distill import captions, evaluate, pipeline
from distill.build import input_spec
from distill.config import CaptionsConfig, Recipe
from distill.contracts import TEST, Artifact, UserError
from distill.report import formats
from distill.runs import copy_stage, find
from distill.targets import CAPTIONING, known
from distill.workspace import STUDENT, TEACHER, Workspace

LABELS, WORDS, SEQUENCES, BOTH = "true captions", "word-level KD", "sequence-level KD", "both"
MEASURES = ("exact match", "BLEU-1", "CIDEr-D")
EXAMPLES = 12
SHARED = ("data", "vocabulary", "pretrain", "towers", "transfer", "teacher", "inherit")
"""Stages that all ways to learn have in common."""

Written = dict[str, list[str]]
"""``true``, and a model or arm -> its captions of the test rows."""


def arms(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> the recipe whose student is it, with a run folder of its own; :func:`measure` shares what is alike."""
    told = recipe.cache.model_copy(update={"captions": CaptionsConfig(), "enabled": False})
    labels = recipe.student.model_copy(update={"objective": recipe.student.baseline})
    changes = {
        LABELS: {"student": labels},
        WORDS: {},
        SEQUENCES: {"student": labels, "cache": told},
        BOTH: {"cache": told},
    }
    return {
        name: recipe.model_copy(update={"name": f"{recipe.name}-{number}", **changed})
        for number, (name, changed) in enumerate(changes.items())
    }


def share(done: Mapping[str, Artifact], recipe: Recipe) -> None:
    """Copy what a run of the same seed has made, up to the student as it begins, to where another looks for it."""
    for name in SHARED:
        folder = pipeline.run_folder(recipe) / name
        if find(folder, name, done[name].fingerprint, read=False) is None:
            copy_stage(done[name].path, folder, name, done[name].fingerprint)


def written(work: Workspace, name: str) -> list[str]:
    """What a model of a run writes for the test rows that have a true caption, in their order."""
    model: Any = work.model(name)
    reads = TEACHER if name == TEACHER else STUDENT
    task = caption_task(work.recipe)
    loader = work.towers(work.clean_loader(TEST, input_spec(model), reads), model, reads)
    said = evaluate.predict_torch(model, evaluate.clean_batches(loader, reads))[f"logits.{task}"]
    data = work.data()
    return captions.texts(data.tasks[task], said[known(data.targets[task][data.rows(TEST)])])


def caption_task(recipe: Recipe) -> str:
    """The task whose captions are compared: the first one.

    Raises:
        UserError: the recipe has none.
    """
    for name, target in recipe.data.targets.items():
        if target.kind == CAPTIONING:
            return name
    raise UserError(f"{recipe.name} has no task of kind captioning; name another recipe, as speech_to_text")


def measure(recipe: Recipe) -> Written:
    """What teacher and students of one seed write, and what is true."""
    task, works = caption_task(recipe), {}
    for name, arm in arms(recipe).items():
        pipeline.run_folder(arm).mkdir(parents=True, exist_ok=True)
        if works:
            share(works[LABELS].done, arm)
        done = pipeline.run(arm, until=STUDENT)
        works[name] = Workspace(arm, pipeline.ENCODERS, students.INHERITANCES, done)
    data = works[LABELS].data()
    targets = data.targets[task][data.rows(TEST)]
    true = captions.texts(data.tasks[task], targets[known(targets)])
    students_write = {name: written(work, STUDENT) for name, work in works.items()}
    return {"true": true, TEACHER: written(works[LABELS], TEACHER), **students_write}


def scores(found: Written, name: str) -> dict[str, float]:
    """The measures of one model's captions, in [0, 1]."""
    ours, true = found[name], [[caption] for caption in found["true"]]
    values = (captions.exact(ours, true).mean(), captions.bleu(ours, true, 1), captions.cider(ours, true).mean())
    return {measure: float(value) for measure, value in zip(MEASURES, values, strict=True)}


def score_table(found: Sequence[Written]) -> str:
    """A row a model: each measure, and the difference to the student of true captions."""
    rows = []
    base = [scores(run, LABELS) for run in found]
    for name in (TEACHER, LABELS, WORDS, SEQUENCES, BOTH):
        ours = [scores(run, name) for run in found]
        cells = [name if name == TEACHER else f"student, {name}"]
        for what in MEASURES:
            values, others = [each[what] for each in ours], [each[what] for each in base]
            cells += [mean_and_half(values), "" if name in (TEACHER, LABELS) else points_against(values, others)]
        rows.append(cells)
    return table(["", *(title for what in MEASURES for title in (f"{what}, %", "points"))], rows)


def example_table(found: Written) -> str:
    """What is written for rows that lie evenly among those with different captions."""
    first = list({caption: row for row, caption in reversed(list(enumerate(found["true"])))}.values())[::-1]
    chosen = [first[number * len(first) // EXAMPLES] for number in range(min(EXAMPLES, len(first)))]
    names = ("true", TEACHER, LABELS, WORDS, SEQUENCES)
    return table(names, [[found[name][row] for name in names] for row in chosen])


def markdown(found: Sequence[Written], recipe: Recipe, command: str) -> str:
    """The tables, with the command that makes them."""
    about = (
        f"{len(found[0]['true'])} test rows, seeds 0 to {len(found) - 1}, each with a teacher of its own. ± is half\n"
        "of the 95 % t-interval over seeds; points are paired differences to the student of true captions, with their\n"
        "interval. CIDEr-D is in % of 10, which only long captions can reach: a perfect one of one word has 25."
    )
    title = f"# Captions, with distillation and without: {recipe.name.removesuffix('-seed0')}"
    examples = f"## Examples, seed 0\n\n{example_table(found[0])}"
    return "\n\n".join([title, f"    {command}", about, score_table(found), examples]) + "\n"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    any_recipe = "any with a task of kind captioning"
    parser = seed_parser("benchmarks.caption_kd", __doc__, recipe="speech_to_text", any_recipe=any_recipe)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Train what is not trained yet, and print the tables."""
    options = parse(arguments)
    recipes = seed_recipes(options.recipe, options.overrides, options.output, options.seeds)
    found = []
    for recipe in recipes:
        found.append(measure(recipe))
        shown = {name: formats.percent(scores(found[-1], name)["BLEU-1"]) for name in found[-1] if name != "true"}
        print(f"{recipe.name}: BLEU-1 {shown}", file=sys.stderr, flush=True)
    command = command_line("benchmarks.caption_kd", arguments)
    put_out(options, markdown(found, recipes[0], command), {"command": command, "seeds": found})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
