"""The readable reports: Markdown for a terminal or a pull request, one HTML file for everyone else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from distill.report import detail_figures, figures, formats
from distill.report.build import build_report
from distill.report.context import ReportContext
from distill.report.headline import is_clear, kept_of_teacher
from distill.report.svg import slots
from distill.runs import atomic, write_json

if TYPE_CHECKING:
    from rich.table import Table

FILTERS = (
    formats.percent, formats.percent_number, formats.percent_range, formats.points, formats.points_range,
    formats.p_value, formats.size, formats.count, formats.milliseconds, formats.seconds, formats.significant,
    formats.moment, formats.half_width, formats.label,
)  # fmt: skip

KINDS = {
    "baseline": "what the teacher adds, inherited and distilled",
    "pruning": "what pruning costs",
    "source": "what export changes",
    "teacher": "what is left to the teacher",
}
"""Why two models are compared."""


def write_report(context: ReportContext, folder: Path) -> dict[str, Any]:
    """Write ``report.json``, ``report.md`` and ``report.html`` into a folder; return the report."""
    report = build_report(context)
    write_json(folder / "report.json", report)
    for name, content in (("report.md", render_markdown(report)), ("report.html", render_html(report))):
        with atomic(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return report


def render_markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown tables."""
    environment = _environment(finalize=formats.markdown)
    return environment.get_template("report.md.j2").render(**_names(report))


def render_html(report: dict[str, Any]) -> str:
    """Return the report as one HTML file that loads nothing: styles, figures and images are inside."""
    environment = _environment(autoescape=True)
    environment.globals |= {"figures": figures, "details": detail_figures}
    return environment.get_template("report.html.j2").render(**_names(report))


def terminal_table(report: dict[str, Any]) -> Table:
    """Return the main table for a terminal: print it with :class:`rich.console.Console`."""
    from rich.table import Table
    from rich.text import Text

    tasks, directions = list(report["tasks"]), report["retrieval"]
    measured = " and ".join([*_measures(report), *(["recall@1"] if directions else [])])
    caption = f"{measured} in %, ± half of the 95 % interval; 1 MB = 1,000,000 bytes"
    table = Table(caption=caption, caption_justify="left")
    table.add_column("model", no_wrap=True)
    for title in ("params", "size", "p50", *tasks, *(formats.label(name) for name in directions), "kept"):
        table.add_column(Text(title), justify="right", no_wrap=True)
    for model in report["models"]:
        qualities = [(model["quality"].get(task, {}), report["tasks"][task]["measure"]) for task in tasks]
        accuracies = [
            f"{formats.percent_number(q.get(measure))} {formats.half_width(q.get('ci95'))}" for q, measure in qualities
        ]
        recalls = [each["models"].get(model["name"], {}).get("recall@1", {}) for each in directions.values()]
        accuracies += [f"{formats.percent_number(r.get('value'))} {formats.half_width(r.get('ci95'))}" for r in recalls]
        kept = formats.percent(kept_of_teacher(report, model)[0])
        cost = (formats.count(model["num_params"]), formats.size(model["size_bytes"]))
        latency = formats.milliseconds(model["latency_ms"]["p50"])
        style = "bold" if model["name"] == report["shipped"] else None
        table.add_row(*map(Text, (model["name"], *cost, latency, *accuracies, kept)), style=style)
    return table


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader("distill.report"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        **options,
    )
    environment.filters |= {function.__name__: function for function in FILTERS}
    environment.filters["settings"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    environment.globals["known"] = formats.known
    environment.tests["clear"] = is_clear
    return environment


def _names(report: dict[str, Any]) -> dict[str, Any]:
    models = report["models"]
    return {
        "report": report,
        "tasks": list(report["tasks"]),
        "models": models,
        "measure": {task: entry["measure"] for task, entry in report["tasks"].items()},
        "title": {task: figures.titled(figures.measure_of(report, task)) for task in report["tasks"]},
        "measured": figures.titled(" and ".join(_measures(report))),
        "kind": {task: entry["kind"] for task, entry in report["tasks"].items()},
        "slot": slots([model["name"] for model in models]),
        "modalities": list(dict.fromkeys(modality for model in models for modality in model["subsets"])),
        "contributors": list(
            dict.fromkeys(name for model in models for found in model["contributions"].values() for name in found)
        ),
        "notes": _latency_notes(models),
        "kinds": KINDS,
        "stages": _stages(report["costs"]),
    }


def _measures(report: dict[str, Any]) -> list[str]:
    """What the tasks are measured by, as people read it."""
    return list(dict.fromkeys(figures.measure_of(report, task) for task in report["tasks"]))


def _latency_notes(models: list[dict[str, Any]]) -> dict[str, list[str]]:
    """How latency was measured -> the models it holds for."""
    notes: dict[str, list[str]] = {}
    for model in models:
        if model["latency_note"] and model["latency_ms"]["p50"] is not None:
            notes.setdefault(model["latency_note"], []).append(model["name"])
    return notes


def _stages(costs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Costs a stage with their share of the largest, and the sums."""
    spent = {stage: (cost.get("seconds") or 0.0, cost.get("cpu_seconds") or 0.0) for stage, cost in costs.items()}
    most = max((wall for wall, _ in spent.values()), default=0.0) or 1.0
    rows = [
        {"stage": stage, "seconds": wall, "cpu_seconds": cpu, "share": wall / most}
        for stage, (wall, cpu) in spent.items()
    ]
    totals = (sum(wall for wall, _ in spent.values()), sum(cpu for _, cpu in spent.values()))
    return {"rows": rows, "seconds": totals[0], "cpu_seconds": totals[1]}
