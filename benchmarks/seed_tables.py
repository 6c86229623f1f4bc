"""Tables as Markdown, those of :mod:`benchmarks.quickstart_seeds` among them, and where a benchmark puts them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from distill.report import formats
from distill.report.compare import t_interval
from distill.runs import write_json

Summary = dict[str, Any]

PLACES = ("--output", "--out", "--json", "--markdown")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(row) for row in (titles, ["---"] * len(titles), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`put_out` reads."""
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")


def seed_parser(module: str, about: str | None, *, recipe: str, any_recipe: str) -> argparse.ArgumentParser:
    """The command line of a benchmark that runs a recipe under several seeds.

    Args:
        module: such as "benchmarks.caption_kd".
        about: its docstring.
        recipe: the one that is run by default.
        any_recipe: which others may be.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about, formatter_class=raw)
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, such as student.train.epochs=5")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--recipe", default=recipe, help=any_recipe)
    parser.add_argument("--output", default="runs", help="folder of the runs")
    add_outputs(parser)
    return parser


def put_out(options: argparse.Namespace, text: str, found: Mapping[str, Any]) -> None:
    """Print tables, and write them and what they show where the options say."""
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        write_json(options.json, dict(found))


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command that makes a table anywhere: without the places that it was told to write to."""
    shown: list[str] = []
    names = iter(arguments)
    for word in names:
        if word in PLACES:
            next(names, None)
        elif not word.startswith(tuple(f"{place}=" for place in PLACES)):
            shown.append(word)
    return shlex.join(["python", "-m", module, *shown])


def mean_and_half(values: Sequence[float]) -> str:
    """Return "88.1 ±0.6": mean of shares in percent, half of its 95 % t-interval."""
    return f"{formats.percent_number(fmean(values))} {formats.half_width(t_interval(values))}".strip()


def accuracy_rows(summary: Summary, names: dict[str, str], retained_from: str = "") -> list[list[str]]:
    """One row a model and task: mean, half of its interval, each seed.

    Args:
        summary: of :func:`benchmarks.quickstart_seeds.summarize`.
        names: key in ``accuracy`` -> what to call it.
        retained_from: key of the model that a further column divides by, seed by seed.
    """
    rows = []
    for key, shown in names.items():
        for task, values in summary["accuracy"][key].items():
            row = [shown, task, mean_and_half(values)]
            if retained_from:
                whole = summary["accuracy"][retained_from][task]
                row.append(formats.percent_number(fmean(v / w for v, w in zip(values, whole, strict=True))))
            rows.append([*row, *map(formats.percent_number, values)])
    return rows


def difference_rows(summary: Summary, wanted: Callable[[str, str], bool]) -> list[list[str]]:
    """One row a paired difference that ``wanted(of, against)`` picks."""
    return [
        [
            f"{entry['of']} {formats.MINUS} {entry['against']}",
            entry["task"],
            formats.points(entry["mean"]),
            formats.points_range(entry["seeds_ci95"]),
            formats.points_range(entry["families_ci95"]),
            *map(formats.points, entry["values"]),
        ]
        for entry in summary["differences"]
        if wanted(entry["of"], entry["against"])
    ]


def markdown(summary: Summary) -> str:
    """The three tables, with the command that makes them."""
    seeds = [f"seed {seed}" for seed in summary["seeds"]]
    accuracy = ["model", "task", "accuracy, %"]
    difference = ["difference", "task", "points", "95 % over seeds", "95 % over families", *seeds]
    sizes = ", ".join(f"{name} {formats.count(number)}" for name, number in summary["num_params"].items())
    passes = summary["teacher_passes"]
    fused = passes[0]
    models, arms = summary["models"], summary["arms"]
    parts = [
        f"# {summary['recipe']}: {len(seeds)} seed{'s' if len(seeds) > 1 else ''}",
        f"    {summary['command']}",
        f"{summary['test_rows']} test rows of {summary['families']} families. Parameters: {sizes}.\n"
        "± and “over seeds”: 95 % t-interval over seeds, each with a teacher of its own. “Over families”: cluster\n"
        "bootstrap of the mean over these seeds; that of each single seed is in its run's report.",
        "## The teacher, and the same teacher with one modality",
        table([*accuracy, *seeds], accuracy_rows(summary, {name: name for name in passes})),
        table(difference, difference_rows(summary, lambda ours, theirs: ours in passes)),
        "## Student against baseline at equal budgets",
        table([*accuracy, "retention, %", *seeds], accuracy_rows(summary, {name: name for name in models}, fused)),
        table(difference, difference_rows(summary, lambda ours, theirs: {ours, theirs} <= set(models))),
        "## What inheritance and distillation add",
        table([*accuracy, *seeds], accuracy_rows(summary, arms)),
        table(difference, difference_rows(summary, lambda ours, theirs: not {ours, theirs} <= {*models, *passes})),
    ]
    return "\n\n".join(parts) + "\n"
