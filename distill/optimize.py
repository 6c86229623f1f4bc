"""Optimizers and schedules: the classes of ``torch.optim`` that need no closure, their rate, and the size of images."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.builders import check_part
from distill.config import TrainConfig, nearest, one_line
from distill.contracts import UserError
from distill.data_config import Part
from distill.sharding import local

Group = dict[str, Any]
FUSED = ("adamw", "adam", "sgd")
"""Optimizers that torch has as one kernel for CPUs too, in less than half the time of its default there."""
RESERVED = ("params", "lr", "weight_decay", "maximize", "capturable", "differentiable")
"""Parameters of optimizers that are no ``optimizer_params``: train has keys for them, or training makes no sense."""


class MuonAndAdamW(Optimizer):
    """Muon (Jordan et al. 2024) on the weights of linear layers, AdamW on all others, as its authors use it.

    Muon orthogonalises a matrix, and has no rule for embeddings, convolutions, norms and biases. With ``adjust_lr_fn``
    "match_rms_adamw" (Liu et al. 2025, arXiv 2502.16982) one learning rate suits both.

    Args:
        params: parameter groups; those with ``matrices`` set are Muon's.
        lr: of groups without one.
        momentum: of Muon, as all below.
        nesterov: as in SGD.
        ns_steps: iterations of the orthogonalisation.
        eps: keeps its division from zero.
        adjust_lr_fn: "original", "match_rms_adamw" or "spectral_unclamped".
    """

    def __init__(
        self,
        params: Iterable[Group],
        lr: float,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        eps: float = 1e-7,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        groups = list(params)
        options: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "eps": eps}
        matrices = [group for group in groups if group["matrices"]]
        others = [group for group in groups if not group["matrices"]]
        self.parts: dict[str, Optimizer] = {}  # torch refuses an optimizer without parameters
        if matrices:
            self.parts["muon"] = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn=adjust_lr_fn, **options)
        if others:
            self.parts["adamw"] = torch.optim.AdamW(others, lr=lr)

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The groups of both."""
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:  # type: ignore[override]
        """What both keep of each parameter."""
        return {parameter: kept for part in self.parts.values() for parameter, kept in part.state.items()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make a step of both."""
        assert closure is None
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: it is of other parameters.
        """
        if state_dict.keys() != self.parts.keys():
            raise ValueError(f"it has the parts {list(state_dict)}, not {list(self.parts)}")
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "rmsprop": torch.optim.RMSprop,
    "asgd": torch.optim.ASGD,
    "muon": MuonAndAdamW,
}
"""Name -> class. Not there: LBFGS (wants a closure), SparseAdam (sparse gradients), Rprop (no rate after its first
step, so no schedule)."""


def check_optimizer(config: TrainConfig, where: str) -> None:
    """Check the optimizer's name and parameters, by building it for one weight and making a step.

    Raises:
        UserError: a parameter that the optimizer lacks, or a value that it refuses.
    """
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = _built([{"params": [weight], "matrices": True, "weight_decay": config.weight_decay}], config, where)
    with _refusals(f"{where}.optimizer_params: {config.optimizer} cannot make a step"):
        optimizer.step()


