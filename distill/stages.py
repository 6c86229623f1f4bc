"""The stages of a run: each reads the artifacts of its parents and writes its own folder.

A stage never knows which stage called it. What several stages need (the data, a rebuilt model, a loader) comes from
:class:`~distill.workspace.Workspace`, which opens the parents' artifacts.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill import checkpoint, engine
from distill.build import input_spec
from distill.builders import build_part
from distill.cache import TeacherCache
from distill.checkpoint import load_weights, save_weights
from distill.config import Recipe, TrainConfig
from distill.contracts import CLEAN_VIEW, TEST, TRAIN, VALID, Outputs, UserError
from distill.data.batches import Batches
from distill.data.loader import Loader
from distill.data.mixed import MixedLoader
from distill.data.prepare import prepare
from distill.data.transfer import replace_words, whole_words
from distill.data.vocabulary import learn_vocabulary
from distill.fitted import ORIGIN, origin
from distill.formats import TEXT
from distill.inheritance import freeze_inherited, takes_encoder
from distill.inventory import TRANSFER as TRANSFER_PART
from distill.jobs import SCALE, cache_key, distillation, fit_model, make_job, run_engine, teachers_of
from distill.losses.terms import labelled_alone
from distill.multimodal import OneModality
from distill.optimize import as_many_steps
from distill.other_teachers import Teachers
from distill.preprocess import TOKENIZER_FILE
from distill.progress import progress
from distill.recovery import recovered, recovery, step_folder
from distill.runs import read_array, read_json, write_json
from distill.tasks import reuse_classifiers, reuses
from distill.towers import Rows, WithTowers, encode_towers, frozen_towers
from distill.workspace import (
    BASELINE,
    EVALUATION_BATCH,
    PRUNED,
    STUDENT,
    TEACHER,
    TEXTS_FILE,
    WEIGHTS_FILE,
    Workspace,
    takes_tokens,
)
from distill.writing import write_captions

TOKENS_FILE = "token_ids.npy"


def prepare_data(work: Workspace, folder: Path) -> dict[str, Any]:
    """Read, check and decode the rows."""
    recipe = work.recipe
    with progress("read data", quiet=work.quiet) as report:
        return prepare(recipe.data, folder, Path.cwd(), report, seed=recipe.seed, words=recipe.learnt_words)


def pretrain(work: Workspace, folder: Path) -> dict[str, Any]:
    """Let encoders of the teacher learn alone, one after the other, by the terms of its objective on their heads.

    A frozen tower learns here too, and is kept as it is from then on.
    """
    config = work.recipe.teacher
    for modality, train in config.pretrain.items():
        place = folder / modality
        if (place / WEIGHTS_FILE).is_file() and not checkpoint.exists(place / engine.CHECKPOINT):
            continue  # ended; with its checkpoint it was killed on the way there
        place.mkdir(exist_ok=True)
        terms = [term for term in config.objective if (term.task or "").endswith(f".{modality}")]
        whole: Any = work.blank(TEACHER)
        whole.encoders[modality].thaw()
        model: Any = OneModality(whole, modality)
        loader = _teachers_rows(work, model, train, repeat=False)
        run_engine(work, make_job(work, place, model, loader, TEACHER, train, terms), f"pretrain {modality}")
    return {"learnt_alone": list(config.pretrain)}


def fit_teacher(work: Workspace, folder: Path) -> dict[str, Any]:
    """Train the teacher's free parts, on the labelled rows if its terms read labels; one without is kept as it is."""
    config = work.recipe.teacher
    model = work.pretrained_teacher()
    encoders: list[Any] = list(model.encoders.values())
    scale = next((dict(encoder.own_scale) for encoder in encoders if encoder.own_scale), {})
    if not config.objective:
        if work.ranks.first:
            save_weights(model, folder / WEIGHTS_FILE)
            (folder / "metrics.jsonl").touch()
        return {ORIGIN: origin(work.recipe, work.tasks(), work.formats(), model, TEACHER), SCALE: scale}
    loader = _teachers_rows(work, model, config.train, repeat=any(name != TEXT for name in frozen_towers(model)))
    job = make_job(work, folder, model, loader, TEACHER, config.train, config.objective)
    info = fit_model(work, job, "fit teacher", TEACHER)
    learnt = {name.partition("/")[0]: value for name, value in job.objective.learned_values().items()}
    return {**info, SCALE: scale | learnt}


