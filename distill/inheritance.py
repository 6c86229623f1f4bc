"""What a student's encoders start with (``student.inherit``): whether it fits, what it is given, whether it stays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.builders import check_part
from distill.config import Part, Recipe, nearest
from distill.contracts import UserError
from distill.formats import TEXT
from distill.tasks import keep_classifiers
from distill.workspace import Workspace, takers, takes_tokens

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


def freeze_inherited(work: Workspace, model: Any) -> None:
    """Fix a student's inherited tables that stay as they are, and the teacher's classifiers."""
    keep_classifiers(model)
    for name, part in work.recipe.student.inherit.items():
        table = getattr(model.encoders[name], "table", None)
        if table is not None and stays(work.inheritances[part.type], part):
            table.requires_grad_(False)


def check_inheritance(recipe: Recipe, encoders: Registry, inheritances: Registry) -> None:
    """Check that what a student inherits fits its encoders, and that there is who gives it.

    A vocabulary is cut from that of the teacher's text encoder, or else learnt from the training texts.

    Args:
        recipe: whose models have been checked.
        encoders: encoder type -> class.
        inheritances: inheritance type -> function.

    Raises:
        UserError: the first mistake found.
    """
    given = takers(recipe.student, encoders)
    if given and takers(recipe.teacher, encoders):
        sizes = [int(model.encoders[TEXT].params["vocab_size"]) for model in (recipe.teacher, recipe.student)]
        if sizes[1] > sizes[0]:
            raise UserError(
                f"student.encoders.text.vocab_size is {sizes[1]}, and is cut from the teacher's, which has {sizes[0]}; "
                "give at most that"
            )
    for name, part in recipe.student.inherit.items():
        where = f"student.inherit.{name}"
        check_part(inheritances, part, where, ("encoder", "project", "student", "token_ids"))
        inheritance = inheritances[part.type]
        if takes_encoder(inheritance) and not takes_tokens(inheritance):
            _check_alike(recipe, name, part.type)
        if takes_tokens(inheritance) and TEXT not in recipe.teacher.encoders:
            raise UserError(f"{where}: {part.type} reads the teacher's text encoder, and it has none; add one")
        if (takes_tokens(inheritance) or not takes_encoder(inheritance)) and name not in given:
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
