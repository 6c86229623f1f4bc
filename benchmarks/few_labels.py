"""Labels for some images, the teacher for all: ``python -m benchmarks.few_labels --fashion-mnist FOLDER``.

A student of 24,250 parameters learns Fashion-MNIST, of which 1,000 training images are labelled, in as many steps as
three epochs of all 60,000 have: from the labels; from a teacher's answers about those images; from its answers about
all of them, without labels. One teacher has seen the labels of all images, the other only those 1,000, which is what
somebody with 1,000 labels has. Everything runs through the engine. Each seed has labelled images, teachers and students
of its own.

``--tune`` prints what the settings below were chosen from: the same trials in each arm, on 5,000 training images that
neither teachers nor students have seen, with another seed. (Their labels are more than 1,000, so somebody with 1,000
would choose less well. The first teacher's setting is no choice.) The test images are read once for each of the models
in the table.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.fashion_mnist import TASK, grey_student, grey_teacher, read_idx, write_images
from benchmarks.seed_tables import add_outputs, command_line, mean_and_half, put_out, table
from distill import engine, evaluate
from distill.cache import TeacherCache
from distill.checkpoint import load_weights
from distill.config import TermConfig, TrainConfig
from distill.contracts import CLEAN_VIEW, IGNORE, TEST, TRAIN, VALID, Outputs, UserError
from distill.data.loader import InputSpec, Loader
from distill.data.prepared import PreparedData
from distill.data_config import AugmentConfig
from distill.losses.objective import Objective
from distill.multimodal import evaluating
from distill.progress import progress
from distill.report import formats
from distill.report.compare import t_interval
from distill.resources import keep_freed_memory
from distill.runs import find, fingerprint, finish, start
from distill.tapped import Tapped
from distill.workspace import WEIGHTS_FILE

VERSION = 1  # raised when the code changes what is trained
BATCH, EPOCHS = 128, 3
HELD_OUT, TUNING_SEED = 5_000, 100
READS, SPEC = "model", InputSpec(("image",))
AUGMENT = AugmentConfig.model_validate({"image": {"flip": 0.5, "shift": 2}})
VIEWS = {"all": EPOCHS, "labelled": 16}  # that a teacher is asked about each image
LABELS = [TermConfig(loss="cross_entropy", task=TASK)]
SOFT = [TermConfig(loss="kd", task=TASK, params={"temperature": 4.0})]


@dataclass(frozen=True)
class Setting:
    """What the trials vary."""

    lr: float
    augmented: bool


@dataclass(frozen=True)
class Arm:
    """A model: which training images it reads, which teacher tells it what they are, and its setting.

    Attributes:
        name: in the table.
        rows: "labelled" images or "all".
        teacher: its name; None where labels are learnt.
        setting: one of the trials.
        epochs: of its rows, for teachers; students have a number of steps.
    """

    name: str
    rows: str
    teacher: str | None
    setting: Setting
    epochs: int | None = None


TRIALS = [Setting(lr, augmented) for lr in (3e-3, 1e-2) for augmented in (False, True)]
WHOLE = Arm("teacher A (all labels)", "all", None, Setting(3e-3, True), epochs=6)
FEW = Arm("teacher B (few labels)", "labelled", None, Setting(3e-3, True), epochs=60)
STUDENTS = (
    Arm("labels alone", "labelled", None, Setting(1e-2, True)),
    Arm("A's answers, labelled images", "labelled", WHOLE.name, Setting(1e-2, True)),
    Arm("A's answers, all images", "all", WHOLE.name, Setting(1e-2, False)),
    Arm("B's answers, labelled images", "labelled", FEW.name, Setting(1e-2, True)),
    Arm("B's answers, all images", "all", FEW.name, Setting(3e-3, False)),
)
TEACHERS = {arm.name: arm for arm in (WHOLE, FEW)}
TUNED = (FEW, *STUDENTS)


@dataclass(frozen=True)
class Experiment:
    """The data of one seed.

    Attributes:
        whole: with all labels.
        few: with some.
        evaluated: the split whose accuracy is asked for.
        steps: of a student.
        seed: of the labelled images, of weights, of orders and of views.
        folder: of finished trainings, which are not repeated.
    """

    whole: PreparedData
    few: PreparedData
    evaluated: str
    steps: int
    seed: int
    folder: Path

    @classmethod
    def of(cls, data: PreparedData, labels: int, evaluated: str, seed: int, folder: Path) -> Experiment:
        """Label so many random training images."""
        rows = data.rows(TRAIN)
        if labels > len(rows):
            raise UserError(f"--labels is {labels}, and there are {len(rows)} training images")
        targets = np.array(data.targets[TASK])
        targets[np.random.default_rng(seed).permutation(rows)[labels:]] = IGNORE
        few = replace(data, targets={TASK: targets})
        return cls(data, few, evaluated, EPOCHS * -(-len(rows) // BATCH), seed, folder / f"{evaluated}-seed{seed}")

    def loader(self, arm: Arm, split: str = TRAIN, views: int | None = None) -> Loader:
        """An arm's training images, in a new order each epoch; those of another split in order, and clean."""
        data = self.whole if arm.name == WHOLE.name else self.few
        augment = AUGMENT if arm.setting.augmented and split == TRAIN else None
        options: dict[str, Any] = {"batch_size": BATCH, "seed": self.seed, "augment": augment, "views": views}
        labelled = split == TRAIN and arm.rows == "labelled"
        return Loader(data, split, {READS: SPEC}, shuffle=split == TRAIN, labelled=labelled, **options)

    def fit(self, arm: Arm) -> tuple[Path, float]:
        """Train a model, or find it trained; return its folder and its accuracy on the split that is evaluated."""
        how = f"{arm.name} lr {arm.setting.lr:g}{' augmented' * arm.setting.augmented}"
        place, known = self.folder / re.sub(r"[^\w.]+", "_", how), len(self.few.rows(TRAIN, labelled=True))
        taught = [asdict(TEACHERS[arm.teacher])] if arm.teacher else []
        key = fingerprint(VERSION, asdict(arm), taught, known, self.steps)
        artifact = find(place, arm.name, key)
        if artifact is None:
            start(place, key, resume=True)
            artifact = finish(place, arm.name, key, {"accuracy": self._train(arm, place)})
        return place, float(artifact.info["accuracy"])

    def _train(self, arm: Arm, place: Path) -> float:
        model = grey_student(self.seed) if arm.epochs is None else grey_teacher(self.seed)
        tapped = Tapped(model, [])
        loader = self.loader(arm, views=VIEWS[arm.rows] if arm.teacher else None)
        stored = self._answers(arm, loader, place / "cache") if arm.teacher else None
        first = loader.at(0, 0)
        with evaluating(model):
            example = stored([first])[0] if stored else None
            objective = Objective(SOFT if stored else LABELS, tapped(first[READS]), example)
        epochs = arm.epochs or math.ceil(self.steps / len(loader))
        config = TrainConfig(
            epochs=epochs,
            max_steps=None if arm.epochs else self.steps,
            batch_size=BATCH,
            lr=arm.setting.lr,
            weight_decay=0.05,
            schedule="onecycle",
            keep="last",
            validate_every=epochs,  # the rows that are evaluated are read once, when the weights are settled
        )
        batches = evaluate.clean_batches(self.loader(arm, self.evaluated), READS)
        validate = partial(evaluate.validation_scores, batches=batches, tasks=self.whole.tasks)
        with progress(f"{arm.name}, lr {arm.setting.lr:g}, seed {self.seed}") as report:
            job = engine.Job(tapped, objective, loader, READS, config, place, self.seed, validate)
            found = engine.fit(replace(job, stored=stored, report=report))
        return float(found["best"])

    def _answers(self, arm: Arm, loader: Loader, place: Path) -> engine.Stored:
        """What the arm's teacher says of its images, from a cache."""
        folder, _ = self.fit(TEACHERS[str(arm.teacher)])
        teacher = grey_teacher(self.seed)
        load_weights(teacher, folder / WEIGHTS_FILE)
        ids = loader.data.ids[loader.row_positions]

        def produce(wanted: np.ndarray, view: int) -> Outputs:
            rows = loader.row_positions[np.searchsorted(ids, wanted)]
            with evaluating(teacher):
                outputs = teacher(loader.batch(rows, torch.full((len(rows),), view))[READS])
            return Outputs({TASK: outputs.logits[TASK]}, {}, {})

        views = [CLEAN_VIEW] if loader.augment is None else list(range(VIEWS[arm.rows]))
        TeacherCache.fill(place, rows=ids, views=views, produce=produce, key={}, dtype="float16", batch_size=BATCH)
        cache = TeacherCache.open(place, {})

        return lambda steps: cache.lookup_each([batches[READS] for batches in steps])


