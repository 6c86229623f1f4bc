"""What a student's encoders start with (``student.inherit``): whether it fits, what it is given, whether it stays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.builders import check_part
from distill.config import Part, Recipe, nearest
from distill.contracts import UserError
from distill.workspace import takers, takes_tokens

Registry = Mapping[str, Callable[..., Any]]
CUTS = "tower_weights"
"""The inheritance for whose sake a student's encoder may be smaller than the teacher's."""


def takes_encoder(inheritance: Callable[..., Any]) -> bool:
    """Whether it reads the teacher's encoder."""
    return "encoder" in inspect.signature(inheritance).parameters


def stays(inheritance: Callable[..., Any], part: Part) -> bool:
    """Whether an inherited table is fixed in training: as the part says, or by the inheritance's own default."""
    freeze = inspect.signature(inheritance).parameters.get("freeze")
    return freeze is not None and bool(part.params.get("freeze", freeze.default))


def check_inheritance(recipe: Recipe, encoders: Registry, inheritances: Registry) -> None:
    """Check that what a student inherits fits its encoders, and that there is who gives it.

    A vocabulary or an embedding comes from the teacher's text encoder, which then has to have its own.

    Args:
        recipe: whose models have been checked.
        encoders: encoder type -> class.
        inheritances: inheritance type -> function.

    Raises:
        UserError: the first mistake found.
    """
    if takers(recipe.teacher, encoders):
        kind = recipe.teacher.encoders["text"].type
        raise UserError(f"teacher.encoders.text: {kind} takes its vocabulary from a teacher; a teacher brings its own")
    given = takers(recipe.student, encoders)
    if given and "text" not in recipe.teacher.encoders:
        kind = recipe.student.encoders[given[0]].type
        raise UserError(
            f"student.encoders.{given[0]}: {kind} takes its vocabulary from the teacher, which has no text encoder; "
            "add one to teacher.encoders"
        )
    for name, part in recipe.student.inherit.items():
        where = f"student.inherit.{name}"
        check_part(inheritances, part, where, ("encoder", "project", "student", "token_ids"))
        inheritance = inheritances[part.type]
        if takes_encoder(inheritance) and not takes_tokens(inheritance):
            _check_alike(recipe, name, part.type)
        elif name not in given:
            raise UserError(
                f"{where}: {part.type} fills an encoder that takes its vocabulary from the teacher; "
                f"{nearest(name, given)}"
            )
        if "file" in part.params and not Path(part.params["file"]).is_file():
            raise UserError(f"{where}.file: there is no file {part.params['file']!r}; give one that is there")


def _check_alike(recipe: Recipe, name: str, inheritance: str) -> None:
    """Weights fit an encoder that is built as the teacher's, or cut from such a one; dropout has none."""
    where = f"student.inherit.{name}: {inheritance}"
    for model, encoders in (("student", recipe.student.encoders), ("teacher", recipe.teacher.encoders)):
        if name not in encoders:
            raise UserError(f"{where}: the {model} has no such encoder; {nearest(name, encoders)}")
    ours, theirs = (
        {"type": part.type, **part.params} for part in (recipe.student.encoders[name], recipe.teacher.encoders[name])
    )
    free = {"dropout", "freeze", "cut", "weights", "sha256"} if inheritance == CUTS else {"dropout"}
    for key in sorted({*ours, *theirs} - free):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{where}: {key} is {ours.get(key)} in student.encoders.{name} and {theirs.get(key)} in "
                f"teacher.encoders.{name}; weights need equal ones"
            )
