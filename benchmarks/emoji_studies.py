"""Where distillation helps on the bundled emoji, and where not: ``python -m benchmarks.emoji_studies``.

Each study trains one student in several ways: for the same number of steps, from the same teacher, in the same order
of labelled rows. Every way has as many trials as the others, and the validation rows of the first seed choose among
them. Test rows are read once a seed for what was chosen. A training that fails is listed as such.

What is finished is kept, so a second call only prints.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.seed_tables import add_outputs, put_out, table
from benchmarks.student_arms import Result, columns, run_arm, titles
from distill.config import Recipe, TermConfig
from distill.contracts import UserError
from distill.losses.terms import needs_teacher
from distill.recipe import load_recipe

Terms = list[TermConfig]
TASKS = {"category": 2.0, "subcategory": 1.5}  # each with the temperature that the quick start has for it


@dataclass(frozen=True)
class Trial:
    """One setting of a way to train.

    Attributes:
        shown: in the table.
        objective: of a recipe.
        overrides: of the recipe.
    """

    shown: str
    objective: Callable[[Recipe], Terms]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A question, and ways to train that answer it.

    Attributes:
        about: what is asked, and how.
        recipe: the name of the recipe.
        overrides: of the recipe, in all trials.
        arms: name -> its trials; others are compared with the first one.
    """

    about: str
    recipe: str
    overrides: tuple[str, ...]
    arms: dict[str, tuple[Trial, ...]]


def baseline(recipe: Recipe) -> Terms:
    """Labels alone, as the recipe's baseline has them."""
    return list(recipe.student.baseline)


def objective(factor: float = 1.0) -> Callable[[Recipe], Terms]:
    """The recipe's objective, its terms that read a teacher at a multiple of their weights."""

    def scaled(recipe: Recipe) -> Terms:
        return [
            term.model_copy(update={"weight": term.weight * factor}) if needs_teacher([term]) else term
            for term in recipe.student.objective
        ]

    return scaled


def labels(*terms: Terms, weight: float = 1.0, head: str = "") -> Callable[[Recipe], Terms]:
    """Labels of each task, then other terms."""
    smoothing = {"label_smoothing": 0.1}
    own = [TermConfig(loss="cross_entropy", task=task + head, weight=weight, params=smoothing) for task in TASKS]
    return lambda recipe: [*own, *(term for some in terms for term in some)]


def soft(weight: float = 1.0, head: str = "") -> Terms:
    """The teacher's probabilities, of one head where it is named."""
    return [
        TermConfig(loss="kd", task=task + head, weight=weight, params={"temperature": temperature})
        for task, temperature in TASKS.items()
    ]


def image(loss: str, weight: float, **params: Any) -> Terms:
    """A loss on the embedding of the image."""
    return [TermConfig(loss=loss, embedding="image", weight=weight, params=params)]
