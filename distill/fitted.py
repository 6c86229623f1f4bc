"""Models that other runs have fitted: found in those runs' folders and rebuilt.

A recipe names them under ``teachers``, each the teacher of its run, or with ``stage`` its student, before or after
pruning, or its baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.build import Model, input_spec
from distill.config import ModelConfig, Recipe
from distill.contracts import Artifact, UserError
from distill.data.prepared import FORMATS_FILE, LABELS_FILE
from distill.runs import MANIFEST, find, fingerprint, read_json, sha256_file
from distill.targets import CAPTIONING, REGRESSION, Task, tasks_from_json, tasks_to_json
from distill.workspace import BASELINE, PRUNED, STUDENT, TEACHER, WEIGHTS_FILE, Registry, Workspace

Tasks = Mapping[str, Task]
RESOLVED_FILE, TOKENIZER = "recipe.resolved.json", "tokenizer"
ORIGIN = "origin"
"""In the info of a stage that fits a model: what :func:`origin` returned."""
VERBS = {TEACHER: "cache", BASELINE: "export", STUDENT: "train", PRUNED: "prune"}
"""Stage that fits a model -> the verb that runs a recipe so far."""


@dataclass(frozen=True)
class Fitted:
    """A model in the folder of the run that fitted it.

    Attributes:
        name: what this run's recipe calls it.
        folder: that run's.
        stage: of that run, which fitted it.
        recipe: that run's.
        answers: the tasks of that run's data.
        fingerprint: of that stage.
        weights_sha256: of its weights.
        tokenizer: hash of the file that it was fitted with; empty if it reads no text.
    """

    name: str
    folder: Path
    stage: str
    recipe: Recipe
    answers: Tasks
    fingerprint: str
    weights_sha256: str
    tokenizer: str

    @property
    def config(self) -> ModelConfig:
        """What it is made of, before pruning."""
        return _config(self.recipe, self.stage)

    @property
    def modalities(self) -> list[str]:
        """What it reads."""
        return list(self.config.encoders)

    @property
    def tasks(self) -> list[str]:
        """What it has heads for."""
        return list(self.config.heads or self.answers) if self.config.fusion else []

    def columns(self, ours: Tasks) -> dict[str, list[int]]:
        """Each task that is the same as in ``ours`` -> its output of each name there, in order.

        Classes and labels may be in another order; numbers are standardised alike, captions have the same vocabulary.
        """
        found = {}
        for name in self.tasks:
            theirs, own = self.answers[name], ours.get(name)
            alike = own and own.kind == theirs.kind and set(own.names) == set(theirs.names)
            if own and alike and (own.kind not in (REGRESSION, CAPTIONING) or own == theirs):
                found[name] = [theirs.names.index(each) for each in own.names]
        return found

    def model(self, encoders: Registry) -> Model:
        """The model with its fitted weights, in eval mode and without gradients.

        Raises:
            UserError: weights do not fit, pretrained parts are not there, or its tokenizer is another one by now.
        """
        read = ("data", "vocabulary", "inherit", self.stage)
        done = {stage: Artifact(stage, self.folder / stage, self.fingerprint) for stage in read}
        try:
            model = Workspace(self.recipe, encoders, {}, done, quiet=True).model(self.stage)
        except UserError as error:  # which speaks of the other run's recipe
            raise UserError(f"teachers.{self.name}.run: {self.folder}: {error}") from error
        if _tokenizer(model) != self.tokenizer:
            raise UserError(
                f"teachers.{self.name}.run: its tokenizer has changed or gone since it was fitted; {_again(self.stage)}"
            )
        return model.requires_grad_(False)


def _config(recipe: Recipe, stage: str) -> ModelConfig:
    return recipe.teacher if stage == TEACHER else recipe.student


def _model(stage: str) -> str:
    return "pruned student" if stage == PRUNED else stage


def _again(stage: str) -> str:
    return f"run its recipe again (`distill {VERBS[stage]} RECIPE`)"


def origin(recipe: Recipe, tasks: Tasks, formats: Mapping[str, Any], model: Model, stage: str) -> dict[str, str]:
    """What the model that a stage has fitted is rebuilt from, beside its weights, as hashes.

    The recipe in a run's folder may change while its models stay. Many changes would not fit the weights, but some
    would, in silence.
    """
    return {**_described(recipe, tasks, formats, stage), TOKENIZER: _tokenizer(model)}


def _described(recipe: Recipe, tasks: Tasks, formats: Mapping[str, Any], stage: str) -> dict[str, str]:
    unrelated = {"train", "baseline", "objective", "inherit", "pretrain", "class_names"}
    config = _config(recipe, stage)
    model = config.model_dump(exclude=unrelated, exclude_defaults=True)  # later versions add keys
    for part in model["encoders"].values():
        part.pop("weights", None)  # where they lay before the fit; the model's own file has them
    parts = [model, list(config.encoders), recipe.data.working_size]
    read = {name: format for name, format in formats.items() if name in config.encoders}
    files = {f"data/{LABELS_FILE}": fingerprint(tasks_to_json(tasks)), f"data/{FORMATS_FILE}": fingerprint(read)}
    return {RESOLVED_FILE: fingerprint(parts), **files}


def _tokenizer(model: Model) -> str:
    file = input_spec(model).tokenizer
    return sha256_file(file) if file is not None and file.is_file() else ""


def find_fitted(name: str, recipe: Recipe, *, verify: bool = False) -> Fitted:
    """Read what the folder of another run says about one of its models.

    Args:
        name: one of the recipe's ``teachers``.
        recipe: this run's.
        verify: compare the hashes of the model's files too.

    Raises:
        UserError: there is no such finished model, or something has changed since it was fitted.
    """
    folder, stage, where = Path(recipe.teachers[name].run), recipe.teachers[name].stage, f"teachers.{name}.run"
    if not (folder / stage / MANIFEST).is_file():
        raise UserError(
            f"{where}: {folder} holds no finished {_model(stage)}; give the folder OUTPUT/NAME of a run that has "
            f"fitted one (`distill {VERBS[stage]} RECIPE`)"
        )
    try:
        manifest = read_json(folder / stage / MANIFEST)
        key, noted = manifest["fingerprint"], dict(manifest["info"].get(ORIGIN, {}))
        weights = manifest["files"][WEIGHTS_FILE]["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not what a run wrote
        raise UserError(f"{where}: {folder / stage / MANIFEST} is damaged; {_again(stage)}") from error
    if not noted:
        raise UserError(
            f"{where}: the {_model(stage)} in {folder} was fitted by an earlier version, which did not note from what; "
            f"{_again(stage)} with --force {stage}"
        )
    if verify and find(folder / stage, stage, key) is None:
        raise UserError(f"{where}: files in {folder / stage} have changed since they were written; {_again(stage)}")
    try:
        theirs = Recipe.model_validate(read_json(folder / RESOLVED_FILE))
        answers = tasks_from_json(read_json(folder / "data" / LABELS_FILE))
        found = _described(theirs, answers, read_json(folder / "data" / FORMATS_FILE), stage)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: {RESOLVED_FILE}, data/{LABELS_FILE} or data/{FORMATS_FILE} in {folder} is absent or damaged; "
            f"{_again(stage)}"
        ) from error
    for file, value in found.items():
        if noted.get(file) != value:
            raise UserError(
                f"{where}: {folder / file} has changed since the {_model(stage)} there was fitted; {_again(stage)}"
            )
    return Fitted(name, folder, stage, theirs, answers, key, weights, noted.get(TOKENIZER, ""))
