"""Several runs side by side: seeds of one recipe as mean and interval, recipes against each other.

Runs are repetitions of one another when their recipes differ in nothing but seed, name and output folder. Within a
run, intervals tell how far the test rows carry; across repetitions they tell how far the training seed does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, Any

from distill.contracts import UserError
from distill.report import formats
from distill.report.formats import DASH
from distill.retrieval import RECALLS

if TYPE_CHECKING:
    from rich.table import Table

Report = dict[str, Any]

MEASURED = "report.measured"
"""Recipe key of files that were measured on devices: they change no result."""

OWN_KEYS = ("seed", "name", "output", "trackers", "workers")
"""Recipe keys in which repetitions of a run may differ."""

T_SMALL = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantile of Student's t for 1 to 10 degrees of freedom."""


def compare_runs(reports: Sequence[Report], names: Sequence[str]) -> dict[str, Any]:
    """Return what several runs say together, as JSON values.

    Args:
        reports: contents of ``report.json`` files.
        names: what to call each run, unique.

    Returns:
        ``runs`` (what each is), ``accuracy`` (a model and task, or a recall: mean and 95 % t-interval over repetitions,
        and each run's value), ``differences`` (groups of repetitions against the first group, paired by seed),
        ``settings`` (recipe keys whose values differ) and ``warnings``.

    Raises:
        UserError: there is no run, or names do not fit.
    """
    if not reports or len(reports) != len(names) or len(set(names)) != len(names):
        raise UserError(f"expected one unique name for each of {len(reports)} runs, got {list(names)}; name each once")
    groups = _groups(reports, names)
    accuracy = list(_accuracies(reports, names, groups))
    return {
        "schema_version": 1,
        "runs": [_run(report, name, group) for report, name, group in zip(reports, names, groups, strict=True)],
        "accuracy": accuracy,
        "differences": list(_differences(reports, groups, accuracy)),
        "settings": _settings(reports, names),
        "warnings": _warnings(reports, names, groups),
    }


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of values that vary normally, or None for fewer than two."""
    if len(values) < 2:
        return None
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t, to three digits (beyond 10 by the Cornish-Fisher expansion)."""
    if degrees <= len(T_SMALL):
        return T_SMALL[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / (4 * degrees)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return z + first + second + third


def render_comparison(comparison: dict[str, Any]) -> str:
    """Return a comparison as Markdown."""
    runs = comparison["runs"]
    names = [run["name"] for run in runs]
    lines = ["# Comparison of runs", ""]
    lines += [f"- {warning}" for warning in comparison["warnings"]] + [""] * bool(comparison["warnings"])
    lines += _table(
        ["run", "recipe", "seeds", "made", "data"],
        [
            [
                r["name"],
                r["group"],
                formats.known("", r["seeds"]),
                formats.moment(r["created"]),
                r["data_fingerprint"] or DASH,
            ]
            for r in runs
        ],
    )
    lines += [
        "## Accuracy and recall, %",
        "",
        "Mean and 95 % t-interval over repetitions (recipes equal but for the seed).",
        "",
    ]
    lines += _table(
        ["recipe", "model", "task", "runs", "mean", *names], [_accuracy_row(a, names) for a in comparison["accuracy"]]
    )
    if comparison["differences"]:
        lines += ["## Differences of recipes, percentage points", ""]
        titles = ["recipe", "against", "model", "task", "pairs", "difference", "95 % interval"]
        lines += _table(titles, [_difference_row(d) for d in comparison["differences"]])
    if comparison["settings"]:
        lines += ["## Settings that differ", ""]
        rows = [[s["key"], *(_setting(s["values"][name]) for name in names)] for s in comparison["settings"]]
        lines += _table(["key", *names], rows)
    return "\n".join(lines)


def comparison_table(comparison: dict[str, Any]) -> Table:
    """Return the accuracies of a comparison as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    names = [run["name"] for run in comparison["runs"]]
    table = Table(
        caption="accuracy and recall in %, mean ± half of its 95 % t-interval over repetitions", caption_justify="left"
    )
    for number, title in enumerate(("recipe", "model", "task", "runs", "mean", *names)):
        table.add_column(Text(title), justify="left" if number < 3 else "right")
    for entry in comparison["accuracy"]:
        table.add_row(*map(Text, _accuracy_row(entry, names)))
    return table


def _groups(reports: Sequence[Report], names: Sequence[str]) -> list[str]:
    """Return for each run the label of its repetitions: the recipe's name, or the runs' where that is ambiguous."""
    keys = [repr(sorted(_leaves(_shared_settings(report)).items())) for report in reports]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    recipe = {
        key: _common_name([str(r["name"]) for r, own in zip(reports, keys, strict=True) if own == key]) for key in first
    }
    taken = list(recipe.values())
    return [recipe[key] if taken.count(recipe[key]) == 1 else f"{recipe[key]} ({names[first[key]]})" for key in keys]


def _common_name(names: list[str]) -> str:
    """Return what the names of repetitions share: "emoji" of "emoji-s0" and "emoji-s1"."""
    if len(set(names)) == 1:
        return names[0]
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r"[-_.]*(s|seed)?[-_.]*$", "", "".join(letters[0] for letters in shared)) or names[0]


def _run(report: Report, name: str, group: str) -> dict[str, Any]:
    return {
        "name": name,
        "group": group,
        "recipe": report["name"],
        "seeds": report["seeds"],
        "created": report["created"],
        "data_fingerprint": report["data"].get("fingerprint"),
    }


def _accuracies(reports: Sequence[Report], names: Sequence[str], groups: list[str]) -> Iterator[dict[str, Any]]:
    for group in dict.fromkeys(groups):
        members = [(report, name) for report, name, own in zip(reports, names, groups, strict=True) if own == group]
        for model in dict.fromkeys(m["name"] for report, _ in members for m in report["models"]):
            for task in dict.fromkeys(task for report, _ in members for task in _measured(report)):
                values = {name: _value(report, model, task) for report, name in members}
                known = [value for value in values.values() if value is not None]
                if known:
                    summary = {"runs": len(known), "mean": fmean(known), "ci95": t_interval(known), "values": values}
                    yield {"group": group, "model": model, "task": task} | summary


def _differences(
    reports: Sequence[Report], groups: list[str], accuracy: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Compare each group's models with the first group's, seed by seed where both have the seed."""
    first = groups[0]
    for entry in accuracy:
        model, task = entry["model"], entry["task"]
        if entry["group"] == first:
            continue
        ours, theirs = (_by_seed(reports, groups, group, model, task) for group in (entry["group"], first))
        gaps = [ours[seeds] - theirs[seeds] for seeds in ours if seeds in theirs]
        if gaps:
            common = {"group": entry["group"], "reference": first, "model": model, "task": task}
            yield common | {"pairs": len(gaps), "difference": fmean(gaps), "ci95": t_interval(gaps)}


def _by_seed(
    reports: Sequence[Report], groups: list[str], group: str, model: str, task: str
) -> dict[tuple[int, ...], float]:
    found = {}
    for report, own in zip(reports, groups, strict=True):
        value = _value(report, model, task)
        if own == group and value is not None:
            found[tuple(report["seeds"])] = value
    return found


def _measured(report: Report) -> list[str]:
    """The tasks, and the recalls of each direction of retrieval."""
    recalls = [f"{direction} recall@{k}" for direction in report.get("retrieval", {}) for k in RECALLS]
    return [*report["tasks"], *recalls]


def _value(report: Report, model: str, task: str) -> float | None:
    """A model's measure of a task, or a recall."""
    direction, _, recall = task.rpartition(" ")
    retrieval = report.get("retrieval", {})
    if direction in retrieval:
        measures = retrieval[direction]["models"].get(model)
        return float(measures[recall]["value"]) if measures else None
    for entry in report["models"]:
        if entry["name"] == model:
            measure = report["tasks"][task].get("measure", "accuracy")  # reports of earlier versions had no other
            value: float | None = entry["quality"].get(task, {}).get(measure)
            return value
    return None


def _settings(reports: Sequence[Report], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the recipe keys whose values are not the same in all runs; an absent key counts as None."""
    flat = [_leaves(report["recipe"]) for report in reports]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = ((key, [settings.get(key) for settings in flat]) for key in keys)
    return [
        {"key": key, "values": dict(zip(names, values, strict=True))}
        for key, values in rows
        if any(value != values[0] for value in values)
    ]


def _warnings(reports: Sequence[Report], names: Sequence[str], groups: list[str]) -> list[str]:
    found = []
    prints, tests = ([r["data"].get(key) for r in reports] for key in ("fingerprint", "test_fingerprint"))
    if None not in tests and len(set(tests)) > 1:
        found.append(
            "The runs do not share their test rows (ids, classes, texts, images): accuracies may differ by that."
        )
    if None in tests and len(set(prints)) > 1:
        found.append("The runs do not share one data fingerprint: their test rows may differ, so may their accuracies.")
    seen: dict[tuple[Any, ...], str] = {}
    for report, name, group in zip(reports, names, groups, strict=True):
        key = (group, *report["seeds"])
        if key in seen:
            found.append(f"{name} repeats recipe and seed of {seen[key]}: it adds no independent run.")
        seen.setdefault(key, name)
    return found


def _shared_settings(report: Report) -> dict[str, Any]:
    return {key: value for key, value in report["recipe"].items() if key not in OWN_KEYS}


def _leaves(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, without None: reports of earlier versions lack keys that later ones have unset."""
    return {key: value for key, value in _flat(settings) if key != MEASURED and value is not None}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dicts and of lists of dicts; other lists stay whole."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}.{index}")
    else:
        yield path, value


def _accuracy_row(entry: dict[str, Any], names: list[str]) -> list[str]:
    mean = f"{formats.percent_number(entry['mean'])} {formats.half_width(entry['ci95'])}".strip()
    values = [formats.percent_number(entry["values"].get(name)) for name in names]
    return [entry["group"], entry["model"], entry["task"], str(entry["runs"]), mean, *values]


def _difference_row(entry: dict[str, Any]) -> list[str]:
    values = [formats.points(entry["difference"]), formats.points_range(entry["ci95"])]
    return [entry["group"], entry["reference"], entry["model"], entry["task"], str(entry["pairs"]), *values]


def _setting(value: Any) -> str:
    return DASH if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[formats.markdown(cell) for cell in row] for row in (titles, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(titles)}", *lines[1:], ""]
