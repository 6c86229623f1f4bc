"""Teachers that other runs have fitted: found in their runs' folders, rebuilt, and asked beside this run's own.

A recipe names them under ``teachers``, and a term of the student's objective picks one by its key ``teacher``. They are
asked about the same rows and views as the run's own teacher, each with its own inputs. What one says stands beside the
own teacher's outputs under names with ``@NAME``, so the cache, the engine and the objective know but one ``Outputs``.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.build import input_spec
from distill.config import Recipe, nearest, of_teacher
from distill.contracts import Artifact, Batch, Outputs, UserError
from distill.data.loader import InputSpec
from distill.data.prepared import LABELS_FILE
from distill.data.rows import number_classes, read_rows
from distill.data.sources import open_source
from distill.data.transforms import resize_images
from distill.losses.objective import tap_paths
from distill.multimodal import MultimodalModel, Tapped
from distill.runs import MANIFEST, find, fingerprint, read_json, sha256_file
from distill.workspace import TEACHER, WEIGHTS_FILE, Registry, Workspace

Labels = Mapping[str, Sequence[str]]
"""Task -> names of its classes, in order of label."""
RESOLVED_FILE, TOKENIZER = "recipe.resolved.json", "tokenizer"
ORIGIN = "origin"
"""In the info of a run's stage ``teacher``: what :func:`origin` returned."""
AGAIN = "run its recipe again (`distill cache RECIPE`)"
SHOWN = 5  # names that a message lists


@dataclass(frozen=True)
class Fitted:
    """A teacher in the folder of the run that fitted it.

    Attributes:
        name: what this run's recipe calls it.
        folder: that run's.
        recipe: that run's.
        labels: those of that run's data.
        fingerprint: of that run's stage ``teacher``.
        weights_sha256: of its weights.
        tokenizer: hash of the file that it was fitted with; empty if it reads no text.
    """

    name: str
    folder: Path
    recipe: Recipe
    labels: Labels
    fingerprint: str
    weights_sha256: str
    tokenizer: str

    @property
    def modalities(self) -> list[str]:
        """What it reads."""
        return list(self.recipe.teacher.encoders)

    @property
    def tasks(self) -> list[str]:
        """What it has heads for."""
        return list(self.recipe.teacher.heads or self.labels)

    def columns(self, labels: Labels) -> dict[str, list[int]]:
        """Each task whose classes have the same names as in ``labels`` -> its column of each class there, in order."""
        theirs = {task: {name: column for column, name in enumerate(self.labels[task])} for task in self.tasks}
        shared = [task for task in theirs if theirs[task].keys() == set(labels.get(task, ()))]
        return {task: [theirs[task][name] for name in labels[task]] for task in shared}

    def model(self, encoders: Registry) -> MultimodalModel:
        """The model with its fitted weights, in eval mode and without gradients.

        Raises:
            UserError: weights do not fit, pretrained parts are not there, or its tokenizer is another one by now.
        """
        done = {stage: Artifact(stage, self.folder / stage, self.fingerprint) for stage in ("data", TEACHER)}
        try:
            model = Workspace(self.recipe, encoders, {}, done, quiet=True).teacher()
        except UserError as error:  # which speaks of the other run's recipe
            raise UserError(f"teachers.{self.name}.run: {self.folder}: {error}") from error
        if _tokenizer(model) != self.tokenizer:
            raise UserError(f"teachers.{self.name}.run: its tokenizer has changed since it was fitted; {AGAIN}")
        return model


def origin(recipe: Recipe, labels: Labels, model: MultimodalModel) -> dict[str, str]:
    """What a fitted teacher is rebuilt from, beside its weights, as hashes.

    The recipe in a run's folder may change while its teacher stays. Many changes would not fit the weights, but some
    would, in silence.
    """
    return {**_described(recipe, labels), TOKENIZER: _tokenizer(model)}


def _described(recipe: Recipe, labels: Labels) -> dict[str, str]:
    unrelated = {"train", "objective", "pretrain", "class_names"}
    model = recipe.teacher.model_dump(exclude=unrelated, exclude_defaults=True)  # later versions add keys
    for part in model["encoders"].values():
        part.pop("weights", None)  # where they lay before the fit; the teacher's own file has them
    parts = [model, list(recipe.teacher.encoders), recipe.data.working_size]
    return {RESOLVED_FILE: fingerprint(parts), f"data/{LABELS_FILE}": fingerprint(labels)}


