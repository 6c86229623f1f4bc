"""A disk that is full at any write of a save: the earlier checkpoint stays, and the message says what was needed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from torch import nn

from distill import checkpoint
from distill.runs import DiskFullError, sha256_file

pytestmark = [pytest.mark.fault, pytest.mark.slow]

MEGABYTE = 1_000_000


def save(folder: Path, step: int, megabytes: float = 0.01) -> None:
    values = torch.full((int(megabytes * MEGABYTE / 4),), float(step))
    checkpoint.save(folder, {"trainee": {"w": values}, "optimizer": {"m": values[:9]}}, {"step": step})


def step_of(folder: Path) -> int:
    tensors, state = checkpoint.load(folder)
    assert tensors["trainee"]["w"].eq(state["step"]).all()
    return int(state["step"])


def full_at(call: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let one call among all that write be the one for which there is no room; return a counter of calls."""
    calls, write = [0], checkpoint._write

    def refuse() -> bool:
        calls[0] += 1
        return calls[0] == call

    def no_space() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(path: Path, data: bytes) -> None:
        if refuse():
            path.write_bytes(data[: len(data) // 2])
            raise no_space()
        write(path, data)

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **options: Any) -> Any:
            if refuse():
                raise no_space()
            return function(*arguments, **options)

        return inner

    for target, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename")):
        patch.setattr(target, name, wrapped(getattr(target, name)))
    patch.setattr(checkpoint, "_write", half)
    return calls


@pytest.mark.parametrize("earlier", [0, 1, 2])
def test_no_room_at_any_write_of_a_save_leaves_the_earlier_checkpoint(earlier: int, tmp_path: Path) -> None:
    call, passed = 0, False
    while not passed:
        call += 1
        folder = tmp_path / str(call) / "checkpoint"
        folder.parent.mkdir()
        for step in range(1, earlier + 1):
            save(folder, step)
        with pytest.MonkeyPatch.context() as patch:
            calls = full_at(call, patch)
            try:
                save(folder, 9)
                passed = True
            except DiskFullError as error:
                files = list(folder.iterdir()) if folder.exists() else []
                assert "checkpoint: the disk is full, " in str(error) and " bytes are needed for it; make" in str(error)
                needed = int(str(error).split(" bytes are")[0].split()[-1].replace(",", ""))
                assert needed >= 10_000 and (not files or abs(sum(f.stat().st_size for f in files) - needed) < 10)
        if passed:
            assert calls[0] == call - 1
        if earlier or passed or checkpoint.exists(folder):
            assert step_of(folder) in ({9} if passed else {earlier, 9})
        save(folder, 10)
        assert step_of(folder) == 10
    print(
        f"{call - 1} calls refused one at a time beside {earlier} earlier checkpoints, each time a whole one was left"
    )
    assert call > 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill_up(disk: Path, leave: int) -> Path:
    """Write a file that leaves this many bytes free."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    size = shutil.disk_usage(disk).free - leave
    with open(ballast, "wb") as file:
        for start in range(0, size, MEGABYTE):
            file.write(bytes(min(MEGABYTE, size - start)))
    return ballast


def test_a_really_full_disk_leaves_the_earlier_checkpoint(small_disk: Path) -> None:
    folder = small_disk / "checkpoint"
    for step in (1, 2):
        save(folder, step, 10)
    for leave in range(0, 10 * MEGABYTE, MEGABYTE // 2):
        ballast = fill_up(small_disk, leave)
        with pytest.raises(DiskFullError, match=r"the disk is full, 10,\d{3},\d{3} bytes are needed"):
            save(folder, 3, 10)
        assert step_of(folder) == 2 and not (small_disk / "checkpoint.new").exists()
    with pytest.raises(DiskFullError, match=r"w\.safetensors: the disk is full, 20,000,\d{3} bytes"):
        checkpoint.save_weights(nn.Linear(5_000, 1_000, bias=False), small_disk / "w.safetensors")
    ballast.unlink()
    save(folder, 3, 10)
    assert step_of(folder) == 3


def test_a_run_on_a_full_disk_says_so_in_one_sentence_and_goes_on_when_there_is_room(
    server: ForkServer, finished: Path, small_disk: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "runs/tiny", small_disk / "tiny")
    shutil.rmtree(small_disk / "tiny/student")
    arguments = ["train", "recipe.yaml", f"output={small_disk}", "student.train.checkpoint_minutes=1e-9"]
    ballast = fill_up(small_disk, 90_000)
    full = server.start("distill", tmp_path / "full.txt", cwd=finished, arguments=arguments)
    assert full.wait() == 1, full.text()
    errors = [line for line in full.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in full.text()
    assert "the disk is full, " in errors[0] and " bytes are needed for it; make room and run the same" in errors[0]
    ballast.unlink()
    again = server.start("distill", tmp_path / "again.txt", cwd=finished, arguments=arguments)
    assert again.wait() == 0, again.text()
    name = "student/model.safetensors"
    assert sha256_file(small_disk / "tiny" / name) == sha256_file(finished / "runs/tiny" / name)
