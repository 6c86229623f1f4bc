"""The stages of a run: each reads the artifacts of its parents and writes its own folder.

A stage never knows which stage called it. What several stages need (the data, a rebuilt model, a loader) comes from
:class:`Workspace`, which opens the parents' artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from distill import engine, evaluate, prune
from distill.build import build_model, example_batch, input_spec
from distill.cache import TeacherCache
from distill.checkpoint import load_weights
from distill.config import ModelConfig, Recipe, TermConfig, TrainConfig, build_part
from distill.contracts import CLEAN_VIEW, TEST, TRAIN, VALID, Artifact, Batch, Outputs
from distill.data.loader import InputSpec, Loader
from distill.data.prepare import PreparedData
from distill.losses.objective import Objective, needs_teacher, tap_paths
from distill.multimodal import MultimodalModel, Tapped, evaluating
from distill.preprocess import Preprocessor, Tokenizer
from distill.progress import progress
from distill.runs import read_json, seed_everything
from distill.towers import Rows, TowerOutputs, WithTowers, encode_towers, frozen_towers

Registry = Mapping[str, Callable[..., Any]]
EVALUATION_BATCH = 128
TEACHER: Final = "teacher"
STUDENT: Final = "student"


@dataclass
class Workspace:
    """What a stage works with.

    Attributes:
        recipe: the validated recipe.
        encoders: encoder type -> class.
        inheritances: inheritance type -> function.
        done: finished stages by name.
        quiet: no progress is shown.
    """

    recipe: Recipe
    encoders: Registry
    inheritances: Registry
    done: dict[str, Artifact] = field(default_factory=dict)
    quiet: bool = False

    def path(self, stage: str) -> Path:
        """The folder of a finished stage."""
        return self.done[stage].path

    def data(self) -> PreparedData:
        """The prepared data."""
        return PreparedData.open(self.path("data"))

    def num_classes(self) -> dict[str, int]:
        """Task -> number of classes."""
        return {task: len(names) for task, names in read_json(self.path("data") / "labels.json").items()}

    def blank(self, config: ModelConfig, where: str) -> MultimodalModel:
        """A model with its initial weights, the same for the same seed."""
        seed_everything(self.recipe.seed)
        return build_model(config, self.encoders, self.num_classes(), where, self.given(config))

    def given(self, config: ModelConfig) -> dict[str, dict[str, Any]]:
        """Encoder parameters that the pipeline adds: the tokenizer that a student takes over from its teacher."""
        parts = {name: self.encoders[part.type] for name, part in config.encoders.items()}
        takers = [name for name, builder in parts.items() if takes_tokenizer(builder)]
        return {name: {"tokenizer_file": self.path("inherit") / "tokenizer.json"} for name in takers}

    def teacher(self) -> MultimodalModel:
        """The fitted teacher, in eval mode and without gradients."""
        model = self.blank(self.recipe.teacher, TEACHER)
        load_weights(model, self.path("teacher") / "model.safetensors")
        return model.eval().requires_grad_(False)

    def model(self, name: str) -> MultimodalModel:
        """A finished model by name: teacher, baseline, student or pruned."""
        if name == TEACHER:
            return self.teacher()
        model: Any = self.blank(self.recipe.student, STUDENT)
        if name == "pruned":
            model = prune.apply(model, prune.PrunePlan.load(self.path("pruned") / "plan.json"))
        load_weights(model, self.path(name) / "model.safetensors")
        return model.eval()

    def towers(self, loader: Loader, model: MultimodalModel, reads: str = TEACHER) -> Loader | WithTowers:
        """The loader, with the kept outputs of the model's frozen towers in its batches."""
        names = frozen_towers(model)
        if reads != TEACHER or not names:
            return loader
        folder, key = self.path("towers"), {"towers": self.done["towers"].fingerprint}
        repeats = {"text": self.recipe.data.augment.text.views}
        return WithTowers(loader, {n: TowerOutputs(folder / n, key, repeats.get(n)) for n in names}, reads)

    def train_loader(self, specs: dict[str, InputSpec], config: TrainConfig, *, repeat: bool = True) -> Loader:
        """Shuffled, augmented training rows; their views repeat as the cache's do, or are new in each epoch."""
        recipe = self.recipe
        return Loader(
            self.data(),
            TRAIN,
            specs,
            batch_size=config.batch_size,
            seed=recipe.seed,
            augment=recipe.data.augment,
            views=recipe.cache.views if repeat else None,
            shuffle=True,
        )

    def clean_loader(self, split: str, spec: InputSpec, reads: str, batch_size: int = EVALUATION_BATCH) -> Loader:
        """Rows of a split in order of id, without augmentation."""
        seed = self.recipe.seed
        return Loader(self.data(), split, {reads: spec}, batch_size=batch_size, seed=seed, augment=None, shuffle=False)

    def validator(self, model: MultimodalModel, reads: str) -> Callable[[nn.Module], dict[str, float]]:
        """A function from a model to its metrics on the validation rows."""
        loader = self.towers(self.clean_loader(VALID, input_spec(model), reads), model, reads)
        return partial(evaluate.validation_accuracy, batches=evaluate.clean_batches(loader, reads))

    def preprocessor(self, spec: InputSpec) -> Preprocessor:
        """The preprocessing that an exported model of this spec needs."""
        size = self.recipe.data.working_size if spec.image else None
        text = Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id) if spec.tokenizer else None
        return Preprocessor(size, text)