def _tokenizer(model: MultimodalModel) -> str:
    file = input_spec(model).tokenizer
    return "" if file is None else sha256_file(file)


def find_fitted(name: str, recipe: Recipe, *, verify: bool = False) -> Fitted:
    """Read what the folder of another run says about its teacher.

    Args:
        name: one of the recipe's ``teachers``.
        recipe: this run's.
        verify: compare the hashes of the teacher's files too.

    Raises:
        UserError: there is no finished teacher, or something has changed since it was fitted.
    """
    folder, where = Path(recipe.teachers[name].run), f"teachers.{name}.run"
    if not (folder / TEACHER / MANIFEST).is_file():
        raise UserError(
            f"{where}: {folder} holds no finished teacher; give the folder OUTPUT/NAME of a run that has fitted one"
        )
    try:
        manifest = read_json(folder / TEACHER / MANIFEST)
        key, noted = manifest["fingerprint"], dict(manifest["info"].get(ORIGIN, {}))
        weights = manifest["files"][WEIGHTS_FILE]["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not what a run wrote
        raise UserError(f"{where}: {folder / TEACHER / MANIFEST} is damaged; {AGAIN}") from error
    if not noted:
        raise UserError(f"{where}: {folder} was fitted by an earlier version, which did not note from what; {AGAIN}")
    if verify and find(folder / TEACHER, TEACHER, key) is None:
        raise UserError(f"{where}: files in {folder / TEACHER} have changed since they were written; {AGAIN}")
    try:
        theirs = Recipe.model_validate(read_json(folder / RESOLVED_FILE))
        labels = read_json(folder / "data" / LABELS_FILE)
        found = _described(theirs, labels)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: {RESOLVED_FILE} or data/{LABELS_FILE} in {folder} is absent or damaged; {AGAIN}"
        ) from error
    for file, value in found.items():
        if noted.get(file) != value:
            raise UserError(f"{where}: {folder / file} has changed since the teacher there was fitted; {AGAIN}")
    return Fitted(name, folder, theirs, labels, key, weights, noted.get(TOKENIZER, ""))


