"""Truncated and bit-flipped files of the teacher cache and of checkpoints: found before a value is used, and mended."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import ForkServer
from torch import Tensor

from distill import checkpoint
from distill.cache import TeacherCache, flatten
from distill.contracts import Outputs, UserError
from distill.runs import read_json, sha256_file

pytestmark = [pytest.mark.fault, pytest.mark.slow]

TRIALS = 100  # of each kind
IDS, VIEWS, SHARD_ROWS = np.arange(96) * 3 + 1, [0, 1], 12
KEY = {"teacher": "aa", "seed": 0}


def truncate(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def flip_a_bit(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


KINDS = pytest.mark.parametrize("damage", [truncate, flip_a_bit])
Damage = Callable[[Path, random.Random], None]


def teacher(ids: np.ndarray, view: int) -> Outputs:
    base = torch.from_numpy(ids).float()[:, None] + 1000 * view
    return Outputs({"kind": base + torch.arange(5) / 8}, {"fused": base * torch.ones(4)}, {})


def fill(folder: Path, asked: list[int]) -> None:
    def produce(ids: np.ndarray, view: int) -> Outputs:
        asked.extend(ids.tolist())
        return teacher(ids, view)

    TeacherCache.fill(
        folder, rows=IDS, views=VIEWS, produce=produce, key=KEY, dtype="float32", batch_size=8, shard_rows=SHARD_ROWS
    )


def everything(folder: Path) -> dict[str, Tensor]:
    """What training would read: all rows and views."""
    cache = TeacherCache.open(folder, KEY)
    return flatten(cache.lookup(torch.from_numpy(np.tile(IDS, 2)), torch.tensor(VIEWS).repeat_interleave(len(IDS))))


@KINDS
def test_damage_to_a_shard_is_caught_and_a_refill_makes_that_shard_alone(damage: Damage, tmp_path: Path) -> None:
    folder, caught = tmp_path / "cache", 0
    fill(folder, [])
    shards = sorted(folder.glob("shard-*.safetensors"))
    whole, expected = {path: sha256_file(path) for path in shards}, everything(folder)
    for trial in range(TRIALS):
        chance = random.Random(trial)
        path = chance.choice(shards)
        damage(path, chance)
        with pytest.raises(UserError, match=path.name):
            everything(folder)
        with pytest.raises(UserError, match=path.name):
            TeacherCache.open(folder, KEY).verify()
        caught += 1
        others = {shard: shard.stat().st_ino for shard in shards if shard != path}
        asked: list[int] = []
        fill(folder, asked)
        first = shards.index(path) % (len(IDS) // SHARD_ROWS) * SHARD_ROWS
        assert asked == IDS[first : first + SHARD_ROWS].tolist()
        assert {shard: shard.stat().st_ino for shard in others} == others
        assert {shard: sha256_file(shard) for shard in shards} == whole
    assert all(torch.equal(value, expected[name]) for name, value in everything(folder).items())
    print(
        f"{damage.__name__}: {caught} of {TRIALS} caught, each mended by {SHARD_ROWS} rows of {len(IDS) * len(VIEWS)}"
    )


@KINDS
def test_damage_to_an_entry_beside_a_shard_is_mended(damage: Damage, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    fill(folder, [])
    expected = everything(folder)
    entries = sorted(folder.glob("shard-*.json"))
    for trial in range(TRIALS):
        chance = random.Random(trial)
        damage(chance.choice(entries), chance)
        asked: list[int] = []
        fill(folder, asked)
        assert len(asked) in (0, SHARD_ROWS)  # 0 where only the seconds that it took were changed
        assert all(torch.equal(value, expected[name]) for name, value in everything(folder).items())


def test_a_run_makes_the_damaged_shard_of_a_finished_cache_again(
    server: ForkServer, finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project)
    folder = project / "runs/tiny/cache"
    before = {path: path.stat().st_ino for path in folder.glob("shard-*.safetensors")}
    (bad,) = [path for path in before if "view1" in path.name]
    expected = sha256_file(bad)
    flip_a_bit(bad, random.Random(0))
    child = server.start("distill", tmp_path / "out.txt", cwd=project, arguments=["cache", "recipe.yaml"])
    assert child.wait() == 0 and "cache: done" in child.text() and "teacher: done" not in child.text(), child.text()
    assert sha256_file(bad) == expected
    assert [path for path in before if path.stat().st_ino != before[path]] == [bad]


def save(folder: Path, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model = {"a.weight": torch.randn(16, 8, generator=generator), "a.bias": torch.full((16,), float(step))}
    groups = {"trainee": model, "optimizer": {"0/exp_avg": torch.randn(16, 8, generator=generator)}, "average": {}}
    checkpoint.save(folder, groups, {"state": {"step": step}})


@KINDS
def test_damage_to_a_checkpoint_is_caught_named_and_the_one_before_is_used(
    damage: Damage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    used = refused = 0
    for trial in range(TRIALS):
        chance, folder = random.Random(trial), tmp_path / str(trial) / "checkpoint"
        with_old = trial % 4 > 0
        for step in (1, 2) if with_old else (2,):
            save(folder, step)
        bad = chance.choice(sorted(folder.iterdir()))
        damage(bad, chance)
        caplog.clear()
        if with_old:
            tensors, state = checkpoint.load(folder)
            assert state == {"state": {"step": 1}} and tensors["trainee"]["a.bias"].eq(1).all()
            assert caplog.messages == [f"{bad} is damaged; going on from the checkpoint before it"]
            used += 1
        else:
            with pytest.raises(UserError, match=f"{bad.name} is damaged, and there is no whole one before it"):
                checkpoint.load(folder)
            refused += 1
        save(folder, 3)
        assert checkpoint.load(folder)[1] == {"state": {"step": 3}}
    print(
        f"{damage.__name__}: {used + refused} of {TRIALS} caught: {used} went on from the one before, {refused} refused"
    )
    assert used + refused == TRIALS


def test_a_run_says_which_file_of_its_checkpoint_is_bad_and_ends_with_the_same_weights(
    server: ForkServer, finished: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project)
    run = project / "runs/tiny"
    shutil.rmtree(run / "student")
    arguments = ["train", "recipe.yaml", "student.train.checkpoint_minutes=1e-9"]
    first = server.start("distill", tmp_path / "first.txt", cwd=project, arguments=arguments)
    while not (run / "student/checkpoint.old/checkpoint.json").exists():
        assert server.ask({"wait": first.pid, "timeout": 0.001}) is None, first.text()
    first.send(15)
    assert first.wait() == 143, first.text()
    newest, before = (
        read_json(run / f"student/{name}/state.json")["state"]["step"] for name in ("checkpoint", "checkpoint.old")
    )
    assert newest > before
    bad = run / "student/checkpoint/trainee.safetensors"
    flip_a_bit(bad, random.Random(0))
    again = server.start("distill", tmp_path / "again.txt", cwd=project, arguments=arguments)
    assert again.wait() == 0, again.text()
    assert f"{bad.relative_to(project)} is damaged; going on from the checkpoint before it" in again.text().splitlines()
    assert sha256_file(run / "student/model.safetensors") == sha256_file(
        finished / "runs/tiny/student/model.safetensors"
    )
