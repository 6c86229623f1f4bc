"""The one training loop: teacher fitting, baseline, distillation and recovery all run through :func:`fit`.

The order of rows is f(seed, epoch) with an integer cursor, and a checkpoint holds everything else that the next
step reads, so a run that is stopped and started again gives the weights of one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor, nn

from distill import checkpoint
from distill.averaging import Average, MeanTeacher, kept_state, load_state, statistics, trained_state
from distill.balance import Balance
from distill.config import TrainConfig
from distill.contracts import Batch, Outputs, UserError
from distill.data.batches import Batches, made_and_finished
from distill.interrupts import InterruptedRunError, noted_signals
from distill.losses.objective import Objective
from distill.optimize import build_optimizer, image_size, lr_factor
from distill.progress import Progress, silent
from distill.ranks import Ranks, accelerator_for, join
from distill.rounding import attach_again
from distill.sharding import split, whole
from distill.step import Stepper
from distill.tapped import Tapped
from distill.trackers import EVERY, Tracking, untracked
from distill.trainee import Trainee, Watch

CHECKPOINT = "checkpoint"
Teacher = Callable[[dict[str, Batch]], Outputs]
Stored = Callable[[list[dict[str, Batch]]], list[Outputs]]
Step = tuple[dict[str, Batch], Teacher | None]
Item = TypeVar("Item")


@dataclass
class Job:
    """One training run.

    Attributes:
        tapped: what is trained, with the taps that the objective reads.
        objective: the terms.
        loader: training batches; its ``reads`` entry is the model's.
        reads: name of the model's batch in the loader.
        config: the budget.
        folder: where weights, metrics and checkpoints go.
        seed: of dropout and the like; the order of rows is the loader's.
        teacher: all batches of a step -> teacher outputs, cached or live; None without a teacher.
        stored: the same for several steps at once, from a store: asked instead while batches are made ahead.
        validate: model -> metrics, among them that of ``select``.
        select: the metric by which the best epoch is chosen.
        report: progress in steps.
        watch: gives a context for each named part of a step, to take its time.
        track: gives what is told of steps and epochs.
    """

    tapped: Tapped
    objective: Objective
    loader: Batches
    reads: str
    config: TrainConfig
    folder: Path
    seed: int
    validate: Callable[[nn.Module], dict[str, float]]
    teacher: Teacher | None = None
    stored: Stored | None = None
    select: str = "valid/accuracy"
    report: Progress = silent
    watch: Watch = nullcontext
    track: Tracking = untracked


@dataclass(frozen=True)
class Parts:
    """What a run changes, and every rank's share of which a checkpoint holds."""

    trainee: Trainee
    optimizer: torch.optim.Optimizer
    average: Average | None
    scaler: Any  # of fp16's gradients, or None
    ranks: Ranks


