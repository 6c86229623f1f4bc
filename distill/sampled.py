"""Which rows a training can draw and mix: what the schema of a recipe cannot check."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from distill.config import Recipe, TrainConfig, nearest
from distill.contracts import UserError
from distill.losses.terms import LOSSES, needs_teacher
from distill.targets import CAPTIONING, CLASSIFICATION, MULTILABEL

IMAGE = "image"


def check_class_balance(recipe: Recipe, train: TrainConfig, where: str) -> None:
    """Check that the task whose classes are balanced has classes.

    Raises:
        UserError: it is none of the data's, or has numbers or captions.
    """
    if train.class_balance is None:
        return
    task, place = train.class_balance.task, f"{where}.class_balance.task"
    if task not in recipe.data.targets:
        raise UserError(f"{place}: the data has no task {task!r}; {nearest(task, recipe.data.targets)}")
    kind = recipe.data.targets[task].kind
    if kind not in (CLASSIFICATION, MULTILABEL):
        raise UserError(f"{place}: task {task!r} is a {kind}, whose rows have no class to balance; leave it out")


def check_mixing(recipe: Recipe, budgets: Mapping[str, TrainConfig], others: Mapping[str, Collection[str]]) -> None:
    """Check that where images are mixed, all models read images alone and answer live.

    Args:
        recipe: validated by its schema.
        budgets: dotted path -> budget, of all trainings.
        others: teacher of another run -> the modalities that it reads.

    Raises:
        UserError: a training mixes images that cannot.
    """
    for where in (where for where, train in budgets.items() if train.mix_images is not None):
        place, student = f"{where}.mix_images", recipe.student
        if where.startswith("teacher"):
            raise UserError(f"{place}: only students learn from mixed images; leave it out")
        _check_images_alone(student.encoders, "the student", place)
        for task in student.heads or recipe.data.targets:
            if recipe.data.targets[task].kind == CAPTIONING:
                raise UserError(f"{place}: task {task!r} is a captioning, and two captions do not mix; leave it out")
        for number, term in enumerate(student.objective):
            if LOSSES[term.loss].kind == "features+ids":
                raise UserError(
                    f"{place}: student.objective[{number}]: {term.loss} remembers rows by their ids, and mixed images "
                    "are of two rows; use another loss, or leave one of them out"
                )
        if not needs_teacher(student.objective):
            continue
        if recipe.cache.enabled:
            raise UserError(
                f"{place}: no cache holds what a teacher says about mixed images; set cache.enabled to false"
            )
        _check_images_alone(recipe.teacher.encoders, "the teacher", place)
        for name, modalities in others.items():
            _check_images_alone(modalities, f"teacher {name!r}", place)


def _check_images_alone(modalities: Iterable[str], who: str, place: str) -> None:
    more = [name for name in modalities if name != IMAGE]
    if more:
        raise UserError(f"{place}: {who} reads {more[0]}, which does not mix with another row's; leave it out")


def check_resizing(recipe: Recipe, train: TrainConfig, where: str) -> None:
    """Check that images can be made smaller, and that features of theirs are compared by their means alone.

    Raises:
        UserError: there are no images, or they are not larger, or maps are compared.
    """
    if train.progressive_resizing is None:
        return
    place, model = f"{where}.progressive_resizing", recipe.teacher if where.startswith("teacher") else recipe.student
    if "image" not in model.encoders or (where.startswith("teacher.pretrain.") and not where.endswith(".image")):
        raise UserError(f"{place}: no images are read there; leave it out")
    size, whole = train.progressive_resizing.size, recipe.data.working_size
    if size >= whole:
        raise UserError(f"{place}.size is {size} pixels, and data.working_size is {whole}; give fewer")
    for number, term in enumerate([] if where.startswith("teacher") else recipe.student.objective):
        taps = term.tapped("student")
        if any(tap.startswith("encoders.image") and not tap.endswith(":mean") for tap in taps):
            raise UserError(
                f"{place}: small images have smaller feature maps than those the teacher saw, and "
                f"student.objective[{number}] compares them position by position; add ':mean' to its taps"
            )