def open_data(source: Path, folder: Path) -> PreparedData:
    """Fashion-MNIST as prepared data, on white instead of black, since the border of a shifted image is white."""
    parts = {split: read_idx(source, split) for split in (TRAIN, TEST)}
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts.values(), strict=True))
    split = [name for name, (_, own) in parts.items() for _ in own]
    return write_images(folder, 255 - images, labels, split)


def hold_out(data: PreparedData, count: int) -> PreparedData:
    """Make random training rows validation rows."""
    split = np.array(data.split)
    split[np.random.default_rng(TUNING_SEED).permutation(data.rows(TRAIN))[:count]] = VALID
    return replace(data, split=split)


def tune(data: PreparedData, labels: int, folder: Path, held_out: int) -> dict[str, Any]:
    """Try the same settings in each arm; teachers have the setting that is theirs in the code."""
    experiment = Experiment.of(hold_out(data, held_out), labels, VALID, TUNING_SEED, folder)
    trials = {
        arm.name: [asdict(trial) | {"accuracy": experiment.fit(replace(arm, setting=trial))[1]} for trial in TRIALS]
        for arm in TUNED
    }
    return {"valid_rows": held_out, "labels": labels, "trials": trials}


def measure(data: PreparedData, labels: int, folder: Path, seeds: int) -> dict[str, Any]:
    """Accuracies of every model on the test rows, seed by seed."""
    experiments = [Experiment.of(data, labels, TEST, seed, folder) for seed in range(seeds)]
    models = []
    for arm in (WHOLE, FEW, *STUDENTS):
        values = [experiment.fit(arm)[1] for experiment in experiments]
        summary = {"mean": fmean(values), "ci95": t_interval(values), "accuracies": values}
        models.append({**asdict(arm), **summary})
    return {"labels": labels, "train_rows": len(data.rows(TRAIN)), "steps": experiments[0].steps, "models": models}


