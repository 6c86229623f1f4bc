"""The one training loop: teacher fitting, baseline, distillation and recovery all run through :func:`fit`.

The order of rows is f(seed, epoch) with an integer cursor, and a checkpoint holds everything else that the next
step reads, so a run that is stopped and started again gives the weights of one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill import checkpoint
from distill.config import TrainConfig
from distill.contracts import Batch, Outputs
from distill.losses.objective import Objective
from distill.multimodal import Tapped
from distill.progress import Progress, silent
from distill.runs import write_json

SELECT = "valid/accuracy"
Teacher = Callable[[dict[str, Batch]], Outputs]


class Batches(Protocol):
    """A loader: the batches of an epoch, from any of them on."""

    def __len__(self) -> int:
        """Return the number of batches an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Batch]]:
        """Yield the batches of an epoch, by name of the model that reads them."""


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


class InterruptedRunError(RuntimeError):
    """A signal asked the run to stop; its state was saved.

    Attributes:
        exit_code: 128 + the signal's number.
    """

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; state saved in {folder}, run again to go on")
        self.exit_code = 128 + signum


class Trainee(nn.Module):
    """The trained model and its objective as one module, so that every rank's gradients are averaged once."""

    def __init__(self, tapped: Tapped, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = tapped.model, objective
        self._tapped = tapped

    def forward(self, batch: Batch, teacher: Outputs | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and each term's value."""
        return self.objective(self._tapped(batch), teacher, batch)


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
        validate: model -> metrics, among them ``valid/accuracy``, by which the best weights are chosen.
        report: progress in steps.
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
    report: Progress = silent


@dataclass
class State:
    """Where a run is: saved in every checkpoint."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already trained on
    step: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's terms, weighted by rows
    rows: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def lr_factor(step: int, total: int, config: TrainConfig) -> float:
    """Factor on the learning rate at a step: linear warm-up, then the schedule.

    Args:
        step: 0-based.
        total: number of steps of the whole run.
        config: names the schedule: "constant", "cosine" (to 0; Loshchilov & Hutter 2017, arXiv 1608.03983) or
            "onecycle" (cosine up over 30 %, then down to 0; Smith & Topin 2018, arXiv 1708.07120).

    Returns:
        A factor in [0, 1].
    """
    warmup = 0.3 * total if config.schedule == "onecycle" else config.warmup * total
    if step < warmup:
        done = (step + 1) / (warmup + 1)
        return 0.5 - 0.5 * math.cos(math.pi * done) if config.schedule == "onecycle" else done
    if config.schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1.0, total - warmup))


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Freeze what ``lr_scale`` sets to 0 and group the rest by learning rate and decay.

    Biases, norms and other one-dimensional parameters are not decayed. A parameter takes the factor of the longest
    prefix that names it, with or without the leading ``model.``.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        path = name.removeprefix("model.")
        fitting = [prefix for prefix in config.lr_scale if path == prefix or path.startswith(f"{prefix}.")]
        scale = config.lr_scale[max(fitting, key=len)] if fitting else 1.0
        if scale == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    options = [
        {"params": parameters, "lr": config.lr * scale, "weight_decay": config.weight_decay if decayed else 0.0}
        for (scale, decayed), parameters in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(options, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(options, lr=config.lr)


def fit(job: Job) -> dict[str, Any]:
    """Train, validate, keep the best weights; go on from a checkpoint in the job's folder if there is one.

    Writes ``model.safetensors`` (the best weights, whole model) and ``metrics.jsonl`` (a line an epoch).

    Returns:
        ``epochs``, ``steps``, ``best_epoch``, ``best`` (the selection metric), ``seconds``.

    Raises:
        TrainingError: the loss is not finite; the rows are written to ``not_finite.json`` and weights are unchanged.
        InterruptedRunError: SIGINT or SIGTERM arrived; the state was saved.
    """
    config, folder = job.config, job.folder
    accelerator = Accelerator(mixed_precision=config.precision)
    torch.manual_seed(job.seed)
    trainee = Trainee(job.tapped, job.objective)
    optimizer = build_optimizer(trainee, config)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    average = Average(trainee, config.ema) if config.ema else None
    best: dict[str, Tensor] = {}
    state = State()
    if checkpoint.exists(folder / "checkpoint"):
        state, best = _restore(folder / "checkpoint", trainee, optimizer, average)
    prepared, optimizer = accelerator.prepare(trainee, optimizer)
    per_epoch = len(job.loader)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    saved = time.monotonic()

    with _signals() as received:
        while state.epoch < config.epochs and state.step < total and not _out_of_patience(state, config):
            prepared.train()
            for batches in job.loader.epoch(state.epoch, start=state.batch):
                began = time.monotonic()
                factor = lr_factor(state.step, total, config)
                for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
                    group["lr"] = lr * factor
                values = _step(accelerator, prepared, optimizer, job, batches)
                if average:
                    average.update(trainee, state.step)
                rows = len(batches[job.reads].ids)
                for name, value in values.items():
                    state.sums[name] = state.sums.get(name, 0.0) + value * rows
                state.rows += rows
                state.step, state.batch = state.step + 1, state.batch + 1
                state.seconds += time.monotonic() - began
                job.report(state.step, total, _note(state))
                due = time.monotonic() - saved > 60 * config.checkpoint_minutes
                if received or due:
                    if accelerator.is_main_process:
                        _save(folder / "checkpoint", trainee, optimizer, average, state, best)
                    saved = time.monotonic()
                if received:
                    raise InterruptedRunError(received[0], folder)
                if state.step >= total:
                    break
            best = _end_epoch(job, trainee, average, state, best, last=state.step >= total, lr=factor * config.lr)
    load_state(trainee, best)
    if accelerator.is_main_process:
        checkpoint.save_weights(trainee.model, folder / "model.safetensors")
        _write_metrics(folder, state)
        checkpoint.remove(folder / "checkpoint")
    return {
        "epochs": state.epoch,
        "steps": state.step,
        "best_epoch": state.best_epoch,
        "best": state.best,
        "seconds": round(state.seconds, 3),
    }


def _step(
    accelerator: Accelerator,
    trainee: nn.Module,
    optimizer: torch.optim.Optimizer,
    job: Job,
    batches: dict[str, Batch],
) -> dict[str, float]:
    """One optimizer step on one global batch, in micro-batches if asked; returns each term's value."""
    batches = {name: to_device(batch, accelerator.device) for name, batch in batches.items()}
    teacher = job.teacher(batches) if job.teacher else None
    batch = batches[job.reads]
    count = min(job.config.accumulate, len(batch.ids))
    logged: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    for rows in torch.arange(len(batch.ids), device=batch.ids.device).tensor_split(count):
        part = batch if count == 1 else take(batch, rows)
        part_teacher = teacher if count == 1 or teacher is None else take(teacher, rows)
        share = len(rows) / len(batch.ids)
        with accelerator.autocast():
            loss, values = trainee(part, part_teacher)
        if not torch.isfinite(loss):
            write_json(job.folder / "not_finite.json", {"ids": part.ids.tolist(), "terms": _floats(values)})
            raise TrainingError(
                f"the loss is not finite ({_floats(values)}); weights are unchanged, the rows are listed in "
                f"{job.folder / 'not_finite.json'}; lower train.lr or check those rows"
            )
        accelerator.backward(loss * share)
        for name, value in {"loss": loss, **values}.items():
            logged[name] = logged.get(name, 0.0) + float(value.detach()) * share
    if job.config.clip_norm:
        accelerator.clip_grad_norm_(trainee.parameters(), job.config.clip_norm)
    optimizer.step()
    return logged


def _end_epoch(
    job: Job,
    trainee: Trainee,
    average: Average | None,
    state: State,
    best: dict[str, Tensor],
    *,
    last: bool,
    lr: float,
) -> dict[str, Tensor]:
    """Log the epoch, validate when due, and return the best weights so far."""
    entry = {"epoch": state.epoch + 1, "step": state.step, "lr": lr}
    entry |= {f"train/{name}": total / max(1, state.rows) for name, total in state.sums.items()}
    state.epoch, state.batch, state.sums, state.rows = state.epoch + 1, 0, {}, 0
    if last or state.epoch == job.config.epochs or state.epoch % job.config.validate_every == 0:
        with average.applied(trainee) if average else _unchanged():
            entry |= job.validate(trainee.model)
            if entry[SELECT] >= state.best:
                state.best, state.best_epoch = entry[SELECT], state.epoch
                best = {name: value.detach().clone() for name, value in trained_state(trainee).items()}
    state.history.append(entry)
    _write_metrics(job.folder, state)
    return best


class Average:
    """Exponential moving average of the trained weights and buffers (Polyak & Juditsky 1992).

    Args:
        module: what to average.
        decay: share kept in each step; early steps use less, ``(1 + step) / (10 + step)``.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in trained_state(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average toward the module's present weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in trained_state(module).items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average into the module for the time of the block."""
        kept = {name: value.detach().clone() for name, value in trained_state(module).items()}
        load_state(module, self.values)
        try:
            yield
        finally:
            load_state(module, kept)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """State of a module without its frozen parameters, by name."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


@torch.no_grad()
def load_state(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into a module's state in place."""
    state = module.state_dict()
    for name, value in values.items():
        state[name].copy_(value)


def take(item: Any, rows: Tensor) -> Any:
    """Rows of a Batch or of Outputs, in the order given."""

    def pick(value: Any) -> Any:
        return {name: tensor[rows] for name, tensor in value.items()} if isinstance(value, dict) else value[rows]

    return type(item)(*(pick(value) for value in item))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; itself when it is there already."""
    if batch.ids.device == device:
        return batch
    move = {"device": device, "non_blocking": True}
    fields = ({k: v.to(**move) for k, v in f.items()} if isinstance(f, dict) else f.to(**move) for f in batch)
    return Batch(*fields)


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM; a second one takes its usual effect."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # only the main thread may set handlers; elsewhere the caller handles signals
        before.clear()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _out_of_patience(state: State, config: TrainConfig) -> bool:
    return config.patience is not None and 0 <= state.best_epoch <= state.epoch - config.patience


def _note(state: State) -> str:
    shown = [f"loss {state.sums['loss'] / state.rows:.3f}"]
    if state.best_epoch >= 0:
        shown.append(f"best valid {state.best:.1%}")
    return " ".join(shown)


def _floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in values.items()}


def _write_metrics(folder: Path, state: State) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in state.history)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")


def _save(
    folder: Path,
    trainee: Trainee,
    optimizer: Any,
    average: Average | None,
    state: State,
    best: dict[str, Tensor],
) -> None:
    tensors, packed = checkpoint.pack_optimizer(getattr(optimizer, "optimizer", optimizer))
    groups = {
        "trainee": trained_state(trainee),
        "optimizer": tensors,
        "best": best,
        "average": average.values if average else {},
        "rng": checkpoint.rng_state(),
    }
    checkpoint.save(folder, groups, {"state": vars(state), "optimizer": packed})


def _restore(
    folder: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, average: Average | None
) -> tuple[State, dict[str, Tensor]]:
    groups, content = checkpoint.load(folder)
    load_state(trainee, groups["trainee"])
    checkpoint.unpack_optimizer(optimizer, groups["optimizer"], content["optimizer"])
    if average:
        average.values = groups["average"]
    checkpoint.restore_rng(groups["rng"])
    values = content["state"]
    return State(**values), groups["best"]
