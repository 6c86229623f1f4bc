"""Checkpoints: bit-exact continuation, and a readable one after a crash at any point."""

from __future__ import annotations

import copy
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill import checkpoint
from distill.contracts import UserError


class Tied(nn.Module):
    """A model whose output layer is its embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [B, 7]."""
        return self.out(self.norm(self.table(tokens)))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.99)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), amsgrad=True, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:], "weight_decay": 0.0}]),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        tokens = (torch.randint(7, (5,)) + random.randint(0, 6)) % 7
        labels = torch.from_numpy(np.random.randint(7, size=5))  # noqa: NPY002
        loss = nn.functional.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_bit_identically(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, 3)
    moments, packed = checkpoint.pack_optimizer(optimizer)
    groups = {"model": model.state_dict(), "optimizer": moments, "rng": checkpoint.rng_state()}
    checkpoint.save(tmp_path / "last", groups, {"step": 3, "optimizer": packed, "best": float("-inf")})
    train(model, optimizer, 4)

    resumed = Tied()
    other = OPTIMIZERS[name](list(resumed.parameters()))
    tensors, state = checkpoint.load(tmp_path / "last")
    resumed.load_state_dict(tensors["model"])
    checkpoint.unpack_optimizer(other, tensors["optimizer"], state["optimizer"])
    checkpoint.restore_rng(tensors["rng"])
    train(resumed, other, 4)

    assert state["step"] == 3 and state["best"] == float("-inf")
    assert resumed.out.weight is resumed.table.weight
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for group, again in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in again.items() if k != "params"}


def test_every_generator_is_restored() -> None:
    random.gauss(0, 1)
    np.random.standard_normal(3)  # noqa: NPY002
    state = checkpoint.rng_state()

    def draw() -> list[float]:
        drawn = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return [random.gauss(0, 1), random.random(), *drawn, *torch.rand(3).tolist()]

    first = draw()
    checkpoint.restore_rng(state)
    assert draw() == first


def test_dtypes_shapes_and_sharing_survive(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    group = {
        "base": base,
        "same": base,
        "part": base[1:],
        "transposed": base.T,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "also_empty": torch.zeros(0, 2),
        "flags": torch.tensor([True, False]),
    }
    checkpoint.save(tmp_path / "c", {"model": group, "none": {}}, {})
    tensors, _ = checkpoint.load(tmp_path / "c")
    assert tensors["none"] == {} and tensors["model"].keys() == group.keys()
    for name, value in group.items():
        assert tensors["model"][name].dtype == value.dtype and torch.equal(tensors["model"][name], value), name
    assert tensors["model"]["same"].data_ptr() == tensors["model"]["base"].data_ptr()


class Crash(BaseException):
    """Stands for the process dying."""


def crash_after(calls: int, patch: pytest.MonkeyPatch) -> None:
    """Die before the given call among everything that touches the disk."""
    left = [calls]

    def wrap(function):  # type: ignore[no-untyped-def]
        def inner(*args, **kwargs):  # type: ignore[no-untyped-def]
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return function(*args, **kwargs)

        return inner

    for target, name in ((os, "fsync"), (os, "open"), (shutil, "rmtree"), (Path, "rename"), (Path, "mkdir")):
        patch.setattr(target, name, wrap(getattr(target, name)))
    patch.setattr(checkpoint, "_write", wrap(checkpoint._write))


@pytest.mark.parametrize("before", [0, 1])
def test_a_crash_at_any_point_leaves_a_readable_checkpoint(before: int, tmp_path: Path) -> None:
    outcomes = set()
    for calls in range(32):
        folder = tmp_path / f"{calls}" / "last"
        folder.parent.mkdir()
        for number in range(before):
            checkpoint.save(folder, {"model": {"w": torch.full((3,), float(number))}}, {"step": number})
        for attempt in range(2):  # dying twice at the same place must not hurt either
            with pytest.MonkeyPatch.context() as patch:
                crash_after(calls, patch)
                try:
                    checkpoint.save(folder, {"model": {"w": torch.full((3,), 9.0)}}, {"step": 9})
                    done = True
                except Crash:
                    done = False
            if before or done:
                tensors, state = checkpoint.load(folder)
                assert torch.equal(tensors["model"]["w"], torch.full((3,), float(state["step"])))
                outcomes.add((state["step"], done, attempt))
        checkpoint.save(folder, {"model": {}}, {"step": 10})
        assert checkpoint.load(folder)[1] == {"step": 10}
        assert {"last"} <= {path.name for path in folder.parent.iterdir()} <= {"last", "last.old"}
    assert (9, True, 1) in outcomes
    assert not before or {(0, False, 0), (9, False, 0)} <= outcomes


def test_a_first_save_that_died_before_its_rename_is_found(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"model": {"w": torch.ones(2)}}, {"step": 1})
    (tmp_path / "c").rename(tmp_path / "c.new")
    assert checkpoint.exists(tmp_path / "c") and checkpoint.load(tmp_path / "c")[1] == {"step": 1}


