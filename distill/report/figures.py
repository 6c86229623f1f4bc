"""Figures that compare models: accuracy with intervals, against size and latency, and while training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from markupsafe import Markup

from distill.measures import SHOWN
from distill.report import formats
from distill.report.svg import Scale, figure, line, linear, logarithmic, marker, node, polyline, slots, spread, text

WIDTH = 460.0
LABEL_WIDTH = 6.4  # pixels of a letter at the figures' font size, for placing labels
LABEL_HEIGHT = 14.0


class Point(NamedTuple):
    """A model in a scatter plot."""

    name: str
    slot: int
    x: float
    y: float
    interval: list[float] | None


def intervals(report: dict[str, Any], task: str) -> Markup:
    """Draw each model's measure of a task with its 95 % interval, and the teacher's value as a line."""
    shown = [m for m in report["models"] if _value(report, m, task) is not None]
    if not shown:
        return Markup("")
    colour = slots([m["name"] for m in report["models"]])
    left, row, top = _label_space([m["name"] for m in shown]), 26.0, 8.0
    bottom = top + row * len(shown)
    values = [v for m in shown for v in (_value(report, m, task), *(m["quality"][task]["ci95"] or ()))]
    scale = linear(values, left, WIDTH - 60)
    parts = [
        *_columns(scale, top, bottom, formats.percent_number),
        _x_title(left, f"{measure_of(report, task)}, %", bottom + 34),
    ]
    teacher = next((m for m in shown if m["name"] == "teacher"), None)
    if teacher:
        x = scale(_value(report, teacher, task))
        parts.append(line(x, top, x, bottom, "reference"))
    for number, model in enumerate(shown):
        y = top + row * (number + 0.5)
        interval = model["quality"][task]["ci95"]
        slot = colour[model["name"]]
        parts.append(text(left - 12, y + 4, model["name"], anchor="end"))
        if interval:
            parts.append(line(scale(interval[0]), y, scale(interval[1]), y, f"s{slot} whisker"))
        parts.append(marker(scale(_value(report, model, task)), y, slot))
        parts.append(
            text(WIDTH - 4, y + 4, formats.percent(_value(report, model, task)), anchor="end", class_="strong")
        )
    return figure(WIDTH, bottom + 40, f"{titled(measure_of(report, task))} on {task} with 95 % intervals", *parts)


def against(report: dict[str, Any], task: str, measure: str) -> Markup:
    """Draw a task's measure against "size" or "latency", on a logarithmic axis; empty if fewer than two are known."""
    read, write, title = AXES[measure]
    colour = slots([m["name"] for m in report["models"]])
    points = [
        Point(m["name"], colour[m["name"]], read(m), _value(report, m, task), m["quality"][task]["ci95"])
        for m in report["models"]
        if read(m) and _value(report, m, task) is not None
    ]
    if len(points) < 2:
        return Markup("")
    left, right, top, bottom = 44.0, WIDTH - 14, 12.0, 250.0
    x = logarithmic([p.x for p in points], left, right)
    y = linear([v for p in points for v in (p.y, *(p.interval or ()))], bottom, top)
    parts = [*_rows(y, left, right, formats.percent_number), *_columns(x, top, bottom, write, grid=False)]
    parts += [_y_title(f"{measure_of(report, task)}, %", top), _x_title(left, title, bottom + 36)]
    for point in points:
        if point.interval:
            low, high = (y(bound) for bound in point.interval)
            parts.append(line(x(point.x), low, x(point.x), high, f"s{point.slot} whisker"))
    parts += [marker(x(p.x), y(p.y), p.slot, 5) for p in points]
    parts += _labels(points, x, y, top, bottom, right)
    return figure(WIDTH, bottom + 42, f"{titled(measure_of(report, task))} on {task} against {measure}", *parts)