def _teachers_rows(work: Workspace, model: Any, train: TrainConfig, *, repeat: bool) -> Batches:
    """Training rows that the objective can use, with names of classes behind them if the teacher is to read any."""
    spec, labelled = input_spec(model), labelled_alone(work.recipe.teacher.objective)
    loader = work.towers(work.train_loader({TEACHER: spec}, train, repeat=repeat, labelled=labelled), model)
    names = work.class_names_loader({TEACHER: spec}, train.batch_size) if spec.tokenizer else None
    return loader if names is None else MixedLoader(loader, work.towers(names, model), TEACHER, spec.pad_id)


def keep_towers(work: Workspace, folder: Path) -> dict[str, Any]:
    """Encode each distinct input of the teacher's frozen towers: of rows, of their training views and of class names.

    Beside a frozen tower of another modality than text the teacher's fit reads the K views of the cache, each of which
    is encoded. Beside a frozen text tower alone it reads new views in each epoch, and texts that repeat after
    ``augment.text.views``.
    """
    recipe = work.recipe
    model = work.pretrained_teacher().eval()
    frozen = frozen_towers(model)
    if not frozen:
        return {}
    spec = input_spec(model).only([TEXT, *frozen])
    clean = [Rows(work.clean_loader(split, spec, TEACHER), CLEAN_VIEW) for split in (TRAIN, VALID, TEST)]
    augmented = work.train_loader({TEACHER: spec}, recipe.teacher.train)
    views = tower_views(recipe) if augmented.augment else {}
    sources = {name: [*clean, *(Rows(augmented, view) for view in range(views.get(name, 0)))] for name in frozen}
    names = work.class_names_loader({TEACHER: spec}, EVALUATION_BATCH)
    if names is not None and TEXT in frozen:
        sources[TEXT].append(Rows(names, CLEAN_VIEW))
    key = {"towers": work.done["towers"].fingerprint}
    with progress("encode frozen towers", quiet=work.quiet) as report:
        return encode_towers(model, sources, folder, reads=TEACHER, key=key, report=report, ranks=work.ranks)


def tower_views(recipe: Recipe) -> dict[str, int]:
    """Modality -> number of training views, from 0 on, that a frozen tower is asked for."""
    fresh = max(recipe.cache.views, recipe.teacher.train.epochs)
    views = dict.fromkeys(recipe.data.modalities, recipe.cache.views)
    return {**views, TEXT: recipe.data.augment.text.views or fresh}


def make_transfer(work: Workspace, folder: Path) -> dict[str, Any]:
    """Make the texts without labels that the student learns from, with words of the teacher's vocabulary."""
    recipe, data = work.recipe, work.data()
    if not recipe.transfer.texts:
        return {}
    known = list(dict.fromkeys(text for row in data.rows(TRAIN) if (text := data.texts[row])))
    if not known:
        raise UserError(f"transfer.texts is {recipe.transfer.texts}, and no training row has a text; set it to 0")
    words = whole_words(work.teachers_tokenizer())
    count, probability = recipe.transfer.texts, recipe.transfer.replace
    texts = replace_words(known, words, count, probability=probability, seed=recipe.seed)
    write_json(folder / TEXTS_FILE, sorted(texts, key=len))  # the teacher reads them in this order: little padding
    return {"texts": len(texts), "from": len(known), "words": len(words)}


def fill_cache(work: Workspace, folder: Path) -> dict[str, Any]:
    """Store the teachers' outputs for every training row and view, and for the transfer set, unless they run live."""
    recipe = work.recipe
    written = write_captions(work, folder)
    if not recipe.cache.enabled:
        return written
    teachers = teachers_of(work)
    loader = work.train_loader(teachers.specs, recipe.student.train)
    views = sorted({loader.view(epoch) for epoch in range(recipe.cache.views)})  # the clean one if nothing augments
    info = _fill(work, folder, teachers, work.towers(loader, teachers.own), views, "fill teacher cache")
    transfer = work.transfer_loader(teachers.specs, EVALUATION_BATCH)
    if transfer is not None:
        label = "ask teacher about the transfer set"
        extra = _fill(work, folder / TRANSFER_PART, teachers, transfer, [CLEAN_VIEW], label)
        info |= {f"transfer_{name}": extra[name] for name in ("rows", "bytes", "seconds")}
    return info | written


def _fill(
    work: Workspace, folder: Path, teachers: Teachers, loader: Loader | WithTowers, views: list[int], label: str
) -> dict[str, Any]:
    ids, ranks = loader.data.ids[loader.row_positions], work.ranks

    def produce(wanted: np.ndarray, view: int) -> Outputs:
        rows = loader.row_positions[np.searchsorted(ids, wanted)]
        batches = loader.batch(rows, torch.full((len(rows),), view))
        return teachers({name: batch.to(ranks.device) for name, batch in batches.items()})

    with progress(label, quiet=work.quiet) as report:
        TeacherCache.fill(
            folder,
            rows=ids,
            views=views,
            produce=produce,
            key=cache_key(work),
            dtype=work.recipe.cache.dtype,
            batch_size=EVALUATION_BATCH,
            rank=ranks.rank,
            world_size=ranks.count,
            progress=report,
        )
    ranks.wait()
    cache = TeacherCache.open(folder, cache_key(work))
    fields = ("rows", "views", "bytes", "bytes_per_row", "seconds")
    return {**{name: cache.info[name] for name in fields}, "lowest_cosine": cache.check(produce)}