def markdown(found: dict[str, Any]) -> str:
    """The table, with the command that makes it."""
    seeds = [f"seed {seed}" for seed in range(len(found["models"][0]["accuracies"]))]
    count = {"all": found["train_rows"], "labelled": found["labels"]}
    rows = []
    for model in found["models"]:
        shown = [model["name"], f"{count[model['rows']]:,}", mean_and_half(model["accuracies"])]
        rows.append([*shown, *map(formats.percent_number, model["accuracies"])])
    titles = ["model", "training images", "test accuracy, %", *seeds]
    about = (
        f"A teacher has about 500,000 parameters, a student 24,250 and {found['steps']:,} steps of {BATCH} images.\n"
        "± is half of the 95 % t-interval over seeds, each with labelled images, teachers and students of its own."
    )
    return (
        "\n\n".join(["# Fashion-MNIST with few labels", f"    {found['command']}", about, table(titles, rows)]) + "\n"
    )


def trials_table(found: dict[str, Any]) -> str:
    """What the trials gave, as Markdown."""
    titles = ["model", *(f"lr {trial.lr:g}{', augmented' if trial.augmented else ''}" for trial in TRIALS)]
    rows = [
        [name, *(formats.percent_number(trial["accuracy"]) for trial in trials)]
        for name, trials in found["trials"].items()
    ]
    about = f"Accuracy on {found['valid_rows']:,} training images that no model has seen, seed {TUNING_SEED}, %."
    return "\n\n".join([f"    {found['command']}", about, table(titles, rows)]) + "\n"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", required=True, help="IDX files")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--labels", type=int, default=1_000, help="labelled training images")
    parser.add_argument("--tune", action="store_true", help="print the trials instead")
    parser.add_argument("--output", type=Path, default=Path("runs/few_labels"), help="folder of the trainings")
    add_outputs(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Train what is not trained yet, and print the table."""
    options = parse(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()  # as every run does
    data = open_data(options.fashion_mnist, options.output / "data")
    command = command_line("benchmarks.few_labels", arguments)
    if options.tune:
        found = tune(data, options.labels, options.output, HELD_OUT)
    else:
        found = measure(data, options.labels, options.output, options.seeds)
    found = {"command": command, **found}
    text = trials_table(found) if options.tune else markdown(found)
    put_out(options, text, found)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