def test_a_first_save_that_died_in_the_middle_is_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"model": {"w": torch.ones(2)}}, {"step": 1})
    (tmp_path / "c").rename(tmp_path / "c.new")
    manifest = tmp_path / "c.new" / "checkpoint.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert not checkpoint.exists(tmp_path / "c")


def test_damage_falls_back_to_the_old_one_and_is_named_then_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "c"
    for step in (1, 2):
        checkpoint.save(folder, {"model": {"w": torch.full((4,), float(step))}}, {"step": step})
    assert checkpoint.load(folder)[1] == {"step": 2} and not caplog.messages
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert checkpoint.load(folder)[1] == {"step": 1}
    bad = folder / "model.safetensors"
    assert caplog.messages == [f"{bad} is damaged; going on from the checkpoint before it"]
    (tmp_path / "c.old" / "state.json").unlink()
    with pytest.raises(UserError, match=r"c is damaged: .+model\.safetensors is damaged, and there is no whole one"):
        checkpoint.load(folder)
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "absent")
    assert not checkpoint.exists(tmp_path / "absent")


def test_removal_leaves_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"model": {"w": torch.ones(2)}}, {"step": 1})
    shutil.copytree(tmp_path / "c", tmp_path / "c.new")
    shutil.copytree(tmp_path / "c", tmp_path / "c.old")
    checkpoint.remove(tmp_path / "c")
    checkpoint.remove(tmp_path / "c")
    assert not list(tmp_path.iterdir()) and not checkpoint.exists(tmp_path / "c")


def test_no_pickle_in_the_folder(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"model": Tied().state_dict()}, {"step": 0})
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["checkpoint.json", "model.safetensors", "state.json"]


def test_weights_round_trip_with_ties(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    checkpoint.save_weights(model, tmp_path / "w.safetensors")
    checkpoint.load_weights(other, tmp_path / "w.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    assert list(tmp_path.iterdir()) == [tmp_path / "w.safetensors"]


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(nn.Linear(3, 2), path)
    with pytest.raises(UserError, match="holds 'bias'"):
        checkpoint.load_weights(nn.Linear(3, 2, bias=False), path)
    with pytest.raises(UserError, match=r"lacks 'running_mean'"):
        checkpoint.load_weights(nn.BatchNorm1d(3), path)
    with pytest.raises(UserError, match=r"'weight' has shape \(2, 3\)"):
        checkpoint.load_weights(nn.Linear(4, 2), path)
    model = nn.Linear(3, 2, bias=False)
    checkpoint.load_weights(model, path, strict=False)
    path.write_bytes(b"not a tensor file")
    before = copy.deepcopy(model.weight)
    with pytest.raises(UserError, match="not readable"):
        checkpoint.load_weights(model, path)
    with pytest.raises(UserError, match="not readable"):
        checkpoint.load_weights(model, tmp_path / "absent.safetensors")
    assert torch.equal(before, model.weight)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    tensors, state = checkpoint.pack_optimizer(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(UserError, match="does not fit"):
        checkpoint.unpack_optimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1), tensors, state)