def cut_vocabulary(work: Workspace, folder: Path) -> dict[str, Any]:
    """Cut the teacher's vocabulary, or that which was learnt, to the student's size; beside BPE, learn the words."""
    config, data = work.recipe.student, work.data()
    if not work.takers(config):
        return {}
    part = config.encoders[TEXT]
    builder: Any = work.encoders[part.type]
    texts = [data.texts[row] for row in data.rows(TRAIN)]
    whole, size = work.teachers_tokenizer(), int(part.params["vocab_size"])
    if work.recipe.learnt_words is not None:  # of few texts there are fewer words than asked for
        size = min(size, len(read_json(whole)["model"]["vocab"]))
    if read_json(whole)["model"]["type"] != "WordPiece" and TEXT not in config.inherit:
        return {"vocab_size": learn_vocabulary(texts, size, folder / TOKENIZER_FILE)}
    ids = builder.reduce_vocabulary(whole, texts, size, folder / TOKENIZER_FILE)
    np.save(folder / TOKENS_FILE, ids, allow_pickle=False)
    return {"vocab_size": len(ids)}


def inherit(work: Workspace, folder: Path) -> dict[str, Any]:
    """Make the student as it is before training, with what its encoders and heads inherit."""
    config = work.recipe.student
    if work.takers(config):
        shutil.copyfile(work.path("vocabulary") / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    model = work.blank(STUDENT)
    teacher: Any = work.teacher() if config.inherit or reuses(work.recipe) else None
    reuse_classifiers(model, teacher)
    for name, part in config.inherit.items():
        given: dict[str, Any] = {"student": model.encoders[name]}
        if takes_encoder(work.inheritances[part.type]):
            given["encoder"] = teacher.encoders[name]
        if takes_tokens(work.inheritances[part.type]):
            token_ids = read_array(work.path("vocabulary") / TOKENS_FILE)
            given |= {"project": partial(teacher.project, name), "token_ids": token_ids}
        build_part(work.inheritances, part, f"student.inherit.{name}", **given)
    save_weights(model, folder / WEIGHTS_FILE)
    return {"inherited": list(config.inherit)}


def train_baseline(work: Workspace, folder: Path) -> dict[str, Any]:
    """Train the student on the labels, for as many steps, without teacher and without inheritance.

    Where a student learns from unlabelled rows too, the labelled ones repeat, with new views each time: the few that a
    cache has would be read very often.
    """
    config = work.recipe.student
    model, data = work.blank(BASELINE), work.data()
    theirs, ours = labelled_alone(config.objective), labelled_alone(config.baseline)
    read, learnt = (
        -(-len(data.rows(TRAIN, labelled=labelled)) // config.train.batch_size) for labelled in (theirs, ours)
    )
    specs = {STUDENT: input_spec(model)}
    loader = work.train_loader(specs, config.train, repeat=read == learnt, labelled=ours)
    train = as_many_steps(config.train, read, learnt)
    job = make_job(work, folder, model, loader, STUDENT, train, config.baseline)
    return fit_model(work, job, "train baseline", BASELINE)


def distil_student(work: Workspace, folder: Path) -> dict[str, Any]:
    """Train the student from labels and teacher, from what it inherited on."""
    return fit_model(work, student_job(work, folder), "distil student", STUDENT)


def student_job(work: Workspace, folder: Path) -> engine.Job:
    """What the engine is given to distil the student."""
    model = work.blank(STUDENT)
    load_weights(model, work.path("inherit") / WEIGHTS_FILE)
    freeze_inherited(work, model)
    return distillation(work, folder, model, work.recipe.student.train)


def prune_student(work: Workspace, folder: Path) -> dict[str, Any]:
    """Prune the student and recover by distillation, in as many steps as asked for."""
    steps = work.recipe.prune.steps
    for step in range(1, steps):
        place = step_folder(folder, step, steps)
        if not recovered(place):
            place.mkdir(exist_ok=True)
            run_engine(work, recovery(work, folder, step), f"recover pruned, step {step} of {steps}")
    return fit_model(work, recovery(work, folder, steps), "recover pruned", PRUNED)