@dataclass
class State:
    """Where a run is: saved in every checkpoint."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already trained on
    step: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    improved: int = 0  # the epoch from which patience counts: the last one that was truly better
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's values, weighted by rows
    rows: dict[str, int] = field(default_factory=dict)  # of the steps that have each value
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def fit(job: Job) -> dict[str, Any]:
    """Train, validate, keep the best or the last weights; go on from a checkpoint in the job's folder if there is one.

    Writes ``model.safetensors`` (the weights that ``keep`` names, whole model) and ``metrics.jsonl`` (a line an epoch).
    Every rank calls it with its own slices of the batches; the first one writes.

    Returns:
        ``epochs``, ``steps``, ``best_epoch``, ``kept_epoch``, ``best`` (the selection metric), ``seconds``.

    Raises:
        TrainingError: the loss or its gradient is not finite (the rows are written to ``not_finite.json``, weights are
            unchanged), gradients stay beyond what fp16 holds, or the memory does not suffice.
        InterruptedRunError: SIGINT or SIGTERM arrived; the state was saved.
        UserError: the device cannot compute in the precision asked for.
    """
    config, folder, ranks = job.config, job.folder, join()
    accelerator = accelerator_for(config.precision)
    torch.manual_seed(job.seed + ranks.rank)  # dropout differs from rank to rank
    trainee = _trainee(job, ranks, accelerator.device)
    optimizer = build_optimizer(trainee, config)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    average = Average(trainee, config.ema) if config.ema else None
    parts = Parts(trainee, optimizer, average, accelerator.scaler, ranks)
    kept: dict[str, Tensor] = {}
    state = State()
    place = folder / CHECKPOINT
    if checkpoint.exists(place):
        state, kept = _restore(place, parts)
    elif config.not_finite == "rollback":
        _save(place, parts, state, kept)
    step = Stepper(accelerator, ranks, trainee, optimizer, config, folder, _own_teacher(job, average))
    per_epoch = len(job.loader)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    saved = time.monotonic()
    ended = state.step >= total or _out_of_time(state, config, ranks, accelerator.device)

    def save_if_asked() -> None:
        nonlocal saved
        due = time.monotonic() - saved > 60 * config.checkpoint_minutes
        signum, due_somewhere = ranks.largest([received[0] if received else 0, due], accelerator.device)
        if signum or due_somewhere:
            with job.watch("checkpoint"):
                _save(place, parts, state, kept)
            saved = time.monotonic()
        if signum:
            raise InterruptedRunError(signum, folder)

    with job.track(state.step) as tell, noted_signals() as received:  # what is noted must still be asked for
        while state.epoch < config.epochs and not ended and not _out_of_patience(job, state):
            trainee.train()
            began = time.monotonic()
            for batches, ask in _watched(_asked(job, state.epoch, start=state.batch), job.watch):
                factor = lr_factor(state.step, total, config)
                for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
                    group["lr"] = lr * factor
                trainee.image_size = image_size(state.step, total, config)
                trainee.advance(state.step, total)
                rows, values = step(batches, job.reads, ask)
                if average and values:
                    average.update(state.step)
                elif not values and config.not_finite == "rollback":
                    _restore(place, parts)
                for name, value in values.items():
                    state.sums[name] = state.sums.get(name, 0.0) + value * rows
                    state.rows[name] = state.rows.get(name, 0) + rows
                state.step, state.batch = state.step + 1, state.batch + 1
                state.seconds += time.monotonic() - began
                if values and state.step % EVERY == 0:
                    objective = trainee.objective
                    told = {"lr": factor * config.lr, **objective.moving(), **objective.learned_values(), **values}
                    tell(state.step, {f"step/{name}": value for name, value in told.items()})
                job.report(state.step, total, _note(state))
                ended = state.step >= total or _out_of_time(state, config, ranks, accelerator.device)
                if ended:
                    break
                if state.batch < per_epoch:  # behind the last one, what validation finds belongs into the checkpoint
                    save_if_asked()
                began = time.monotonic()
            ranks.average(statistics(trainee))
            if average:
                ranks.average(average.statistics)
            kept = _end_epoch(job, trainee, average, state, kept, last=ended, lr=factor * config.lr)
            tell(state.step, state.history[-1])
            save_if_asked()
    load_state(trainee, kept)
    weights = whole(trainee.model.state_dict(), keep=ranks.first)
    if ranks.first:
        checkpoint.save_weights(weights, folder / "model.safetensors")
        _write_metrics(folder, state)
        checkpoint.remove(place)
    ranks.wait()
    return {
        "epochs": state.epoch,
        "steps": state.step,
        "best_epoch": state.best_epoch,
        "kept_epoch": state.epoch if config.keep == "last" or state.best_epoch < 0 else state.best_epoch,
        "best": state.best,
        "seconds": round(state.seconds, 3),
    }


def _trainee(job: Job, ranks: Ranks, device: torch.device) -> Trainee:
    """What is trained, on the device, or this rank's part of it."""
    config = job.config
    trainee = Trainee(job.tapped, job.objective, job.watch, compiled=config.compile, channels_last=config.channels_last)
    if ranks.count > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(trainee.model)  # a part may have no rows on some ranks
        attach_again(trainee.model)
    if config.shard:
        trainee.shard(ranks)
    if config.balance:
        model: Any = job.tapped.model
        trainee.balance = Balance(model, job.objective.terms, config.balance, job.seed)
    return trainee.to(device)


def _own_teacher(job: Job, average: Average | None) -> MeanTeacher | None:
    """The average as a teacher, where the objective reads it."""
    if not job.objective.reads_average:
        return None
    if average is None or job.config.shard:
        raise UserError("a term reads the teacher 'ema', which needs train.ema, and weights that are not split")
    return MeanTeacher(job.tapped, average)


def _end_epoch(
    job: Job,
    trainee: Trainee,
    average: Average | None,
    state: State,
    kept: dict[str, Tensor],
    *,
    last: bool,
    lr: float,
) -> dict[str, Tensor]:
    """Log the epoch, validate when due, and return the weights to keep."""
    entry = {"epoch": state.epoch + 1, "step": state.step, "lr": lr}
    entry |= {f"train/{name}": total / max(1, state.rows[name]) for name, total in state.sums.items()}
    entry |= {f"train/{name}": value for name, value in trainee.objective.moving().items()}
    state.epoch, state.batch, state.sums, state.rows = state.epoch + 1, 0, {}, {}
    if last or state.epoch == job.config.epochs or state.epoch % job.config.validate_every == 0:
        with average.applied(trainee) if average else _unchanged():
            entry |= job.validate(trainee.model)
            better = entry[job.select] >= state.best
            if entry[job.select] > state.best:
                state.improved = state.epoch
            if better:
                state.best, state.best_epoch = entry[job.select], state.epoch
            if better or job.config.keep == "last":
                kept = {name: value.detach().clone() for name, value in kept_state(trainee).items()}
    state.history.append(entry)
    if join().first:
        _write_metrics(job.folder, state)
    return kept