def build_optimizer(module: nn.Module, config: TrainConfig) -> Optimizer:
    """Freeze what ``lr_scale`` sets to 0 and group the rest by learning rate and decay.

    Biases, norms and other one-dimensional parameters are decayed with ``decay_vectors`` alone. A parameter takes the
    factor of the longest prefix that names it, with or without the leading ``model.``.

    Raises:
        UserError: ``lr_scale`` names no parameter, or the optimizer does not fit (see :func:`check_optimizer`).
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    paths = [name.removeprefix("model.") for name, _ in module.named_parameters()]
    for prefix in config.lr_scale:
        if not any(f"{path}.".startswith(f"{prefix}.") for path in paths):
            known = {".".join(path.split(".")[:length]) for path in paths for length in (1, 2)}
            raise UserError(f"train.lr_scale: the model has no parameters under {prefix!r}; {nearest(prefix, known)}")
    matrices = _matrices(module) if config.optimizer == "muon" else set()
    for path, parameter in zip(paths, module.parameters(), strict=True):
        fitting = [prefix for prefix in config.lr_scale if path == prefix or path.startswith(f"{prefix}.")]
        scale = config.lr_scale[max(fitting, key=len)] if fitting else 1.0
        if scale == 0:
            parameter.requires_grad_(False)
        decayed = config.decay_vectors or parameter.ndim > 1
        if parameter.requires_grad:
            groups.setdefault((scale, decayed, parameter in matrices), []).append(parameter)
    options = [
        {
            "params": parameters,
            "lr": config.lr * scale,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "matrices": matrix,
        }
        for (scale, decayed, matrix), parameters in groups.items()
    ]
    return _built(options, config, "train")


def lr_factor(step: int, total: int, config: TrainConfig) -> float:
    """Factor on the learning rate at a step: linear warm-up, then the schedule.

    Args:
        step: 0-based.
        total: number of steps of the whole run.
        config: names the schedule: "constant", "cosine" (to 0; Loshchilov & Hutter 2017, arXiv 1608.03983), "onecycle"
            (cosine up over 30 %, then down to 0; Smith & Topin 2018, arXiv 1708.07120) or "step" (times ``gamma`` at
            each of ``milestones``).

    Returns:
        A factor in [0, 1].
    """
    warmup = 0.3 * total if config.schedule == "onecycle" else config.warmup * total
    if step < warmup:
        done = (step + 1) / (warmup + 1)
        return 0.5 - 0.5 * math.cos(math.pi * done) if config.schedule == "onecycle" else done
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return config.gamma ** sum(step >= milestone * total for milestone in config.milestones)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1.0, total - warmup))


def image_size(step: int, total: int, config: TrainConfig) -> int | None:
    """Pixels of the images that a step sees, None for those of the data.

    Progressive resizing, from small to whole images (Howard 2018; Tan & Le 2021, arXiv 2104.00298).

    Args:
        step: 0-based.
        total: number of steps of the whole run.
        config: says how small, and until when.
    """
    small = config.progressive_resizing
    return small.size if small and step < small.until * total else None


def _matrices(module: nn.Module) -> set[Tensor]:
    """The weights that Muon is for."""
    return {part.weight for part in module.modules() if isinstance(part, nn.Linear)}


def _built(groups: list[Group], config: TrainConfig, where: str) -> Optimizer:
    name = config.optimizer
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in config.optimizer_params.items()}
    place = f"{where}.optimizer_params"
    if "type" in given:  # which a part's parameters cannot hold
        raise UserError(f"{place}: {name} has no parameter 'type'; {where}.optimizer names the optimizer")
    check_part(OPTIMIZERS, Part.model_validate({"type": name, **given}), place, RESERVED)
    params = {"momentum": config.momentum, **given} if name == "sgd" else given
    if name in FUSED and not {"fused", "foreach"} & given.keys():
        parameters = [parameter for group in groups for parameter in group["params"]]
        params = {
            **params,
            "fused": all(p.device.type in ("cpu", "cuda") and local(p) is p for p in parameters) or None,
        }
    with _refusals(f"{place}: {name} cannot be built"):
        return OPTIMIZERS[name](groups, lr=config.lr, **params)  # type: ignore[call-arg]


@contextmanager
def _refusals(what: str) -> Generator[None]:
    """Say in one sentence what an optimizer refuses."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # the last: betas of one number
        raise UserError(f"{what}: {one_line(error)}") from error


def as_many_steps(train: TrainConfig, theirs: int, ours: int) -> TrainConfig:
    """Return a budget of epochs of ``theirs`` batches in epochs of ``ours``: as many steps, about as many checks."""
    if ours == theirs:
        return train
    steps = min(train.epochs * theirs, train.max_steps or train.epochs * theirs)
    longer = {"epochs": -(-steps // ours), "validate_every": max(1, round(train.validate_every * theirs / ours))}
    if train.patience is not None:
        longer["patience"] = max(1, round(train.patience * theirs / ours))
    return train.model_copy(update={**longer, "max_steps": steps})
