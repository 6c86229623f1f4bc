"""What the engine is given to train a model: rows, examples, the objective, and who answers beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from distill import engine
from distill.averaging import as_mean_teacher, join_teachers
from distill.build import Model, input_spec
from distill.cache import TeacherCache
from distill.config import EMA, TermConfig, TrainConfig
from distill.contracts import Batch, Outputs
from distill.data.batches import Batches
from distill.data.loader import InputSpec
from distill.data.mixed import LABELLED, TRANSFER, MixedLoader, join_outputs
from distill.fitted import ORIGIN, origin
from distill.inventory import TRANSFER as TRANSFER_PART
from distill.losses.objective import Objective
from distill.losses.scales import with_own
from distill.losses.terms import (
    classifiers,
    compares_keys,
    counts_classes,
    labelled_alone,
    needs_teacher,
    stores_rows,
    tap_paths,
)
from distill.multimodal import evaluating
from distill.other_teachers import Teachers, cache_parts, modalities_read, own_taps
from distill.progress import progress
from distill.runs import seed_everything
from distill.tapped import Tapped
from distill.workspace import STUDENT, TEACHER, Workspace
from distill.writing import as_told

SCALE = "own_scale"
"""In the info of the stage ``teacher``: the scale and bias that it was trained with."""


def teachers_of(work: Workspace) -> Teachers:
    """All that the student learns from."""
    return Teachers(work.recipe, work.encoders, work.tasks(), work.teacher())


def cache_key(work: Workspace) -> dict[str, Any]:
    """What the cached outputs depend on, part by part."""
    recipe, done = work.recipe, work.done
    return {
        "teacher": done["teacher"].fingerprint,
        "data": done["data"].fingerprint,
        "transfer": done["transfer"].fingerprint,
        "augmentation": recipe.data.augment.model_dump(),
        "seed": recipe.seed,
        "outputs": own_taps(recipe),
        **cache_parts(recipe),
    }


def distillation(
    work: Workspace, folder: Path, model: Model, train: TrainConfig, objective: list[TermConfig] | None = None
) -> engine.Job:
    """Training with the student's objective, or another one, from the cache or from the live teacher."""
    recipe = work.recipe
    terms = with_own(objective or recipe.student.objective, work.done[TEACHER].info[SCALE])
    specs = {STUDENT: input_spec(model)}
    if not needs_teacher(terms):
        loader = as_told(work, work.train_loader(specs, train, labelled=labelled_alone(terms)))
        return make_job(work, folder, model, loader, STUDENT, train, terms)
    if recipe.cache.enabled:
        stored = _cached(work)
        loader = _mixed(work, specs, train, terms)
        job = make_job(work, folder, model, loader, STUDENT, train, terms, lambda b: stored([b])[0])
        return replace(job, stored=stored)
    teachers = teachers_of(work)
    loader = _mixed(work, specs | teachers.specs, train, terms, teachers.own)
    return make_job(work, folder, model, loader, STUDENT, train, terms, _live(work, teachers))


def _mixed(
    work: Workspace,
    specs: dict[str, InputSpec],
    train: TrainConfig,
    terms: list[TermConfig],
    teacher: Model | None = None,
) -> Batches:
    """The training rows that terms learn from, with those of the transfer set behind them if there is one."""
    rows = work.train_loader(specs, train, labelled=labelled_alone(terms))
    loader: Batches = rows
    if teacher is not None and train.mix_images is None:  # towers have kept nothing about mixed images
        loader = work.towers(rows, teacher)
    transfer = work.transfer_loader(specs, train.batch_size)
    told = as_told(work, loader)
    return told if transfer is None else MixedLoader(told, transfer, STUDENT, specs[STUDENT].pad_id)


def _cached(work: Workspace) -> engine.Stored:
    """The teachers' stored answers."""
    cache = TeacherCache.open(work.path("cache"), cache_key(work))
    if not work.recipe.transfer.texts:
        return lambda steps: cache.lookup_each([batches[STUDENT] for batches in steps])
    transfer = TeacherCache.open(work.path("cache") / TRANSFER_PART, cache_key(work))

    def both(steps: list[dict[str, Batch]]) -> list[Outputs]:
        labelled = cache.lookup_each([batches[STUDENT + LABELLED] for batches in steps])
        return list(map(join_outputs, labelled, transfer.lookup_each([b[STUDENT + TRANSFER] for b in steps])))

    return both


def _live(work: Workspace, teachers: Teachers) -> engine.Teacher:
    """The teachers themselves."""
    if not work.recipe.transfer.texts:
        return teachers
    return lambda batches: join_outputs(teachers(batches, LABELLED), teachers(batches, TRANSFER))


def fit_model(work: Workspace, job: engine.Job, label: str, stage: str) -> dict[str, Any]:
    """Run the engine for a model that other runs may name as a teacher."""
    model: Any = job.tapped.model
    return {**run_engine(work, job, label), ORIGIN: origin(work.recipe, work.tasks(), work.formats(), model, stage)}


def run_engine(work: Workspace, job: engine.Job, label: str) -> dict[str, Any]:
    """Run the engine once."""
    with progress(label, quiet=work.quiet) as report:
        info = engine.fit(replace(job, report=report, track=work.tracking(job.folder, job.config)))
    num_params = sum(parameter.numel() for parameter in job.tapped.model.parameters())
    return {**info, "num_params": num_params, "seed": work.recipe.seed}


def make_job(
    work: Workspace,
    folder: Path,
    model: Model,
    loader: Batches,
    reads: str,
    train: TrainConfig,
    terms: list[TermConfig],
    teacher: engine.Teacher | None = None,
) -> engine.Job:
    """What the engine is given."""
    tapped = Tapped(model, tap_paths(terms, "student"))
    first = loader.at(0, 0)
    with evaluating(model):
        student_example = tapped(first[reads])
    seed_everything(work.recipe.seed)  # projectors and parts start alike, whatever ran before in this process
    counts = work.class_counts() if counts_classes(terms) else None
    read = {**(modalities_read(work.recipe) if teacher else {}), EMA: list(model.encoders)}
    said = teacher(first) if teacher else None
    if any(EMA in term.teachers for term in terms):
        said = join_teachers(said, as_mean_teacher(student_example))
    rows, heads = work.training_rows() if stores_rows(terms) else None, work.classifiers(classifiers(terms))
    keys, seed = work.row_keys() if compares_keys(terms) else None, work.recipe.seed
    objective = Objective(
        terms, student_example, said, counts, read, seed=seed, rows=rows, classifiers=heads, row_keys=keys
    )
    validate, select = work.validator(model, reads)
    return engine.Job(tapped, objective, loader, reads, train, folder, seed, validate, teacher, select=select)