def check_teachers(recipe: Recipe) -> dict[str, Fitted]:
    """Check the recipe's further teachers, but for their labels, against what is in the folders of their runs.

    Returns:
        Name -> teacher.

    Raises:
        UserError: the first mistake found.
    """
    own = (Path(recipe.output) / recipe.name).resolve()
    read = {term.teacher for term in recipe.student.objective}
    for name, entry in recipe.teachers.items():
        if name == TEACHER or not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise UserError(
                f"teachers: {name!r} cannot name a teacher; use letters, digits and '_', and not {TEACHER!r}, "
                "which is the run's own"
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
    return found


def check_labels(recipe: Recipe, labels: Labels) -> None:
    """Check that teachers have the classes of each task that a term reads from them; their order may be another.

    Raises:
        UserError: names of classes are missing or beside them; the first few are given.
    """
    for number, term in enumerate(recipe.student.objective):
        if term.teacher is None or term.task is None:
            continue
        fitted, task = find_fitted(term.teacher, recipe), term.task.split(".")[0]
        if task in fitted.columns(labels):
            continue
        differing = {
            "lacks": set(labels[task]).difference(fitted.labels[task]),
            "has besides": set(fitted.labels[task]).difference(labels[task]),
        }
        said = " and ".join(f"{verb} {_listed(names)}" for verb, names in differing.items() if names)
        raise UserError(
            f"student.objective[{number}]: teacher {term.teacher!r} has other classes of {task!r} than this run's "
            f"data: it {said}; fit it on the same classes, or read its embeddings or taps instead"
        )


def check_models(recipe: Recipe, encoders: Registry) -> None:
    """Rebuild each further teacher with the taps that terms read, and let it go again: nothing else finds all mistakes.

    Raises:
        UserError: what it is made of is not there or has changed, or it lacks a tap.
    """
    for name in recipe.teachers:
        Tapped(find_fitted(name, recipe).model(encoders), tap_paths(recipe.student.objective, TEACHER, name))


def _listed(names: set[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, sorted(names)[:SHOWN])) + rest


def check_source_labels(recipe: Recipe) -> None:
    """As :func:`check_labels`, before the data is prepared: reads the source's columns, if a term needs it."""
    if any(term.teacher and term.task for term in recipe.student.objective):
        source = open_source(recipe.data.source, Path.cwd())
        check_labels(recipe, number_classes(read_rows(recipe.data, source, Path(tempfile.gettempdir())))[1])


def cache_parts(recipe: Recipe) -> dict[str, Any]:
    """What the outputs of further teachers depend on, part by part, as the key of a cache has it."""
    parts: dict[str, Any] = {}
    for name in recipe.teachers:
        fitted = find_fitted(name, recipe)
        found = {
            "teacher": fitted.fingerprint,
            "weights": fitted.weights_sha256[:16],
            "labels": {task: fingerprint(fitted.labels[task]) for task in fitted.tasks},
            "outputs": tap_paths(recipe.student.objective, TEACHER, name),
        }
        parts |= {of_teacher(part, name): value for part, value in found.items()}
    return parts


def provenance(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Further teacher -> the name of the run that fitted it, and the fingerprint of its stage ``teacher`` there."""
    found = {name: find_fitted(name, recipe) for name in recipe.teachers}
    return {name: {"run": fitted.recipe.name, "fingerprint": fitted.fingerprint} for name, fitted in found.items()}


def modalities_read(recipe: Recipe) -> dict[str | None, list[str]]:
    """Teacher -> the modalities that it reads; None is the run's own."""
    found: dict[str | None, list[str]] = {name: find_fitted(name, recipe).modalities for name in recipe.teachers}
    return found | {None: list(recipe.teacher.encoders)}


class Teachers:
    """The run's own teacher and those of other runs, which answer together.

    Args:
        recipe: this run's.
        encoders: encoder type -> class.
        labels: those of this run's data.
        own: the run's own teacher, in eval mode.

    Attributes:
        own: the same.
        specs: name of a teacher's batch -> what it reads; the own teacher's is "teacher".

    Raises:
        UserError: a teacher of another run cannot be rebuilt, or has not the classes that a term reads.
    """

    def __init__(self, recipe: Recipe, encoders: Registry, labels: Labels, own: MultimodalModel) -> None:
        check_labels(recipe, labels)
        self.own = own
        self._own = Tapped(own, tap_paths(recipe.student.objective, TEACHER))
        self._others: dict[str, _Other] = {}
        for name in recipe.teachers:
            fitted, taps = find_fitted(name, recipe, verify=True), tap_paths(recipe.student.objective, TEACHER, name)
            self._others[of_teacher(TEACHER, name)] = _Other(fitted, fitted.model(encoders), taps, labels)
        self.specs: dict[str, InputSpec] = {TEACHER: input_spec(own)}
        self.specs |= {reads: input_spec(other.model) for reads, other in self._others.items()}

    def __call__(self, batches: Mapping[str, Batch], part: str = "") -> Outputs:
        """Return what all say, on the device of the batches, without gradients.

        A teacher that could read nothing of a batch, as one of images among texts, is not asked.

        Args:
            batches: name -> batch of the same rows and views, as a loader with ``specs`` makes them.
            part: what stands behind the names of batches.
        """
        with torch.no_grad():
            batch = batches[TEACHER + part]
            self.own.to(batch.ids.device)  # nothing moves after the first call
            said = self._own(batch)
            for reads, other in self._others.items():
                if batches[reads + part].inputs:
                    said = Outputs(*(a | b for a, b in zip(said, other(batches[reads + part]), strict=True)))
        return said

    def num_params(self) -> dict[str, int]:
        """Parameters of each, by the name of its batch."""
        models = {TEACHER: self.own, **{reads: other.model for reads, other in self._others.items()}}
        return {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}


class _Other:
    """A teacher of another run that answers with this run's classes, under names of its own."""

    def __init__(self, fitted: Fitted, model: MultimodalModel, taps: Sequence[str], labels: Labels) -> None:
        self.model, self._name, self._size = model, fitted.name, fitted.recipe.data.working_size
        self._tapped = Tapped(model, taps)
        self._columns = {task: torch.tensor(columns) for task, columns in fitted.columns(labels).items()}

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
        return logits.index_select(1, self._columns[task].to(logits.device))
