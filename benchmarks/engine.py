"""How near the engine comes to the limit of the hardware: ``python -m benchmarks.engine [--json]``.

The limit is forward, loss, backward and optimizer step of the same student on one batch that is kept in memory (with
the teacher's forward where it is live; the teacher's bare forward alone for filling the cache). Each arm runs through
the real engine with logging, progress, checkpoints, clipping and its guards on. Arms and their limits take turns in one
process with one thread; a ratio is that of images per CPU-second (of the process and its children), the median over
the repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

from benchmarks.fashion_mnist import CLASSES, SIZE, grey_student, grey_teacher, read_idx, write_images
from distill import engine, pipeline, stages
from distill.cache import TeacherCache
from distill.config import TermConfig, TrainConfig
from distill.contracts import CLEAN_VIEW, TRAIN, Batch, Outputs
from distill.data.loader import InputSpec, Loader
from distill.data.prepared import PreparedData
from distill.data_config import AugmentConfig
from distill.losses.objective import Objective
from distill.multimodal import evaluating
from distill.optimize import build_optimizer
from distill.progress import progress
from distill.recipe import load_recipe
from distill.resources import cpu_seconds, keep_freed_memory
from distill.tapped import Tapped
from distill.trainee import Trainee

FLOORS = {"cached": 0.93, "cached_augmented": 0.80, "live": 0.95, "quickstart": 0.95, "fill": 0.95}
BATCH = 128
AUGMENT = AugmentConfig.model_validate({"image": {"flip": 0.5, "shift": 3}})
TERMS = [
    TermConfig(loss="cross_entropy", task="label"),
    TermConfig(loss="kd", task="label", params={"temperature": 4.0}),
]
QUICK = (
    "teacher.pretrain.image.max_steps=2",
    "teacher.train.max_steps=2",
    "teacher.train.validate_every=100",
)  # what the teacher has learnt does not change how long its student takes


@dataclass(frozen=True)
class Arm:
    """What is measured: two ways to work through a number of images."""

    name: str
    images: int
    run: Callable[[], None]  # works through the images
    limit: Callable[[int], int]  # works through at least that many, and returns how many


def write_data(folder: Path, rows: int, source: Path | None) -> PreparedData:
    """Write training rows: Fashion-MNIST's first ones, or noise of that size, on which a step takes as long."""
    if source is not None:
        images, labels = read_idx(source, TRAIN, rows)
    else:
        random = np.random.default_rng(0)
        images, labels = random.integers(0, 256, (rows, SIZE, SIZE), np.uint8), random.integers(0, CLASSES, rows)
    return write_images(folder, images, labels, [TRAIN] * rows)


def constant(model: nn.Module) -> dict[str, float]:
    """Stands for validation, which a user pays for but which is no part of a step."""
    return {engine.Job.select: 0.0}


