"""How numbers are written: one decimal for percent, three digits for latencies, 1 MB = 1,000,000 bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

DASH = "–"
MINUS = "−"
SMALLEST_PLAIN = 1e-3
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SPACE = "\u00a0"  # a number and its unit stay on one line


def percent(value: float | None) -> str:
    """Return "97.1 %" for 0.971."""
    return DASH if value is None else f"{100 * value:.1f}{SPACE}%"


def percent_number(value: float | None) -> str:
    """Return "97.1" for 0.971, for columns whose title has the unit."""
    return DASH if value is None else f"{100 * value:.1f}"


def percent_range(interval: Sequence[float] | None) -> str:
    """Return "95.8–98.3" for an interval of shares."""
    return DASH if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"


def half_width(interval: Sequence[float] | None) -> str:
    """Return "±1.3" (percentage points) for an interval of shares: half of its width."""
    return "" if interval is None else f"±{50 * (interval[1] - interval[0]):.1f}"


def points(difference: float | None) -> str:
    """Return "+2.3" or "−0.4" percentage points."""
    if difference is None:
        return DASH
    rounded = round(100 * difference, 1)
    if rounded == 0:
        return "0.0"
    return f"{'+' if rounded > 0 else MINUS}{abs(rounded):.1f}"


def points_range(interval: Sequence[float] | None) -> str:
    """Return "+0.9 to +3.7" percentage points."""
    return DASH if interval is None else f"{points(interval[0])} to {points(interval[1])}"


def p_value(value: float | None) -> str:
    """Return "0.013", or "< 0.001"."""
    if value is None:
        return DASH
    return f"<{SPACE}0.001" if value < 0.001 else f"{value:.3f}"


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number with three significant digits: "0.842", "12.3", "1,240"; "4.7×10⁻⁵" below a thousandth."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    if abs(rounded) < SMALLEST_PLAIN:
        mantissa, exponent = f"{rounded:.1e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    whole_digits = len(str(int(abs(rounded)))) if abs(rounded) >= 1 else 0
    decimals = digits - whole_digits if whole_digits else digits - 1 - int(f"{rounded:e}".split("e")[1])
    return f"{rounded:,.{max(0, decimals)}f}"


def scaled(value: float | None, units: Sequence[str]) -> str:
    """Return a number with the largest fitting unit, each 1,000 times the one before: "4.31 M"."""
    if value is None:
        return DASH
    power = 0
    while power < len(units) - 1 and abs(value) >= 999.5:
        value, power = value / 1000, power + 1
    number = f"{value:.0f}" if not power and float(value).is_integer() else significant(value)
    return f"{number}{SPACE}{units[power]}".rstrip(SPACE)


def trimmed(written: str) -> str:
    """Return a written number without zeros that say nothing, for axes: "10 MB" for "10.0 MB"."""
    number, space, unit = written.partition(SPACE)
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


def size(num_bytes: float | None) -> str:
    """Return "1.63 MB" or "352 kB", decimal."""
    return scaled(num_bytes, ("B", "kB", "MB", "GB", "TB"))


def count(value: float | None) -> str:
    """Return "4.31 M" or "812 k"."""
    return scaled(value, ("", "k", "M", "G", "T"))


def milliseconds(value: float | None) -> str:
    """Return "2.13 ms"."""
    return DASH if value is None else f"{significant(value)}{SPACE}ms"


def seconds(value: float | None) -> str:
    """Return "0.84 s", "51 s", "12 min 5 s" or "3 h 12 min"."""
    if value is None:
        return DASH
    if value < 60:
        return f"{significant(value, 2)}{SPACE}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def times(ratio: float) -> str:
    """Return "41×", "3.2×"."""
    return f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×"


def known(key: str, value: Any) -> str:
    """Return a value in the unit that its key's last word names."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        write = _unit(key)
        if write:
            return write(value)
        return f"{value:,}" if isinstance(value, int) else significant(value)
    if isinstance(value, list | tuple):
        return ", ".join(known(key, item) for item in value) or DASH
    if isinstance(value, dict):
        return (
            ", ".join(f"{label(name)} {known(name if _unit(name) else key, item)}" for name, item in value.items())
            or DASH
        )
    return str(value)


def moment(created: str) -> str:
    """Return "2026-11-21 22:30 UTC" for an ISO date and time, and any other text as it is."""
    try:
        return " ".join(datetime.fromisoformat(created).strftime("%Y-%m-%d %H:%M %Z").split())
    except ValueError:
        return created


def _unit(key: str) -> Callable[[float], str] | None:
    return UNITS.get(str(key).rsplit("_", 1)[-1])


def label(key: str) -> str:
    """Return a key as words, without a unit that its value is shown with."""
    words = str(key).replace("/", " ").split("_")
    if words[-1] not in QUANTITIES:
        return " ".join(words)
    return " ".join(words[:-1]) or QUANTITIES[words[-1]]


def markdown(value: Any) -> Any:
    """Return a text with what Markdown would read as markup escaped; other values as they are."""
    return value.translate(MARKDOWN_ESCAPES) if isinstance(value, str) else value


MARKDOWN_ESCAPES = str.maketrans(
    {"\\": r"\\", "[": r"\[", "|": r"\|", "<": "&lt;", ">": "&gt;", "`": "'", "*": r"\*", "\n": " ", "\r": " "}
)

QUANTITIES = {"bytes": "size", "seconds": "time", "ms": "time"}

UNITS: dict[str, Callable[[float], str]] = {
    "bytes": size,
    "seconds": seconds,
    "ms": milliseconds,
    "agreement": percent,
    "accuracy": percent,
    "fraction": percent,
}
