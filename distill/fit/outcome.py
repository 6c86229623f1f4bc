"""What a search leaves: ``fit.json``, ``fit.md``, ``front.svg`` and, if something fits, ``best.yaml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distill.fit.budget import Budget, Figures, front
from distill.fit.records import Trial
from distill.fit.space import PRECISION
from distill.report import formats
from distill.report.svg import figure, line, linear, logarithmic, marker, node, polyline, spread, text
from distill.runs import atomic, write_json

VERSION = 1
JSON_FILE, MARKDOWN_FILE, FIGURE_FILE, BEST_FILE = "fit.json", "fit.md", "front.svg", "best.yaml"
WIDTH, HEIGHT, LEFT, TOP = 620.0, 340.0, 52.0, 34.0
SHORT, FULL, RECIPE, BEST = 1, 2, 3, 5  # colour and marker
STYLE = """svg { font: 12px system-ui, sans-serif; background: #fff; } text { fill: #16202c; }
.tick { fill: #667280; } .grid { stroke: #e1e5ea; } .reference { stroke: #b3372a; stroke-dasharray: 4 4; }
.curve { stroke: #1f5fd6; stroke-width: 2; fill: none; } .dot { fill: var(--c); stroke: #fff; }
.s1 { --c: #8b97a5; } .s2 { --c: #1f5fd6; } .s3 { --c: #0b8f86; } .s5 { --c: #d9660a; }"""


def write_outcome(folder: Path, found: Mapping[str, Any], trials: Sequence[Trial], budget: Budget) -> dict[str, Any]:
    """Write the files but for the recipe.

    Args:
        folder: of the search.
        found: what else ``fit.json`` holds: name, target, space, seed, seconds, and ``best``, the trial that fits.
        trials: the recipe's own bundles (number 0), looks and trainings in full.
        budget: what was asked for.

    Returns:
        The content of ``fit.json``.
    """
    shown = standing(trials)
    best = found["best"]
    content = {
        "version": VERSION,
        **found,
        "budget": vars(budget),
        "trials": [trial.as_json() for trial in trials],
        "front": [shown[index].as_json() for index in front([_figures(trial) for trial in shown])],
        "best": best.as_json() if best else None,
    }
    write_json(folder / JSON_FILE, content)
    for name, written in ((MARKDOWN_FILE, markdown(shown, best, budget)), (FIGURE_FILE, draw(shown, best, budget))):
        with atomic(folder / name) as temporary:
            temporary.write_text(written, encoding="utf-8")
    return content


def standing(trials: Sequence[Trial]) -> list[Trial]:
    """The trained ones: of a choice that was trained in full too, that alone."""
    full = [trial.number for trial in trials if trial.state == "full"]
    return [trial for trial in trials if trial.state == "full" or (trial.state == "short" and trial.number not in full)]


def markdown(shown: Sequence[Trial], best: Trial | None, budget: Budget) -> str:
    """Return the front as a table, with the recipe's own bundles."""
    members = {id(shown[index]) for index in front([_figures(trial) for trial in shown])}
    rows = [trial for trial in shown if id(trial) in members or trial.number == 0]
    rows.sort(key=lambda trial: _figures(trial))
    lines = [
        f"Budget: {budget.said}. Retention is of the teacher's measure on the validation rows.",
        "",
        "| choice | bundle | epochs | latency p50 | size | retention | |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for trial in rows:
        found = _figures(trial)
        changes = [f"`{path}` {value}" for path, value in trial.changes.items() if path != PRECISION]
        name = (
            "the recipe"
            if trial.number == 0
            else f"trial {trial.number}: {', '.join(changes) or 'the recipe as it is'}"
        )
        misses = "**best**" if trial is best else ", ".join(budget.misses(found)) or "fits"
        costs = f"{formats.milliseconds(found.latency_ms)} | {formats.size(found.size_bytes)}"
        lines.append(
            f"| {name} | {trial.values[PRECISION]} | {trial.share:.0%} | {costs} | {found.retention:.3f} | {misses} |"
        )
    return "\n".join(lines) + "\n"


def draw(shown: Sequence[Trial], best: Trial | None, budget: Budget) -> str:
    """Return latency against retention as SVG, with the budget and the front; axes alone where nothing was trained."""
    found = [_figures(trial) for trial in shown]
    limits = [value for value in (budget.max_latency_ms,) if value is not None]
    least = [value for value in (budget.min_retention,) if value is not None]
    right, bottom = WIDTH - 20, HEIGHT - 44
    x = logarithmic([one.latency_ms for one in found] + limits or [1.0], LEFT, right)
    y = linear([one.retention or 0.0 for one in found] + least or [0.0, 1.0], bottom, TOP, highest=2.0)
    parts = [node("style", Markup(STYLE))]
    for tick in x.ticks():
        parts += [line(x(tick), TOP, x(tick), bottom, "grid")]
        parts += [text(x(tick), bottom + 16, f"{tick:g}", anchor="middle", class_="tick")]
    for tick in y.ticks():
        parts += [line(LEFT, y(tick), right, y(tick), "grid")]
        parts += [text(LEFT - 6, y(tick) + 4, f"{tick:.2f}", anchor="end", class_="tick")]
    parts += [line(x(limit), TOP, x(limit), bottom, "reference") for limit in limits]
    parts += [line(LEFT, y(limit), right, y(limit), "reference") for limit in least]
    members = front(found)
    parts.append(polyline([(x(found[i].latency_ms), y(found[i].retention or 0.0)) for i in members], "curve"))
    labels: list[tuple[float, float, str]] = []
    for trial, one in zip(shown, found, strict=True):
        slot = BEST if trial is best else RECIPE if trial.number == 0 else FULL if trial.state == "full" else SHORT
        at = (x(one.latency_ms), y(one.retention or 0.0))
        title = node("title", f"trial {trial.number}: {one.said}")
        parts.append(node("g", marker(*at, slot, 6 if slot == BEST else 4.5), title))
        if slot in (BEST, RECIPE):
            named = [] if trial.number else ["the recipe", trial.values[PRECISION]]
            labels.append((*at, ", ".join([*named, *(["best"] if trial is best else [])])))
    heights = spread([height - 10 for _, height, _ in labels], 14.0, TOP + 10, bottom)
    for (along, _, name), height in zip(labels, heights, strict=True):
        parts.append(text(along, height, name, anchor="end" if along > WIDTH / 2 else None))
    parts += [text(LEFT, bottom + 34, "median latency of one row, ms", class_="tick")]
    parts += [text(0, 14, f"retention; grey: a third of the epochs; dashed: {budget.said}", class_="tick")]
    drawn = figure(WIDTH, HEIGHT, "Retention against latency", *parts)
    return str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def closest(trials: Sequence[Trial], budget: Budget) -> str:
    """In a few words the bundle that exceeds the budget least, of equals one that was trained in full: all it misses.

    A first look counts where its choice was not trained in full.
    """
    whole = [trial.number for trial in trials if trial.state == "full"]
    known = [trial for trial in trials if trial.figures and (trial.state == "full" or trial.number not in whole)]
    if not known:
        return "no candidate could be made"

    def order(trial: Trial) -> tuple[float, bool]:
        return max(0.0, *budget.excess(_figures(trial)).values()), trial.state != "full"

    nearest = min(known, key=order)
    what = "the recipe itself" if nearest.number == 0 else f"trial {nearest.number}"
    misses = ", ".join(budget.misses(_figures(nearest)))
    lacks = f"misses {misses}" if misses else "was not trained in full"
    return f"{what} comes closest ({_figures(nearest).said}), and {lacks}"


def _figures(trial: Trial) -> Figures:
    assert trial.figures is not None
    return trial.figures
