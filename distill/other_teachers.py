"""Models of other runs as teachers: checked against this run's recipe, and asked beside this run's own teacher.

A recipe names them under ``teachers``, and a term of the student's objective picks one by its key ``teacher``. They are
asked about the same rows and views as the run's own teacher, each with its own inputs. What one says stands beside the
own teacher's outputs under names with ``@NAME``, so the cache, the engine and the objective know but one ``Outputs``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.batch_parts import InParts, join_rows, rows_of
from distill.build import Model, input_spec
from distill.config import EMA, Recipe, nearest, of_teacher
from distill.contracts import Batch, Outputs, UserError
from distill.data.loader import InputSpec
from distill.data.prepared import FORMATS_FILE
from distill.data.rows import read_rows, settle_tasks
from distill.data.sources import open_source
from distill.data.transforms import resize_images
from distill.fitted import Fitted, Tasks, find_fitted
from distill.formats import TABULAR, formats_of
from distill.losses.terms import reads_text_tokens, tap_paths
from distill.runs import fingerprint, read_json, sha256_file
from distill.tapped import Tapped
from distill.targets import CAPTIONING, tasks_to_json
from distill.workspace import BASELINE, TEACHER, Registry, Workspace

SHOWN = 5  # names that a message lists


def check_teachers(recipe: Recipe) -> dict[str, Fitted]:
    """Check the recipe's further teachers, but for their labels, against what is in the folders of their runs.

    Returns:
        Name -> teacher.

    Raises:
        UserError: the first mistake found.
    """
    own = (Path(recipe.output) / recipe.name).resolve()
    read = {name for term in recipe.student.objective for name in term.teachers}
    for name, entry in recipe.teachers.items():
        if name in (TEACHER, EMA) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise UserError(
                f"teachers: {name!r} cannot name a teacher; use letters, digits and '_', and neither {TEACHER!r}, "
                f"which is the run's own, nor {EMA!r}, the average of the student's weights"
            )
        if name not in read:
            raise UserError(
                f"teachers.{name}: no term of student.objective reads it; add 'teacher: {name}' to one or leave it out"
            )
        if Path(entry.run).resolve() == own:
            raise UserError(f"teachers.{name}.run is this run's own folder; terms without 'teacher' read its teacher")
    found = {name: find_fitted(name, recipe, verify=True) for name in recipe.teachers}
    for name, fitted in found.items():
        for modality in fitted.modalities:
            if modality not in recipe.data.modalities:
                hint = nearest(modality, recipe.data.modalities)
                raise UserError(f"teachers.{name}: it reads {modality!r}, and the data has no such modality; {hint}")
            theirs, ours = (formats_of(data).get(modality) for data in (fitted.recipe.data, recipe.data))
            if theirs != ours and modality != "image":  # other images are resized
                raise UserError(
                    f"teachers.{name}: its run reads {modality} as {theirs}, and this one as {ours}; set data alike"
                )
    return found


def check_labels(recipe: Recipe, tasks: Tasks) -> None:
    """Check that teachers have the classes of each task that a term reads from them; their order may be another.

    Raises:
        UserError: names of classes are missing or beside them; the first few are given.
    """
    for number, term in enumerate(recipe.student.objective):
        for other in term.teachers if term.task else ():
            if other in recipe.teachers:
                _check_classes(find_fitted(other, recipe), str(term.task).split(".")[0], tasks, number)


def _check_classes(fitted: Fitted, task: str, tasks: Tasks, number: int) -> None:
    if task in fitted.columns(tasks):
        return
    ours, theirs = tasks[task], fitted.answers[task]
    if ours.kind != theirs.kind:
        raise UserError(
            f"student.objective[{number}]: task {task!r} is a {theirs.kind} of teacher {fitted.name!r} and a "
            f"{ours.kind} of this run's data; read its embeddings or taps instead"
        )
    if ours.kind == CAPTIONING:
        raise UserError(
            f"student.objective[{number}]: teacher {fitted.name!r} writes {task!r} in tokens of another vocabulary or "
            "to another length; fit it on this run's data, or read its embeddings or taps instead"
        )
    if set(ours.names) == set(theirs.names):
        raise UserError(
            f"student.objective[{number}]: teacher {fitted.name!r} learnt {task!r} from numbers of another mean or "
            "deviation, so its answers mean something else here; fit it on this run's data"
        )
    differing = {
        "lacks": set(ours.names).difference(theirs.names),
        "has besides": set(theirs.names).difference(ours.names),
    }
    said = " and ".join(f"{verb} {_listed(names)}" for verb, names in differing.items() if names)
    raise UserError(
        f"student.objective[{number}]: teacher {fitted.name!r} has other classes of {task!r} than this run's "
        f"data: it {said}; fit it on the same classes, or read its embeddings or taps instead"
    )


def check_models(recipe: Recipe, encoders: Registry) -> None:
    """Rebuild each further teacher with the taps that terms read, and let it go again: nothing else finds all mistakes.

    Raises:
        UserError: what it is made of is not there or has changed, or it lacks a tap.
    """
    for name in recipe.teachers:
        Tapped(find_fitted(name, recipe).model(encoders), tap_paths(recipe.student.objective, TEACHER, name))


def check_inputs(work: Workspace) -> None:
    """Check that teachers read numbers that mean the same, and that losses on tokens of texts meet the same tokens.

    Args:
        work: with the stages ``data`` and ``vocabulary``, which may have cut the student's tokenizer.

    Raises:
        UserError: the tokenizers differ, or the training rows by which series or records are standardised.
    """
    for name in work.recipe.teachers:
        fitted = find_fitted(name, work.recipe)
        theirs, ours = read_json(fitted.folder / "data" / FORMATS_FILE), work.formats()
        for modality in {"series", TABULAR}.intersection(fitted.modalities):
            if theirs[modality] != ours[modality]:
                raise UserError(
                    f"teachers.{name}: {fitted.folder} standardised its {modality} by other training rows, so the same "
                    "numbers mean something else there; fit it on this run's data"
                )

    def tokens(model: Model) -> tuple[str, int]:
        spec = input_spec(model)  # a pruned vocabulary has the same tokens, under other ids
        return ("" if spec.tokenizer is None else sha256_file(spec.tokenizer), spec.max_length)

    for number, term in enumerate(work.recipe.student.objective):
        other = term.teachers[0]
        if not reads_text_tokens(term) or other == EMA:
            continue
        teacher = work.blank(TEACHER) if other is None else find_fitted(other, work.recipe).model(work.encoders)
        if tokens(work.blank(BASELINE)) != tokens(teacher):
            raise UserError(
                f"student.objective[{number}]: {term.loss} compares token by token, and student and teacher cut texts "
                "in other ways; give both the same tokenizer and max_length, or use ':mean' taps with fitnet or cosine"
            )


def _listed(names: set[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, sorted(names)[:SHOWN])) + rest


def check_source_labels(recipe: Recipe) -> None:
    """As :func:`check_labels`, before the data is prepared: reads the source's columns, if a term needs it."""
    if any(term.teacher and term.task for term in recipe.student.objective):
        source = open_source(recipe.data.source, Path.cwd())
        check_labels(recipe, settle_tasks(read_rows(recipe.data, source, Path(tempfile.gettempdir()))))