def takes_tokenizer(builder: Callable[..., Any]) -> bool:
    """Whether an encoder is given its tokenizer by the pipeline instead of bringing its own."""
    import inspect

    return "tokenizer_file" in inspect.signature(builder).parameters


def fit_teacher(work: Workspace, folder: Path) -> dict[str, Any]:
    """Train the teacher's free parts on the labels; a teacher without any is kept as it is."""
    config = work.recipe.teacher
    model = work.blank(config, TEACHER)
    repeat = "image" in frozen_towers(model)
    loader = work.towers(work.train_loader({TEACHER: input_spec(model)}, config.train, repeat=repeat), model)
    return _fit(work, folder, model, loader, TEACHER, config.train, config.objective, None, "fit teacher")


def keep_towers(work: Workspace, folder: Path) -> dict[str, Any]:
    """Encode every distinct input of the teacher's frozen towers: clean rows of all splits, and training views.

    Beside a frozen image tower the teacher's fit reads the K views of the cache, each of which is encoded. Beside a
    frozen text tower alone it reads new images in each epoch, and texts that repeat after ``augment.text.views``.
    """
    recipe = work.recipe
    model = work.blank(recipe.teacher, TEACHER).eval()
    frozen = frozen_towers(model)
    if not frozen:
        return {}
    spec = replace(input_spec(model), image="image" in frozen)
    clean = [Rows(work.clean_loader(split, spec, TEACHER), CLEAN_VIEW) for split in (TRAIN, VALID, TEST)]
    augmented = work.train_loader({TEACHER: spec}, recipe.teacher.train)
    views = tower_views(recipe) if augmented.augment else {}
    sources = {name: [*clean, *(Rows(augmented, view) for view in range(views.get(name, 0)))] for name in frozen}
    key = {"towers": work.done["towers"].fingerprint}
    with progress("encode frozen towers", quiet=work.quiet) as report:
        return encode_towers(model, sources, folder, reads=TEACHER, key=key, report=report)


def tower_views(recipe: Recipe) -> dict[str, int]:
    """Modality -> number of training views, from 0 on, that a frozen tower is asked for."""
    fresh = max(recipe.cache.views, recipe.teacher.train.epochs)
    return {"image": recipe.cache.views, "text": recipe.data.augment.text.views or fresh}


def training_views(loader: Loader, recipe: Recipe) -> list[int]:
    """The views that training reads: K augmented ones, or the clean one where nothing augments."""
    return sorted({loader.view(epoch) for epoch in range(recipe.cache.views)})


def fill_cache(work: Workspace, folder: Path) -> dict[str, Any]:
    """Store the teacher's outputs for every training row and view."""
    recipe = work.recipe
    model = work.teacher()
    loader = work.train_loader({TEACHER: input_spec(model)}, recipe.student.train)
    with_towers = work.towers(loader, model)
    tapped = Tapped(model, tap_paths(recipe.student.objective, TEACHER))
    ids = loader.data.ids[loader.row_positions]

    def produce(wanted: np.ndarray, view: int) -> Outputs:
        rows = loader.row_positions[np.searchsorted(ids, wanted)]
        with torch.inference_mode():
            return tapped(with_towers.batch(rows, torch.full((len(rows),), view))[TEACHER])

    with progress("fill teacher cache", quiet=work.quiet) as report:
        info = TeacherCache.fill(
            folder,
            rows=ids,
            views=training_views(loader, recipe),
            produce=produce,
            key=cache_key(work),
            dtype=recipe.cache.dtype,
            batch_size=EVALUATION_BATCH,
            progress=report,
        )
    lowest = TeacherCache.open(folder, cache_key(work)).check(produce)
    fields = ("rows", "views", "bytes", "bytes_per_row", "seconds")
    return {**{name: info[name] for name in fields}, "lowest_cosine": lowest}


def cache_key(work: Workspace) -> dict[str, Any]:
    """What the cached outputs depend on, part by part."""
    recipe, done = work.recipe, work.done
    return {
        "teacher": done["teacher"].fingerprint,
        "data": done["data"].fingerprint,
        "augmentation": recipe.data.augment.model_dump(),
        "seed": recipe.seed,
        "outputs": tap_paths(recipe.student.objective, TEACHER),
    }


