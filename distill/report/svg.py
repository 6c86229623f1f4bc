"""Small parts that the figures are drawn with: escaped elements, scales with ticks, markers.

Colours are CSS classes (``s0`` ... ``s7`` set ``--c``), so one figure serves light, dark and printed pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

NUM_SLOTS = 8
SLOTS = {"teacher": 0, "baseline": 1, "student": 2, "pruned": 3, "onnx-fp32": 4, "onnx-int8": 5}
"""Colour and marker of the models that most reports have."""

MARKERS = {
    1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    2: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
    3: ((0, -1.3), (1.25, 0.95), (-1.25, 0.95)),
    4: ((0, 1.3), (1.25, -0.95), (-1.25, -0.95)),
    5: ((0, -1.25), (1.2, -0.4), (0.75, 1.05), (-0.75, 1.05), (-1.2, -0.4)),
    6: ((-1.2, -0.5), (1.2, -0.5), (1.2, 0.5), (-1.2, 0.5)),
    7: ((-0.5, -1.2), (0.5, -1.2), (0.5, 1.2), (-0.5, 1.2)),
}
"""Corners of a slot's marker in units of its radius; slot 0 is a circle."""


def slots(names: list[str]) -> dict[str, int]:
    """Return each model's colour slot: its usual one, else the next that is free."""
    free = [slot for slot in range(NUM_SLOTS) if slot not in {SLOTS.get(name) for name in names}]
    found, others = {}, 0
    for name in names:
        if name in SLOTS:
            found[name] = SLOTS[name]
        else:
            found[name] = free[others % len(free)] if free else others % NUM_SLOTS
            others += 1
    return found


def node(tag: str, *children: Any, **attributes: Any) -> Markup:
    """Return an element; text and attribute values are escaped, ``class_`` and ``text_anchor`` become SVG's names."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{written}>{''.join(escape(child) for child in children)}</{tag}>")


def figure(width: float, height: float, title: str, *children: Any) -> Markup:
    """Return a whole ``<svg>`` with an accessible title."""
    box = f"0 0 {_short(width)} {_short(height)}"
    return node("svg", node("title", title), *children, viewBox=box, role="img", aria_label=title)


def text(x: float, y: float, value: Any, *, anchor: str | None = None, class_: str | None = None) -> Markup:
    """Return a text; ``anchor`` is "middle" or "end"."""
    return node("text", value, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return node("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: list[tuple[float, float]], class_: str) -> Markup:
    """Return an open line through points."""
    return node("polyline", points=" ".join(f"{_short(x)},{_short(y)}" for x, y in points), class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, **attributes: Any) -> Markup:
    """Return a rectangle."""
    return node("rect", x=x, y=y, width=max(0.0, width), height=max(0.0, height), class_=class_, **attributes)


def marker(x: float, y: float, slot: int, radius: float = 4.5) -> Markup:
    """Return the marker of a slot: shapes differ as well as colours."""
    if slot not in MARKERS:
        return node("circle", cx=x, cy=y, r=radius, class_=f"s{slot} dot")
    corners = " ".join(f"{_short(x + radius * dx)},{_short(y + radius * dy)}" for dx, dy in MARKERS[slot])
    return node("polygon", points=corners, class_=f"s{slot} dot")


@dataclass(frozen=True)
class Scale:
    """A map from values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float  # pixel of low
    end: float  # pixel of high
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Return about ``wanted`` round values inside the scale."""
        if self.log:
            return self._log_ticks()
        step = nice_step((self.high - self.low) / wanted)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
            if len(found) >= 3:
                return found
        return found


def linear(values: list[float], start: float, end: float, *, lowest: float = 0.0, highest: float = 1.0) -> Scale:
    """Return a linear scale around values with a margin, inside the limits."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.02
    low, high = max(lowest, low - margin), min(highest, high + margin)
    return Scale(low, high if high > low else low + margin, start, end)


def logarithmic(values: list[float], start: float, end: float) -> Scale:
    """Return a logarithmic scale around positive values with a margin."""
    low, high = min(values), max(values)
    factor = max((high / low) ** 0.1, 1.15)
    return Scale(low / factor, high * factor, start, end, log=True)


def nice_step(raw: float) -> float:
    """Return 1, 2 or 5 times a power of ten, the one nearest to ``raw``."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(digit * power for digit, limit in ((1, 1.5), (2, 3.5), (5, 7.5), (10, 10)) if raw / power <= limit)


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions near the wanted ones, at least ``gap`` apart and inside the limits if they fit."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed: list[float] = []
    for index in order:
        placed.append(max(wanted[index], placed[-1] + gap if placed else low))
    for rank in range(len(placed) - 1, -1, -1):
        ceiling = placed[rank + 1] - gap if rank + 1 < len(placed) else high
        placed[rank] = min(placed[rank], ceiling)
    result = [0.0] * len(wanted)
    for index, position in zip(order, placed, strict=True):
        result[index] = position
    return result


def _short(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