def own_taps(recipe: Recipe) -> list[str]:
    """The taps of the run's own teacher: those that terms read, and those that the recipe wants to be stored too."""
    stored = recipe.cache.taps if recipe.cache.enabled else []
    return sorted({*stored, *tap_paths(recipe.student.objective, TEACHER)})


def cache_parts(recipe: Recipe) -> dict[str, Any]:
    """What the outputs of further teachers depend on, part by part, as the key of a cache has it."""
    parts: dict[str, Any] = {}
    for name in recipe.teachers:
        fitted = find_fitted(name, recipe)
        found = {
            "teacher": fitted.fingerprint,
            "weights": fitted.weights_sha256[:16],
            "labels": fingerprint(tasks_to_json({task: fitted.answers[task] for task in fitted.tasks})),
            "outputs": tap_paths(recipe.student.objective, TEACHER, name),
        }
        parts |= {of_teacher(part, name): value for part, value in found.items()}
    return parts


def provenance(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Further teacher -> the name of the run that fitted it, the stage there, and that stage's fingerprint."""
    found = {name: find_fitted(name, recipe) for name in recipe.teachers}
    return {
        name: {"run": fitted.recipe.name, "stage": fitted.stage, "fingerprint": fitted.fingerprint}
        for name, fitted in found.items()
    }


def modalities_read(recipe: Recipe) -> dict[str | None, list[str]]:
    """Teacher -> the modalities that it reads; None is the run's own."""
    found: dict[str | None, list[str]] = {name: find_fitted(name, recipe).modalities for name in recipe.teachers}
    return found | {None: list(recipe.teacher.encoders)}


class Teachers:
    """The run's own teacher and those of other runs, which answer together.

    Args:
        recipe: this run's.
        encoders: encoder type -> class.
        tasks: those of this run's data.
        own: the run's own teacher, in eval mode.

    Where the memory does not suffice, they read batches in parts, as many as it takes.

    Attributes:
        own: the same.
        specs: name of a teacher's batch -> what it reads; the own teacher's is "teacher".

    Raises:
        UserError: a teacher of another run cannot be rebuilt, or has not the classes that a term reads.
    """

    def __init__(self, recipe: Recipe, encoders: Registry, tasks: Tasks, own: Model) -> None:
        check_labels(recipe, tasks)
        self.own = own
        self._own = Tapped(own, own_taps(recipe))
        self._others: dict[str, _Other] = {}
        for name in recipe.teachers:
            fitted, taps = find_fitted(name, recipe, verify=True), tap_paths(recipe.student.objective, TEACHER, name)
            self._others[of_teacher(TEACHER, name)] = _Other(fitted, fitted.model(encoders), taps, tasks)
        self.specs: dict[str, InputSpec] = {TEACHER: input_spec(own)}
        self.specs |= {reads: input_spec(other.model) for reads, other in self._others.items()}
        self._in_parts = InParts()

    def __call__(self, batches: Mapping[str, Batch], part: str = "") -> Outputs:
        """Return what all say, on the device of the batches, without gradients.

        A teacher that could read nothing of a batch, as one of images among texts, is not asked.

        Args:
            batches: name -> batch of the same rows and views, as a loader with ``specs`` makes them.
            part: what stands behind the names of batches.
        """
        with torch.no_grad():
            asked = {name: batches[name + part] for name in self.specs}
            return self._in_parts(
                lambda some: self._answer({name: rows_of(batch, some) for name, batch in asked.items()}),
                len(asked[TEACHER].ids),
                join_rows,
            )

    def _answer(self, batches: Mapping[str, Batch]) -> Outputs:
        self.own.to(batches[TEACHER].ids.device)  # nothing moves after the first call
        said = self._own(batches[TEACHER])
        for reads, other in self._others.items():
            if batches[reads].inputs:
                said = Outputs(*(a | b for a, b in zip(said, other(batches[reads]), strict=True)))
        return said

    def num_params(self) -> dict[str, int]:
        """Parameters of each, by the name of its batch."""
        models = {TEACHER: self.own, **{reads: other.model for reads, other in self._others.items()}}
        return {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}


class _Other:
    """A teacher of another run that answers with this run's classes, under names of its own."""

    def __init__(self, fitted: Fitted, model: Model, taps: Sequence[str], tasks: Tasks) -> None:
        self.model, self._name, self._size = model, fitted.name, fitted.recipe.data.working_size
        self._tapped = Tapped(model, taps)
        self._columns = {task: torch.tensor(columns) for task, columns in fitted.columns(tasks).items()}

    def __call__(self, batch: Batch) -> Outputs:
        self.model.to(batch.ids.device)
        images = batch.inputs.get("image")
        if images is not None and images.shape[-1] != self._size:  # it learnt from images of its own run's size
            batch = batch._replace(inputs={**batch.inputs, "image": resize_images(images, self._size)})
        said = self._tapped(batch)
        logits = {name: value for name, value in said.logits.items() if name.split(".")[0] in self._columns}
        ours = {name: self._in_our_order(name.split(".")[0], value) for name, value in logits.items()}
        return Outputs(
            *({of_teacher(k, self._name): v for k, v in part.items()} for part in said._replace(logits=ours))
        )

    def _in_our_order(self, task: str, logits: Tensor) -> Tensor:
        return logits.index_select(-1, self._columns[task].to(logits.device))
