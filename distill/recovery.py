"""Pruning the student in steps, each of which is recovered from by distillation before the next one."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from distill import checkpoint, engine, prune
from distill.build import Model, example_batch, input_spec
from distill.checkpoint import load_weights
from distill.config import PruneConfig, TrainConfig
from distill.contracts import TRAIN, Batch, Outputs
from distill.data.loader import Loader
from distill.inheritance import freeze_inherited
from distill.jobs import distillation, make_job
from distill.losses.terms import LOSSES, labelled_alone
from distill.prune.saliency import FROM_DATA, Loss
from distill.vocabulary import cut_vocabulary
from distill.workspace import PLAN_FILE, STUDENT, WEIGHTS_FILE, Workspace

ROWS = 32  # of a batch whose gradient is taken


def recovered(place: Path) -> bool:
    """Whether a step has ended there; with its checkpoint it was killed on the way."""
    return (place / WEIGHTS_FILE).is_file() and not checkpoint.exists(place / engine.CHECKPOINT)


def step_folder(folder: Path, step: int, steps: int) -> Path:
    """Where a step, from 1 on, lies: the last one is the stage's result."""
    return folder if step == steps else folder / f"step-{step}"


def recovery(work: Workspace, folder: Path, step: int) -> engine.Job:
    """Prune by a step, from 1 on, what the step before has left; return what the engine is given to recover it.

    The first rank decides; a plan that is there already stays. Plans start from the unpruned student.
    """
    config = work.recipe.prune
    place = step_folder(folder, step, config.steps)
    model, before = _left_by(work, folder, step - 1)
    if work.ranks.first and not (place / PLAN_FILE).is_file():
        example = example_batch(input_spec(model), work.recipe.data, tasks=work.tasks())
        rows, loss = _evidence(work, place, model)
        options: dict[str, Any] = {"rows": rows, "loss": loss, "seed": work.recipe.seed, "before": before}
        found = prune.plan(model, example, so_far(config, step), **options)
        if step == config.steps and config.vocabulary is not None:
            cut: Any = prune.apply(copy.deepcopy(model), found.since(before))
            found = cut_vocabulary(work, cut, found)
        found.save(place / PLAN_FILE)
    work.ranks.wait()
    made = prune.PrunePlan.load(place / PLAN_FILE)
    smaller: Any = prune.apply(_left_by(work, folder, step - 1)[0], made.since(before))
    freeze_inherited(work, smaller)
    return distillation(work, place, smaller, share_of(config.train, step, config.steps))


def so_far(config: PruneConfig, step: int) -> PruneConfig:
    """Return what is to be gone after a step, from 1 on; dimensions of heads and rare tokens go in the last one."""
    share = step / config.steps
    changes: dict[str, Any] = {
        "ratio": config.ratio * share,
        "heads": config.heads * share,
        "head_dims": config.head_dims if step == config.steps else 0.0,
        "depth": {path: round(count * share) for path, count in config.depth.items()},
        "ratios": {prefix: ratio * share for prefix, ratio in config.ratios.items()},
    }
    return config.model_copy(update=changes)


def share_of(train: TrainConfig, step: int, steps: int) -> TrainConfig:
    """Return a step's part of a budget; parts differ by one epoch at most, and add up to the whole."""
    changes: dict[str, Any] = {"epochs": train.epochs * step // steps - train.epochs * (step - 1) // steps}
    if train.max_steps is not None:
        changes["max_steps"] = train.max_steps * step // steps - train.max_steps * (step - 1) // steps
    if train.max_minutes is not None:
        changes["max_minutes"] = train.max_minutes / steps
    return train.model_copy(update=changes)


def _left_by(work: Workspace, folder: Path, step: int) -> tuple[Model, prune.PrunePlan]:
    """The student as a step has left it, and the plan of all steps to there; step 0 is the whole one."""
    if step == 0:
        return work.model(STUDENT), prune.PrunePlan()
    place = step_folder(folder, step, work.recipe.prune.steps)
    made = prune.PrunePlan.load(place / PLAN_FILE)
    model: Any = prune.apply(work.blank(STUDENT), made)
    load_weights(model, place / WEIGHTS_FILE)
    return model.eval(), made


def _evidence(work: Workspace, place: Path, model: Model) -> tuple[list[Batch], Loss | None]:
    """Clean training rows in batches, if the pruning reads any, and the loss of the terms without a teacher on them.

    Where terms take a row by itself, "hessian" gets batches of one.
    """
    config, terms = work.recipe.prune, work.recipe.student.baseline
    if config.importance not in FROM_DATA and not config.depth and not config.sensitivity:
        return [], None
    alone = config.importance == "hessian" and not any(LOSSES[term.loss].relational for term in terms)
    size = 1 if alone else min(ROWS, config.rows)
    specs, labelled = {STUDENT: input_spec(model)}, labelled_alone(terms)
    options: dict[str, Any] = {"batch_size": size, "seed": work.recipe.seed, "augment": None, "shuffle": True}
    loader = Loader(work.data(), TRAIN, specs, labelled=labelled, **options)
    count = min(len(loader), math.ceil(config.rows / size))
    rows = [loader.at(0, number)[STUDENT] for number in range(count)]
    if config.importance not in FROM_DATA:
        return rows, None
    objective = make_job(work, place, model, loader, STUDENT, config.train, terms).objective
    objective.advance(1, 1)  # schedules are at their end

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        return objective(outputs, None, batch)[0]

    return rows, loss
