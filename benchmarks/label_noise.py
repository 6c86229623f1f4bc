"""Are the labels that a teacher doubts the wrong ones? ``python -m benchmarks.label_noise``.

Some labels of the packaged emoji are exchanged for other classes at random, in all splits, and the quick start runs as
it always does: its teacher learns from the wrong labels too. Of the labels that the report doubts, how many are the
exchanged ones, and how many of these does it find?

What is finished is kept, so a second call only prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet

import students
from benchmarks.seed_tables import add_outputs, command_line, put_out, table
from distill import pipeline
from distill.contracts import UserError
from distill.label_noise import Doubts, doubts_of
from distill.recipe import load_recipe
from distill.report import formats
from distill.workspace import Workspace

TASK = "category"
SAMPLE = Path(__file__).parents[1] / "distill" / "data" / "samples" / "emoji"


def exchange(labels: Sequence[str], share: float, seed: int) -> tuple[list[str], np.ndarray]:
    """Return labels of which a share became another of the classes, and which ones, bool [N]."""
    random, classes = np.random.default_rng(seed), sorted(set(labels))
    wrong = random.random(len(labels)) < share
    others = random.integers(1, len(classes), len(labels))
    places = np.array([classes.index(label) for label in labels])
    changed = np.where(wrong, (places + others) % len(classes), places)
    return [classes[place] for place in changed], wrong


def write_table(path: Path, share: float, seed: int) -> set[int]:
    """Write the sample with exchanged labels; return the ids of their rows."""
    rows = pa.concat_tables([pa_parquet.read_table(file) for file in sorted(SAMPLE.glob("*.parquet"))])
    labels, wrong = exchange(rows[TASK].to_pylist(), share, seed)
    place = rows.column_names.index(TASK)
    path.parent.mkdir(parents=True, exist_ok=True)
    pa_parquet.write_table(rows.set_column(place, TASK, pa.array(labels)), path, row_group_size=512)
    return set(np.asarray(rows["id"])[wrong].tolist())


def measure(found: Doubts, judged: set[int], wrong: set[int]) -> dict[str, Any]:
    """Return how the doubts of a split and its wrong labels meet.

    Args:
        found: the strongest first.
        judged: ids of the split's rows.
        wrong: ids of all rows with an exchanged label.
    """
    doubted, there = [doubt.id for doubt in found.found], wrong & judged
    right = len(there.intersection(doubted))
    strongest = doubted[: len(there)]
    return {
        "labels": found.judged,
        "wrong": len(there),
        "doubted": len(doubted),
        "found": right / max(1, len(there)),
        "precision": right / max(1, len(doubted)),
        "strongest": len(there.intersection(strongest)) / max(1, len(strongest)),
    }


def markdown(found: dict[str, dict[str, Any]], options: argparse.Namespace, command: str) -> str:
    """The table, with what it is about."""
    titles = ["split", "labels", "wrong", "doubted", "wrong ones that are doubted", "doubted ones that are wrong"]
    rows = [
        [split, f"{each['labels']:,}", str(each["wrong"]), str(each["doubted"])]
        + [formats.percent(each[name]) for name in ("found", "precision", "strongest")]
        for split, each in found.items()
    ]
    about = (
        f"Each label of {TASK} was exchanged for another class with probability {options.share:g} (seed "
        f"{options.seed}), in all splits; teacher and student learnt from what came of it. The last column is of as "
        "many of the strongest doubts as there are wrong labels: the share of these that are."
    )
    shown = table([*titles, "strongest"], rows)
    return f"# Labels that the teacher doubts\n\n    {command}\n\n{fill(about, 120)}\n\n{shown}\n"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_noise", description=__doc__, formatter_class=raw)
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, such as student.train.epochs=5")
    parser.add_argument("--share", type=float, default=0.05, help="of labels that are exchanged")
    parser.add_argument("--seed", type=int, default=0, help="of the exchange")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the run")
    add_outputs(parser)
    options = parser.parse_args(arguments)
    if not 0 < options.share < 1:
        parser.error(f"--share {options.share:g}: expected a number between 0 and 1")
    return options


def main(arguments: Sequence[str]) -> None:
    """Run what has not run yet, and print the table."""
    options = parse(arguments)
    name = f"label_noise-{options.share:g}-{options.seed}"
    file = options.output / f"{name}.parquet"
    wrong = write_table(file, options.share, options.seed)
    own = [f"data.source.path={file}", f"name={name}", f"output={options.output}"]
    recipe = load_recipe("quickstart", [*options.overrides, *own])
    done = pipeline.run(recipe, say=lambda line: print(line, file=sys.stderr, flush=True))
    work = Workspace(recipe, pipeline.ENCODERS, students.INHERITANCES, done, quiet=True)
    data = work.data()
    found = {
        split: measure(doubts, set(data.ids[data.rows(split)].tolist()), wrong)
        for split, doubts in doubts_of(work)[TASK].items()
    }
    command = command_line("benchmarks.label_noise", arguments)
    put_out(options, markdown(found, options, command), {"command": command, "splits": found})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