def _asked(job: Job, epoch: int, start: int) -> Iterator[Step]:
    """The batches of an epoch, each with the teacher to ask; stored answers are ready by then."""

    def answered(made: list[dict[str, Batch]]) -> list[Step]:
        if job.stored is None:
            return [(batches, job.teacher) for batches in made]
        own = [{job.reads: batches[job.reads]} for batches in made]  # nobody reads the others any more
        return [(batches, partial(_placed, answer)) for batches, answer in zip(own, job.stored(made), strict=True)]

    return made_and_finished(partial(job.loader.at, epoch), answered, range(start, len(job.loader)), job.loader.workers)


def _placed(answer: Outputs, batches: dict[str, Batch]) -> Outputs:
    """An answer on the device of the batches."""
    return answer.to(next(iter(batches.values())).ids.device)


def _watched(items: Iterator[Item], watch: Watch) -> Iterator[Item]:
    """The same items, with the time that each is waited for."""
    while True:
        with watch("data"):
            found = next(items, None)
        if found is None:
            return
        yield found


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


def _out_of_patience(job: Job, state: State) -> bool:
    """Whether the last epoch was validated, and none for long enough was better than those before it."""
    if job.config.patience is None or not state.history or job.select not in state.history[-1]:
        return False
    return state.epoch - state.improved >= job.config.patience


def _out_of_time(state: State, config: TrainConfig, ranks: Ranks, device: torch.device) -> bool:
    if config.max_minutes is None:
        return False
    return bool(ranks.largest([state.seconds >= 60 * config.max_minutes], device)[0])


def _note(state: State) -> str:
    shown = [f"loss {state.sums['loss'] / state.rows['loss']:.3f}"] if state.rows else []
    if state.best_epoch >= 0:
        shown.append(f"best valid {state.best:.1%}")
    return " ".join(shown)


def _write_metrics(folder: Path, state: State) -> None:
    finite = [{name: v if math.isfinite(v) else None for name, v in entry.items()} for entry in state.history]
    lines = "".join(json.dumps(entry) + "\n" for entry in finite)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")


def _save(folder: Path, parts: Parts, state: State, kept: dict[str, Tensor]) -> None:
    """Write a checkpoint; the first rank does, with what each rank has of its own."""
    trainee, average, ranks = parts.trainee, parts.average, parts.ranks
    own = ranks.gather_bytes(serialize(_own_state(trainee, average, ranks)), _device(trainee))
    tensors, packed = checkpoint.pack_optimizer(parts.optimizer)
    everything = {
        "trainee": trained_state(trainee),
        "optimizer": tensors,
        "kept": kept,
        "average": average.values if average else {},
    }
    groups = {name: whole(tensors, keep=ranks.first) for name, tensors in everything.items()}
    if ranks.first:
        groups |= {f"rng.{rank}": deserialize(data) for rank, data in enumerate(own)}
        scaler = parts.scaler.state_dict() if parts.scaler else {}
        checkpoint.save(folder, groups, {"state": vars(state), "optimizer": packed, "scaler": scaler})
    ranks.wait()


def _restore(folder: Path, parts: Parts) -> tuple[State, dict[str, Tensor]]:
    trainee, average = parts.trainee, parts.average
    groups, content = checkpoint.load(folder)
    present = trained_state(trainee)
    shapes = {name: value.shape for name, value in present.items()}
    if shapes != {name: value.shape for name, value in groups["trainee"].items()}:
        raise UserError(f"{folder}: the checkpoint is of another model; delete it to start over")
    load_state(trainee, groups["trainee"])
    checkpoint.unpack_optimizer(parts.optimizer, groups["optimizer"], content["optimizer"])
    kept = {name: split(value, present[name]).to(_device(trainee)) for name, value in groups["kept"].items()}
    if average:
        average.restore(groups["average"])
    if parts.scaler and content.get("scaler"):
        parts.scaler.load_state_dict(content["scaler"])
    own = groups.get(f"rng.{parts.ranks.rank}")  # a run may go on with more ranks than it began with
    if own is not None:
        checkpoint.restore_rng(own)
        for name, value in _own_statistics(trainee, average, parts.ranks).items():
            if name in own:
                value.copy_(own[name])
    return State(**content["state"]), kept


def _own_state(trainee: Trainee, average: Average | None, ranks: Ranks) -> dict[str, Tensor]:
    """What differs from rank to rank within an epoch."""
    own = {name: value.cpu() for name, value in _own_statistics(trainee, average, ranks).items()}
    return checkpoint.rng_state() | own


def _own_statistics(trainee: Trainee, average: Average | None, ranks: Ranks) -> dict[str, Tensor]:
    """Statistics of BatchNorm, which are of a rank's own rows until an epoch ends."""
    if ranks.count == 1:
        return {}
    found = [*statistics(trainee), *(average.statistics if average else ())]
    return {f"statistic.{number}": value for number, value in enumerate(found)}


def _device(trainee: Trainee) -> torch.device:
    return next(trainee.parameters()).device