def inherit(work: Workspace, folder: Path) -> dict[str, Any]:
    """Give the student the teacher's vocabulary, cut to size, and what else its encoders inherit."""
    recipe, data = work.recipe, work.data()
    takers = [n for n, part in recipe.student.encoders.items() if takes_tokenizer(work.encoders[part.type])]
    if not takers:
        return {}
    teacher = work.teacher()
    encoder: Any = teacher.encoders["text"]
    part = recipe.student.encoders["text"]
    texts = [data.texts[row] for row in data.rows(TRAIN)]
    builder: Any = work.encoders[part.type]
    size = int(part.params["vocab_size"])
    ids = builder.reduce_vocabulary(encoder.tokenizer_file, texts, size, folder / "tokenizer.json")
    np.save(folder / "token_ids.npy", ids, allow_pickle=False)
    return {"vocab_size": len(ids)}


def train_baseline(work: Workspace, folder: Path) -> dict[str, Any]:
    """Train the student at the same budget without teacher and without inheritance."""
    config = work.recipe.student
    model = work.blank(config, STUDENT)
    loader = work.train_loader({STUDENT: input_spec(model)}, config.train)
    return _fit(work, folder, model, loader, STUDENT, config.train, config.baseline, None, "train baseline")


def distil_student(work: Workspace, folder: Path) -> dict[str, Any]:
    """Train the student from labels and teacher, after it has inherited."""
    config = work.recipe.student
    model = work.blank(config, STUDENT)
    if config.inherit:
        teacher = work.teacher()
        token_ids = np.load(work.path("inherit") / "token_ids.npy", allow_pickle=False)
        for name, part in config.inherit.items():
            neck: Any = teacher.necks[name]
            given = {"encoder": teacher.encoders[name], "project": neck.project, "student": model.encoders[name]}
            given["token_ids"] = token_ids
            build_part(work.inheritances, part, f"student.inherit.{name}", **given)
    return _distil(work, folder, model, config.train, "distil student")


def prune_student(work: Workspace, folder: Path) -> dict[str, Any]:
    """Remove channels of the student and recover by distillation."""
    recipe = work.recipe
    model = work.model(STUDENT)
    example = example_batch(input_spec(model), recipe.data.working_size)
    plan = prune.plan(model, example, recipe.prune)
    plan.save(folder / "plan.json")
    smaller: Any = prune.apply(work.model(STUDENT), plan)
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(not _inherited_frozen(recipe, name))
    return _distil(work, folder, smaller, recipe.prune.train, "recover pruned")


def _inherited_frozen(recipe: Recipe, parameter: str) -> bool:
    frozen = [n for n, part in recipe.student.inherit.items() if part.params.get("freeze", True)]
    return any(parameter == f"encoders.{name}.table.weight" for name in frozen)


def _distil(work: Workspace, folder: Path, model: MultimodalModel, train: TrainConfig, label: str) -> dict[str, Any]:
    """Train with the student's objective, from the cache or from the live teacher."""
    recipe = work.recipe
    terms = recipe.student.objective
    specs = {STUDENT: input_spec(model)}
    if not needs_teacher(terms):
        return _fit(work, folder, model, work.train_loader(specs, train), STUDENT, train, terms, None, label)
    if recipe.cache.enabled:
        cache = TeacherCache.open(work.path("cache"), cache_key(work))
        loader: Any = work.train_loader(specs, train)
        return _fit(work, folder, model, loader, STUDENT, train, terms, lambda batches: cache(batches[STUDENT]), label)
    teacher = work.teacher()
    tapped = Tapped(teacher, tap_paths(terms, TEACHER))
    loader = work.towers(work.train_loader({**specs, TEACHER: input_spec(teacher)}, train), teacher)

    def live(batches: dict[str, Batch]) -> Outputs:
        teacher.to(batches[TEACHER].ids.device)  # where the engine put the batch; nothing moves after the first step
        with torch.no_grad():
            return tapped(batches[TEACHER])

    return _fit(work, folder, model, loader, STUDENT, train, terms, live, label)


def _fit(
    work: Workspace,
    folder: Path,
    model: MultimodalModel,
    loader: Any,
    reads: str,
    train: TrainConfig,
    terms: list[TermConfig],
    teacher: engine.Teacher | None,
    label: str,
) -> dict[str, Any]:
    """Run the engine once."""
    tapped = Tapped(model, tap_paths(terms, "student"))
    first = next(loader.epoch(0))
    with evaluating(model):
        student_example = tapped(first[reads])
    objective = Objective(terms, student_example, teacher(first) if teacher else None)
    with progress(label, quiet=work.quiet) as report:
        job = engine.Job(
            tapped=tapped,
            objective=objective,
            loader=loader,
            reads=reads,
            config=train,
            folder=folder,
            seed=work.recipe.seed,
            validate=work.validator(model, reads),
            teacher=teacher,
            report=report,
        )
        info = engine.fit(job)
    return {**info, "num_params": sum(p.numel() for p in model.parameters()), "seed": work.recipe.seed}