def bare_steps(job: engine.Job, batch: Batch, answer: Callable[[], Outputs]) -> Callable[[int], int]:
    """The limit: steps on one batch in memory; ``answer`` gives the teacher's outputs for it."""
    trainee = Trainee(job.tapped, job.objective)
    optimizer = build_optimizer(trainee, job.config)

    def run(images: int) -> int:
        trainee.train()
        steps = -(-images // len(batch.ids))
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss, _ = trainee(batch, answer())
            loss.backward()
            optimizer.step()
        return steps * len(batch.ids)

    return run


def fitting(job: engine.Job, folder: Path) -> Callable[[], None]:
    """Train a job from the start in a folder of its own."""
    numbers = iter(range(1_000_000))

    def run() -> None:
        place = folder / str(next(numbers))
        place.mkdir(parents=True)
        with progress(place.parent.name) as report:
            engine.fit(replace(job, folder=place, report=report))

    return run


def grey_arms(folder: Path, rows: int, source: Path | None) -> list[Arm]:
    """The arms on 28 x 28 images: a student of about 24,000 parameters, a teacher of about 500,000."""
    data = write_data(folder / "data", rows, source)
    student, teacher = grey_student(), grey_teacher()
    for name, model in (("student", student), ("teacher", teacher)):
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    tapped, live = Tapped(student, []), Tapped(teacher.eval().requires_grad_(False), [])
    config = TrainConfig(epochs=1, batch_size=BATCH, checkpoint_minutes=0.02, keep="last")

    def make_loader(augment: AugmentConfig | None, *reads: str) -> Loader:
        spec = InputSpec(("image",))
        options: Any = {"augment": augment, "views": 2 if augment else None, "batch_size": BATCH, "seed": 0}
        return Loader(data, TRAIN, dict.fromkeys(reads, spec), shuffle=True, **options)

    def ask(batch: Batch) -> Outputs:
        with torch.inference_mode():
            return live(batch)._replace(embeddings={})  # the terms read logits alone

    def make_cache(name: str, loader: Loader, views: list[int]) -> TeacherCache:
        def produce(ids: np.ndarray, view: int) -> Outputs:
            return ask(loader.batch(loader.row_positions[ids], torch.full((len(ids),), view))["teacher"])

        TeacherCache.fill(
            folder / name, rows=data.ids, views=views, produce=produce, key={}, dtype="float16", batch_size=BATCH
        )
        return TeacherCache.open(folder / name, {})

    def make_arm(name: str, loader: Loader, store: TeacherCache | None = None) -> Arm:
        first = loader.at(0, 0)

        def answers(steps: list[dict[str, Batch]]) -> list[Outputs]:
            if store is not None:
                return store.lookup_each([batches["student"] for batches in steps])
            return [ask(batches["teacher"]) for batches in steps]

        def answer(batches: dict[str, Batch]) -> Outputs:
            return answers([batches])[0]

        stored = None if store is None else answers
        with evaluating(student):
            objective = Objective(TERMS, tapped(first["student"]), answer(first))
        job = engine.Job(tapped, objective, loader, "student", config, folder, 0, constant, answer, stored)
        kept = answer(first)
        limit = bare_steps(job, first["student"], (lambda: kept) if stored else partial(answer, first))
        return Arm(name, rows, fitting(job, folder / f"runs-{name}"), limit)

    plain, both = make_loader(None, "student"), make_loader(None, "student", "teacher")
    augmented = make_loader(AUGMENT, "student")
    cache = make_cache("cache", make_loader(None, "teacher"), [CLEAN_VIEW])
    two_views = make_cache("cache-augmented", make_loader(AUGMENT, "teacher"), [0, 1])
    numbers = iter(range(1_000_000))

    def fill() -> None:
        make_cache(f"fill-{next(numbers)}", make_loader(None, "teacher"), [CLEAN_VIEW])

    one = both.at(0, 0)["teacher"]

    def forward(images: int) -> int:
        batches = -(-images // BATCH)
        for _ in range(batches):
            ask(one)
        return batches * BATCH

    return [
        make_arm("cached", plain, cache),
        make_arm("cached_augmented", augmented, two_views),
        make_arm("live", both),
        Arm("fill", rows, fill, forward),
    ]


def quickstart_arm(folder: Path) -> Arm:
    """The quick start's student on its cache, as the ``student`` stage trains it, from the first step to the last."""
    recipe = load_recipe("quickstart", [f"output={folder}", *QUICK])
    done = pipeline.run(recipe, until="cache", quiet=True) | pipeline.run(recipe, until="inherit", quiet=True)
    job = replace(stages.student_job(pipeline.workspace(recipe, done), folder), validate=constant)
    assert job.teacher is not None
    first = job.loader.at(0, 0)
    kept, epochs = job.teacher(first), job.config.epochs
    rows = sum(len(batches[job.reads].ids) for epoch in range(epochs) for batches in job.loader.epoch(epoch))
    return Arm("quickstart", rows, fitting(job, folder / "runs"), bare_steps(job, first[job.reads], lambda: kept))


def timed(work: Callable[..., Any], *arguments: int) -> tuple[float, Any]:
    """CPU time of a call, in all threads and children, and what it returns."""
    began = cpu_seconds()
    result = work(*arguments)
    return cpu_seconds() - began, result


def measure(arms: list[Arm], repetitions: int) -> list[dict[str, Any]]:
    """Let arms and limits take turns; return each arm's median ratio and rates."""
    rates: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in arms}
    for repetition in range(repetitions + 1):
        for arm in arms:
            before, first = timed(arm.limit, arm.images // 2)  # and behind: a machine that slows down favours neither
            taken, _ = timed(arm.run)
            behind, second = timed(arm.limit, arm.images // 2)
            if repetition:  # the first warms up
                rates[arm.name].append((arm.images / taken, (first + second) / (before + behind)))
    results = []
    for name, pairs in rates.items():
        ratios = sorted(ours / limit for ours, limit in pairs)
        results.append(
            {
                "arm": name,
                "ratio": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
                "images_per_cpu_second": statistics.median(ours for ours, _ in pairs),
                "limit_images_per_cpu_second": statistics.median(limit for _, limit in pairs),
                "repetitions": len(ratios),
                "at_least": FLOORS[name],
            }
        )
    return results


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--rows", type=int, default=25_600, help="grey images a repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="IDX files; noise of that size without it")
    parser.add_argument("--arms", nargs="*", choices=list(FLOORS), default=list(FLOORS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as every run does
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arms = grey_arms(folder / "grey", options.rows, options.fashion_mnist)
        arms += [quickstart_arm(folder / "quickstart")] if "quickstart" in options.arms else []
        results = measure([arm for arm in arms if arm.name in options.arms], options.repetitions)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        spread = f"{result['lowest']:.3f} to {result['highest']:.3f}"
        print(
            f"{result['arm']:<17} {result['ratio']:.3f} ({spread}) of the limit, at least {result['at_least']}; "
            f"{result['images_per_cpu_second']:,.0f} of {result['limit_images_per_cpu_second']:,.0f} images per CPU-s"
        )


if __name__ == "__main__":
    main()
