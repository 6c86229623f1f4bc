"""What the stages share: the finished artifacts of a run, and how to open what is in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from distill import evaluate, prune
from distill.build import Model, build_model, build_part, input_spec, told_by_data
from distill.checkpoint import load_weights, read_tensors
from distill.config import ModelConfig, Recipe, TrainConfig
from distill.contracts import TRAIN, VALID, Artifact, Batch, UserError
from distill.data.class_names import class_names, spoken
from distill.data.loader import InputSpec, Loader
from distill.data.mixed import as_data
from distill.data.prepared import FORMATS_FILE, LABELS_FILE, PreparedData
from distill.data.texts import Texts
from distill.data_config import DataConfig
from distill.dual import DualEncoder
from distill.formats import TEXT
from distill.multimodal import OneModality
from distill.preprocess import TOKENIZER_FILE, Preprocessor, Tokenizer
from distill.ranks import Ranks
from distill.retrieval import Pairs, pairs_of
from distill.runs import read_json, seed_everything
from distill.targets import Task, tasks_from_json
from distill.towers import TowerOutputs, WithTowers, frozen_towers
from distill.trackers import Trackers, Tracking, untracked

Registry = Mapping[str, Callable[..., Any]]
EVALUATION_BATCH = 128
TEACHER: Final = "teacher"
STUDENT: Final = "student"
BASELINE: Final = "baseline"
PRUNED: Final = "pruned"
TEXTS_FILE = "texts.json"
WEIGHTS_FILE = "model.safetensors"
PLAN_FILE = "plan.json"


@dataclass
class Workspace:
    """What a stage works with.

    Attributes:
        recipe: the validated recipe.
        encoders: encoder type -> class.
        inheritances: inheritance type -> function.
        done: finished stages by name.
        quiet: no progress is shown.
        ranks: the processes that share the work.
        trackers: who is told of each training.
    """

    recipe: Recipe
    encoders: Registry
    inheritances: Registry
    done: dict[str, Artifact] = field(default_factory=dict)
    quiet: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    trackers: Trackers | None = None

    @property
    def workers(self) -> int:
        """Threads that make batches ahead of the training."""
        recipe = self.recipe
        if recipe.workers is not None:
            return recipe.workers
        return int(self.ranks.device.type != "cpu" or not recipe.data.decode_once)  # on a CPU steps are slower with one

    def path(self, stage: str) -> Path:
        """The folder of a finished stage."""
        return self.done[stage].path

    def data(self) -> PreparedData:
        """The prepared data."""
        return PreparedData.open(self.path("data"), self.recipe.data)

    def tasks(self) -> dict[str, Task]:
        """The tasks of the data."""
        return tasks_from_json(read_json(self.path("data") / LABELS_FILE))

    def formats(self) -> dict[str, Any]:
        """Modality -> how its values became arrays, as JSON values."""
        return dict(read_json(self.path("data") / FORMATS_FILE))

    def class_counts(self) -> dict[str, Tensor]:
        """Task -> int64 [C], the training rows of each class; [2, K] without and with each label."""
        return {task: torch.from_numpy(counts) for task, counts in self.data().class_counts(TRAIN).items()}

    def training_rows(self) -> Batch:
        """Ids and presence of the rows that a student learns from a teacher on, those of the transfer set last."""
        sets = [self.data()]
        if self.recipe.transfer.texts:
            sets.append(as_data(read_json(self.path("transfer") / TEXTS_FILE), sets[0]))
        own = [data.rows(TRAIN) for data in sets]
        ids = torch.cat([torch.tensor(data.ids[rows]) for data, rows in zip(sets, own, strict=True)])
        present = {
            name: torch.cat([torch.tensor(data.present[name][rows]) for data, rows in zip(sets, own, strict=True)])
            for name in sets[0].present
        }
        return Batch(ids, torch.zeros_like(ids), {}, present, {})

    def row_keys(self) -> dict[str, Tensor]:
        """int64 [N] each: "id" of the training rows, and what is equal for rows of one text, file or group."""
        data = self.data()
        rows = data.rows(TRAIN)
        assert isinstance(data.texts, Texts)
        columns = {"id": data.ids, TEXT: data.texts.numbers, **data.codes, "group": data.groups}
        return {name: torch.from_numpy(values[rows].astype(np.int64)) for name, values in columns.items()}

    def classifiers(self, tasks: list[str]) -> dict[str, Tensor]:
        """Task (or TASK.modality) -> float [C, D], the weights of the fitted teacher's linear heads."""
        if not tasks:
            return {}
        weights, found = read_tensors(self.path("teacher") / WEIGHTS_FILE), {}
        for name in tasks:
            task, _, head = name.partition(".")
            path = f"unimodal_heads.{name}" if head not in ("", "fused") else f"heads.{task}"
            found[name] = weights[f"{path}.linear.weight"]
        return found

    def blank(self, name: str) -> Model:
        """A model with its initial weights, the same for the same seed: teacher, baseline or student."""
        seed_everything(self.recipe.seed)
        where = TEACHER if name == TEACHER else STUDENT
        config: ModelConfig = getattr(self.recipe, where)
        return build_model(config, self.encoders, self.tasks(), where, self._given(config, name))

    def takers(self, config: ModelConfig) -> list[str]:
        """Modalities of a model whose encoder is given its tokenizer."""
        return takers(config, self.encoders)

    def _given(self, config: ModelConfig, name: str) -> dict[str, dict[str, Any]]:
        """Encoder parameters that the pipeline adds: of the data, and the tokenizer that a student takes over."""
        stage = {TEACHER: "data", BASELINE: "vocabulary"}.get(name, "inherit")
        given = told_by_data(config, self.encoders, self.recipe.data)
        return given | {taker: {"tokenizer_file": self.path(stage) / TOKENIZER_FILE} for taker in self.takers(config)}

    def pretrained_teacher(self) -> Model:
        """The teacher as its joint fit begins: encoders that learnt alone have what they learnt."""
        model: Any = self.blank(TEACHER)
        for modality in self.recipe.teacher.pretrain:
            for member in model.members:
                load_weights(OneModality(model, modality, member), self.path("pretrain") / modality / WEIGHTS_FILE)
        return model

    def teacher(self) -> Model:
        """The fitted teacher, in eval mode and without gradients."""
        model = self.blank(TEACHER)
        load_weights(model, self.path("teacher") / "model.safetensors")
        return model.eval().requires_grad_(False)

    def model(self, name: str) -> Model:
        """A finished model by name: teacher, baseline, student or pruned."""
        if name == TEACHER:
            return self.teacher()
        model: Any = self.blank(BASELINE if name == BASELINE else STUDENT)
        if name == PRUNED:
            model = prune.apply(model, prune.PrunePlan.load(self.path(PRUNED) / PLAN_FILE))
        load_weights(model, self.path(name) / "model.safetensors")
        return model.eval()

    def towers(self, loader: Loader, model: Model, reads: str = TEACHER) -> Loader | WithTowers:
        """The loader, with the kept outputs of the model's frozen towers in its batches."""
        names = frozen_towers(model)
        if reads != TEACHER or not names:
            return loader
        folder, key = self.path("towers"), {"towers": self.done["towers"].fingerprint}
        repeats = {TEXT: self.recipe.data.augment.text.views}
        return WithTowers(loader, {n: TowerOutputs(folder / n, key, repeats.get(n)) for n in names}, reads)

    def train_loader(
        self, specs: dict[str, InputSpec], config: TrainConfig, *, repeat: bool = True, labelled: bool = False
    ) -> Loader:
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
            labelled=labelled,
            class_balance=config.class_balance,
            mix_images=config.mix_images,
            group_by_length=config.group_by_length,
            two_level_rows=recipe.data.two_level_order,
            **self._slices(),
            workers=self.workers,
        )

    def transfer_loader(self, specs: dict[str, InputSpec], batch_size: int) -> Loader | None:
        """The transfer set's texts in a new order each epoch, never augmented; None where the recipe has none."""
        if not self.recipe.transfer.texts:
            return None
        data = as_data(read_json(self.path("transfer") / TEXTS_FILE), self.data())
        return self._texts_loader(data, specs, batch_size * self.recipe.transfer.ratio)

    def class_names_loader(self, specs: dict[str, InputSpec], batch_size: int) -> Loader | None:
        """Names of classes as the teacher reads them, in the same way; None where the recipe has it read none."""
        config = self.recipe.teacher.class_names
        if not config.tasks:
            return None
        return self._texts_loader(class_names(self.data(), config.tasks), specs, batch_size * config.ratio)

    def _texts_loader(self, data: PreparedData, specs: dict[str, InputSpec], num_rows: float) -> Loader:
        size = max(1, round(num_rows))
        texts = {name: spec.only([TEXT]) for name, spec in specs.items()}
        options: dict[str, Any] = {"batch_size": size, "seed": self.recipe.seed, "workers": self.workers}
        return Loader(data, TRAIN, texts, augment=None, shuffle=True, **options, **self._slices())

    def clean_loader(self, split: str, spec: InputSpec, reads: str, **changes: int) -> Loader:
        """Rows of a split in order of id, without augmentation; all of them, unless ``rank`` is given."""
        recipe = self.recipe
        options: dict[str, Any] = {"batch_size": EVALUATION_BATCH, "seed": recipe.seed, "workers": self.workers}
        options |= changes
        return Loader(self.data(), split, {reads: spec}, augment=None, shuffle=False, **options)

    def validator(self, model: Model, reads: str) -> tuple[Callable[[nn.Module], dict[str, float]], str]:
        """A function from a model to its metrics on the validation rows, of which each rank reads its share.

        Also the name of the one by which the best epoch is chosen.
        """
        loader = self.towers(self.clean_loader(VALID, input_spec(model), reads, **self._slices()), model, reads)
        batches = evaluate.clean_batches(loader, reads)
        if isinstance(model, DualEncoder):
            measure = partial(evaluate.validation_recall, pairs=self.pairs(VALID), gather=self.ranks.gather)
            return partial(measure, batches=batches), evaluate.RECALL
        tasks = self.tasks()
        scores = partial(evaluate.validation_scores, batches=batches, tasks=tasks, gather=self.ranks.gather)
        return scores, evaluate.chosen_by(tasks)

    def teachers_tokenizer(self) -> Path:
        """The ``tokenizer.json`` of the teacher's text tower, or of the words that were learnt."""
        if self.recipe.learnt_words is not None:
            return self.path("data") / TOKENIZER_FILE
        tower: Any = build_part(self.encoders, self.recipe.teacher.encoders[TEXT], "teacher.encoders.text")
        return Path(tower.tokenizer_file)

    def pairs(self, split: str) -> Pairs:
        """Which images and texts of a split belong together; rows are counted in order of id.

        Raises:
            UserError: no row has both.
        """
        data = self.data()
        rows = data.rows(split)
        assert isinstance(data.texts, Texts)
        codes = {"image": data.codes["image"][rows], TEXT: data.texts.numbers[rows]}
        pairs = pairs_of(codes, {name: data.present[name][rows] for name in codes})
        if not len(pairs.first_rows["image"]):
            raise UserError(f"no row of split {split!r} has an image and a text, so nothing can be retrieved; add some")
        return pairs

    def prompts_loader(self, spec: InputSpec, reads: str, task: str, templates: list[str]) -> Loader:
        """The templates filled with the names of a task's classes, all templates of the first class first."""
        data = self.data()
        texts = [template.replace("{}", spoken(name)) for name in data.labels[task] for template in templates]
        options: dict[str, Any] = {"batch_size": EVALUATION_BATCH, "seed": self.recipe.seed, "workers": self.workers}
        specs = {reads: spec.only([TEXT])}
        return Loader(as_data(texts, data), TRAIN, specs, augment=None, shuffle=False, **options)

    def tracking(self, folder: Path, config: TrainConfig) -> Tracking:
        """What tells the trackers of a training in a folder of a stage."""
        if self.trackers is None:
            return untracked
        stage = next(artifact for artifact in self.done.values() if folder.is_relative_to(artifact.path))
        training = "-".join(folder.relative_to(stage.path.parent).parts)  # "student", "pretrain-image"
        settings = {name: value for name, value in config.model_dump().items() if isinstance(value, str | int | float)}
        return self.trackers.of(training, stage.fingerprint, {"seed": self.recipe.seed, **settings})

    def _slices(self) -> dict[str, Any]:
        """Which rows of each batch are this rank's."""
        return {"rank": self.ranks.rank, "world_size": self.ranks.count}

    def preprocessor(self, spec: InputSpec) -> Preprocessor:
        """The preprocessing that an exported model of this spec needs."""
        text = Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id, spec.rows) if spec.tokenizer else None
        formats = self.data().formats
        return Preprocessor({name: formats[name] for name in spec.media}, text)


def untrained(
    config: ModelConfig, where: str, encoders: Registry, tasks: Mapping[str, Task], data: DataConfig
) -> Model:
    """A model as it is built, before any stage has run: with a tokenizer's name where it takes one from a teacher."""
    given = told_by_data(config, encoders, data)
    given |= {name: {"tokenizer_file": Path(TOKENIZER_FILE)} for name in takers(config, encoders)}
    return build_model(config, encoders, tasks, where, given)


def takers(config: ModelConfig, encoders: Registry) -> list[str]:
    """Modalities of a model whose encoder is given its tokenizer."""
    parts = config.encoders.items()
    return [name for name, part in parts if part.type in encoders and takes_tokenizer(encoders[part.type])]


def takes_tokenizer(builder: Callable[..., Any]) -> bool:
    """Whether an encoder is given its tokenizer by the pipeline instead of bringing its own."""
    return "tokenizer_file" in inspect.signature(builder).parameters


def takes_tokens(inheritance: Callable[..., Any]) -> bool:
    """Whether what is inherited belongs to the teacher's vocabulary."""
    return "token_ids" in inspect.signature(inheritance).parameters