def learning_curves(report: dict[str, Any], task: str | None) -> Markup:
    """Draw a task's measure on the validation rows, "recall@1", or the training loss if ``task`` is None."""
    colour = slots([m["name"] for m in report["models"]] + [n for n in report["curves"] if n not in _names(report)])
    entries = [entry for epochs in report["curves"].values() for entry in epochs]
    unit = "step" if all("step" in entry for entry in entries) else "epoch"  # models may have epochs of other lengths
    key = task if task == "recall@1" else f"{task}_{report['tasks'][task]['validated_by']}" if task else None
    series = {name: _series(epochs, key, unit) for name, epochs in report["curves"].items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return Markup("")
    values = [value for points in series.values() for _, value in points]
    loss, what = task is None, validated_by(report, task)
    left, right, top, bottom = 44.0, WIDTH - _label_space(list(series)) - 4, 12.0, 230.0
    steps = [step for points in series.values() for step, _ in points]
    x = Scale(min(steps), max(max(steps), min(steps) + 1), left, right)
    y = _loss_scale(values, bottom, top) if loss else linear(values, bottom, top)
    write = formats.significant if loss else formats.percent_number
    parts = [*_rows(y, left, right, write), *_columns(x, top, bottom, _whole, grid=False)]
    parts += [
        _y_title("training loss" if loss else f"validation {what}, %", top),
        _x_title(left, unit, bottom + 36),
    ]
    reaching = [name for name, points in series.items() if x(points[-1][0]) > right - 8]
    heights = spread([y(series[name][-1][1]) for name in reaching], LABEL_HEIGHT, top, bottom)
    label_at = dict(zip(reaching, heights, strict=True))
    for name, points in series.items():
        pixels = [(x(step), y(value)) for step, value in points]
        parts.append(polyline(pixels, f"s{colour[name]} curve"))
        parts.append(marker(*pixels[-1], colour[name], 3.5))
        if name in reaching:
            parts.append(polyline([pixels[-1], (right + 8, label_at[name])], "leader"))
            parts.append(text(right + 11, label_at[name] + 4, name))
        else:
            others = [[(x(s), y(v)) for s, v in series[other]] for other in series if other != name]
            parts.append(_end_label(name, pixels[-1], others))
    title = f"Training loss by {unit}" if loss else f"Validation {what} on {task} by {unit}"
    return figure(WIDTH, bottom + 42, title, *parts)


def measure_of(report: dict[str, Any], task: str | None) -> str:
    """Return what a task is measured by, as people read it; "recall@1" stands for retrieval."""
    return SHOWN[report["tasks"][task]["measure"]] if task in report["tasks"] else str(task)


def validated_by(report: dict[str, Any], task: str | None) -> str:
    """Return what a task is measured by on the validation rows in training, as people read it."""
    name = report["tasks"][task]["validated_by"] if task in report["tasks"] else str(task)
    return SHOWN.get(name, name.replace("_", " "))


def titled(words: str) -> str:
    """Return words with a capital in front; names such as mAP stay as they are."""
    first = words.split(" ")[0]
    return words if first != first.lower() else words[:1].upper() + words[1:]


def legend(names: list[str], colour: dict[str, int]) -> Markup:
    """Draw markers and names in a row of HTML."""
    entries = (node("span", swatch(colour[name]), name, class_="entry") for name in names)
    return node("div", *entries, class_="legend")


def swatch(slot: int) -> Markup:
    """Draw one model's marker, to stand beside its name."""
    return node("svg", marker(7, 7, slot), viewBox="0 0 14 14", class_="swatch", aria_hidden="true")


def _loss_scale(values: list[float], start: float, end: float) -> Scale:
    if min(values) > 0:
        return logarithmic(values, start, end)
    return linear(values, start, end, lowest=-math.inf, highest=math.inf)


def _end_label(name: str, end: tuple[float, float], others: list[list[tuple[float, float]]]) -> Markup:
    """Name a curve that ends early, on the side of its end that other curves leave free."""
    near = [y for curve in others for x, y in curve if abs(x - end[0]) < LABEL_WIDTH * len(name)]
    above, below = end[1] - 9, end[1] + 17

    def room(baseline: float) -> float:
        return min((abs(y - (baseline - 4)) for y in near), default=math.inf)

    return text(end[0], max(above, below, key=room), name, anchor="middle", class_="halo")


def _series(epochs: list[dict[str, Any]], key: str | None, unit: str) -> list[tuple[float, float]]:
    name = "train_loss" if key is None else f"valid/{key}"
    values = [(epoch.get(unit, number), epoch.get(name)) for number, epoch in enumerate(epochs)]
    return [(float(at), float(value)) for at, value in values if isinstance(value, int | float)]


def _labels(points: list[Point], x: Scale, y: Scale, top: float, bottom: float, right: float) -> list[Markup]:
    """Name the points beside their markers, pushed apart where they would overlap."""
    parts = []
    leftward = {p.name: x(p.x) + 10 + LABEL_WIDTH * len(p.name) > right for p in points}
    for side in (False, True):
        group = [p for p in points if leftward[p.name] is side]
        for p, at in zip(group, _label_heights(group, x, y, top, bottom, side), strict=True):
            px = x(p.x)
            shift = -9 if side else 9
            if abs(at - y(p.y)) > 5:
                parts.append(polyline([(px, y(p.y)), (px + shift * 0.9, at)], "leader"))
            parts.append(text(px + shift, at + 4, p.name, anchor="end" if side else None, class_="halo"))
    return parts


def _label_heights(group: list[Point], x: Scale, y: Scale, top: float, bottom: float, side: bool) -> list[float]:
    """Spread only those labels that share horizontal space."""
    heights = [y(p.y) for p in group]
    spans = []
    for p in group:
        width = LABEL_WIDTH * len(p.name) + 12
        spans.append((x(p.x) - width, x(p.x)) if side else (x(p.x), x(p.x) + width))
    pending = set(range(len(group)))
    while pending:
        cluster = {pending.pop()}
        while more := {
            i for i in pending if any(spans[i][0] < spans[j][1] and spans[j][0] < spans[i][1] for j in cluster)
        }:
            cluster |= more
            pending -= more
        members = sorted(cluster)
        for i, height in zip(members, spread([heights[i] for i in members], LABEL_HEIGHT, top, bottom), strict=True):
            heights[i] = height
    return heights


def _rows(scale: Scale, left: float, right: float, write: Callable[[float], str]) -> list[Markup]:
    parts = []
    for tick in scale.ticks():
        parts.append(line(left, scale(tick), right, scale(tick), "grid"))
        parts.append(text(left - 6, scale(tick) + 4, formats.trimmed(write(tick)), anchor="end", class_="tick"))
    return parts


def _columns(
    scale: Scale, top: float, bottom: float, write: Callable[[float], str], *, grid: bool = True
) -> list[Markup]:
    parts = [line(scale.start, bottom, scale.end, bottom, "axis")]
    for tick in scale.ticks():
        parts.append(line(scale(tick), top if grid else bottom, scale(tick), bottom if grid else bottom + 4, "grid"))
        parts.append(text(scale(tick), bottom + 17, formats.trimmed(write(tick)), anchor="middle", class_="tick"))
    return parts


def _x_title(left: float, title: str, y: float) -> Markup:
    return text((left + WIDTH) / 2, y, title, anchor="middle", class_="tick")


def _y_title(title: str, top: float) -> Markup:
    return text(0, top - 2, title, class_="tick")


def _label_space(names: list[str]) -> float:
    return min(150.0, 18 + LABEL_WIDTH * max(len(name) for name in names))


def _names(report: dict[str, Any]) -> list[str]:
    return [model["name"] for model in report["models"]]


def _value(report: dict[str, Any], model: dict[str, Any], task: str) -> Any:
    measure = report["tasks"][task]["measure"]
    quality = model["quality"].get(task, {})
    return quality.get(measure)


def _whole(value: float) -> str:
    return f"{value:g}"


AXES: dict[str, tuple[Callable[[dict[str, Any]], Any], Callable[[float], str], str]] = {
    "size": (lambda model: model["size_bytes"], formats.size, "size on disk"),
    "latency": (lambda model: model["latency_ms"]["p50"], formats.milliseconds, "median latency of one row"),
}
