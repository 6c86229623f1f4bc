"""Figures about one model: calibration, classes against the teacher's, and the confusion matrix."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from distill.report import formats
from distill.report.svg import Scale, figure, line, linear, marker, node, polyline, rect, slots, text

NUM_CLASSES = 14
"""Classes drawn in the class figure: those that lost and those that gained most."""

NAME_LENGTH = 19

FEW_ROWS = 10
"""A bin with fewer rows is drawn faint: its accuracy is mostly chance."""


def reliability(report: dict[str, Any], task: str, model: str) -> Markup:
    """Draw accuracy against confidence in equal-width bins, with the number of rows in each bin below."""
    curve = report["reliability"][task][model]
    slot = slots([m["name"] for m in report["models"]])[model]
    quality = next(m["quality"][task] for m in report["models"] if m["name"] == model)
    x, y = Scale(0, 1, 34, 214), Scale(0, 1, 190, 24)
    num_bins, most = len(curve["num_rows"]), max(*curve["num_rows"], 1)
    width = (x.end - x.start) / num_bins
    parts = [text(0, 11, model, class_="strong"), text(214, 11, f"ECE {formats.percent(quality['ece'])}", anchor="end")]
    for tick in (0, 0.5, 1):
        parts.append(line(x.start, y(tick), x.end, y(tick), "grid"))
        parts.append(text(x.start - 5, y(tick) + 4, f"{100 * tick:.0f}", anchor="end", class_="tick"))
        parts.append(text(x(tick), 236, f"{100 * tick:.0f}", anchor="middle", class_="tick"))
    for index, (count, accuracy) in enumerate(zip(curve["num_rows"], curve["accuracy"], strict=True)):
        left = x.start + index * width + 0.75
        if count:
            label = node("title", f"{count} rows: accuracy {formats.percent(accuracy)}")
            faint = " faint" if count < FEW_ROWS else ""
            bar = rect(left, y(accuracy), width - 1.5, y(0) - y(accuracy), f"s{slot} bar{faint}")
            parts += [
                node("g", label, bar),
                rect(left, 222 - 26 * count / most, width - 1.5, 26 * count / most, "count"),
            ]
    parts.append(polyline([(x(0), y(0)), (x(1), y(1))], "reference"))
    parts += [text(124, 252, "confidence, %", anchor="middle", class_="tick")]
    return figure(218, 256, f"Reliability of {model} on {task}: accuracy against confidence", *parts)


def class_differences(report: dict[str, Any], task: str) -> Markup:
    """Draw the recall of teacher and shipped model for the classes that changed most."""
    difference = report["class_differences"][task]
    first, last = _most_changed(difference["classes"])
    shown = first + last
    if not shown:
        return Markup("")
    colour = slots([m["name"] for m in report["models"]])
    ours, theirs = colour[difference["model"]], colour[difference["reference"]]
    left, right, top, row = 168.0, 396.0, 24.0, 21.0
    bottom = top + row * len(shown)
    x = linear([c[key] for c in shown for key in ("model", "reference")], left, right)
    parts = [
        text(460, 12, "points", anchor="end", class_="tick"),
        text(left, 12, f"{difference['measure']}, %", class_="tick"),
    ]
    for tick in x.ticks():
        parts.append(line(x(tick), top, x(tick), bottom, "grid"))
        parts.append(
            text(x(tick), bottom + 16, formats.percent_number(tick).removesuffix(".0"), anchor="middle", class_="tick")
        )
    if first and last:
        y = top + row * len(first)
        parts.append(line(0, y, 460, y, "divider"))
    for number, entry in enumerate(shown):
        y = top + row * (number + 0.5)
        parts.append(_row_label(entry, left - 14, y + 4))
        parts.append(line(x(entry["reference"]), y, x(entry["model"]), y, f"s{ours} whisker"))
        parts += [marker(x(entry["reference"]), y, theirs, 3.8), marker(x(entry["model"]), y, ours, 3.8)]
        parts.append(text(460, y + 4, formats.points(entry["difference"]), anchor="end", class_="strong"))
    return figure(
        460,
        bottom + 22,
        f"{difference['measure'].capitalize()} of classes on {task}: {difference['model']} and teacher",
        *parts,
    )


def confusion_matrix(report: dict[str, Any], task: str) -> Markup:
    """Draw the confusion matrix as shares of each target class; empty for a task of many classes."""
    matrix = report["confusions"][task]["matrix"]
    if not matrix:
        return Markup("")
    names = report["class_names"][task]
    left, top = 132.0, 8.0
    cell = min(36.0, (460 - left) / len(names))
    parts = []
    for i, row in enumerate(matrix):
        total = sum(row) or 1
        y = top + i * cell
        parts.append(text(left - 8, y + cell / 2 + 4, _cut(names[i], 19), anchor="end"))
        parts += [
            _cell(left + j * cell, y, cell, row[j] / total, (names[i], names[j], row[j])) for j in range(len(row))
        ]
    bottom = top + cell * len(names)
    for j, name in enumerate(names):
        x = left + (j + 0.6) * cell
        turned = node(
            "text", _cut(name, 14), text_anchor="end", transform=f"translate({x:.1f} {bottom + 10:.1f}) rotate(-42)"
        )
        parts.append(turned)
    model = report["confusions"][task]["model"]
    return figure(460, bottom + 82, f"Confusion matrix of {model} on {task}: target down, prediction across", *parts)


def _most_changed(every: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return all classes if they are few, else those that lost most and those that gained most."""
    if len(every) <= NUM_CLASSES:
        return every, []
    lost, gained = [c for c in every if c["change"] < 0], [c for c in every if c["change"] > 0]
    num_gained = min(len(gained), max(NUM_CLASSES // 2, NUM_CLASSES - len(lost)))
    return lost[: NUM_CLASSES - num_gained], gained[len(gained) - num_gained :]


def _cell(x: float, y: float, cell: float, share: float, what: tuple[str, str, int]) -> Markup:
    label = node("title", f"{what[0]} named {what[1]}: {what[2]} ({formats.percent(share)})")
    parts = [label, rect(x, y, cell - 1, cell - 1, "heat", fill_opacity=f"{0.04 + 0.96 * share:.2f}")]
    if share >= 0.005 and cell >= 24:
        shade = "on" if share > 0.55 else "tick"
        parts.append(text(x + (cell - 1) / 2, y + cell / 2 + 3.5, f"{100 * share:.0f}", anchor="middle", class_=shade))
    return node("g", *parts)


def _row_label(entry: dict[str, Any], x: float, y: float) -> Markup:
    rows = node("tspan", f" {entry['n']}", class_="tick")
    return node(
        "text",
        node("title", f"{entry['class']}: {entry['n']} rows"),
        _cut(entry["class"], NAME_LENGTH),
        rows,
        x=x,
        y=y,
        text_anchor="end",
    )


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
