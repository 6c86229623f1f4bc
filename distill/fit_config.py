"""The schema of a recipe's ``fit``: what ``distill fit`` may change."""

from __future__ import annotations

from typing import Any

from distill.data_config import Strict


class FitConfig(Strict):
    """The search of ``distill fit``; no stage of a run reads it."""

    # dotted key, or "precision" -> values, or {low, high, step}; empty: a space that follows from the student
    space: dict[str, list[Any] | dict[str, float]] = {}
