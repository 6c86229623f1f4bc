"""Run folders: fingerprints, manifests that mean "done", atomic files, the lock, and seeds."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill import runs
from distill.contracts import UserError
from distill.runs import (
    MANIFEST,
    DiskFullError,
    atomic,
    copy_stage,
    find,
    fingerprint,
    finish,
    left_there,
    locked,
    read_json,
    start,
    write_json,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_equal_values_have_equal_fingerprints(value):
    shuffled = json.loads(json.dumps(value))
    if isinstance(shuffled, dict):
        shuffled = dict(reversed(shuffled.items()))
    assert fingerprint(value) == fingerprint(shuffled)
    assert len(fingerprint(value)) == 16 and int(fingerprint(value), 16) >= 0


def test_a_fingerprint_is_the_same_on_every_machine_and_forever():
    assert fingerprint("teacher", {"lr": 0.1, "b": [1, None, "ü"]}) == fingerprint(
        "teacher", {"b": [1, None, "ü"], "lr": 0.1}
    )
    assert fingerprint("teacher", {"lr": 0.1, "b": [1, None, "ü"]}) == "38020a5a2af671c9"


@pytest.mark.parametrize(
    ("one", "other"), [(("a", "b"), ("ab",)), ((1,), ("1",)), ((["a"], "b"), (["a", "b"],)), ((), (None,))]
)
def test_different_parts_have_different_fingerprints(one, other):
    assert fingerprint(*one) != fingerprint(*other)


def made(folder, key="k1", info=None):
    start(folder, key)
    (folder / "a.txt").write_text("one")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.bin").write_bytes(b"\0" * 10)
    return finish(folder, "teacher", key, {"score": 0.5} if info is None else info)


def test_a_finished_stage_is_found_with_what_it_told(tmp_path):
    artifact = made(tmp_path / "teacher")
    assert find(tmp_path / "teacher", "teacher", "k1") == artifact
    assert artifact.info == {"score": 0.5} and artifact.path == tmp_path / "teacher"
    files = read_json(tmp_path / "teacher" / MANIFEST)["files"]
    assert set(files) == {"a.txt", "sub/b.bin"} and files["sub/b.bin"]["bytes"] == 10


def test_an_unfinished_stage_is_not_found(tmp_path):
    start(tmp_path / "teacher", "k1")
    assert find(tmp_path / "teacher", "teacher", "k1") is None
    assert find(tmp_path / "nothing", "teacher", "k1") is None


@pytest.mark.parametrize(("stage", "key"), [("student", "k1"), ("teacher", "k2")])
def test_another_stage_or_fingerprint_is_not_found(tmp_path, stage, key):
    made(tmp_path / "teacher")
    assert find(tmp_path / "teacher", stage, key) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a.txt").write_text("two"),  # same size
        lambda folder: (folder / "a.txt").write_text("longer"),
        lambda folder: (folder / "sub" / "b.bin").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text('{"stage": "teacher"'),
        lambda folder: (folder / MANIFEST).write_text(""),
    ],
)
def test_a_damaged_stage_is_not_found(tmp_path, damage):
    made(tmp_path / "teacher")
    damage(tmp_path / "teacher")
    assert find(tmp_path / "teacher", "teacher", "k1") is None


@pytest.mark.parametrize("name", ["shard-view0-00001.safetensors", "image.npy", "model.safetensors"])
def test_of_a_large_stage_the_bulk_is_read_again_if_it_was_touched(tmp_path, monkeypatch, name):
    folder = tmp_path / "cache"
    start(folder, "k1")
    (folder / "sub").mkdir()
    file = folder / "sub" / name
    file.write_text("one")
    finish(folder, "cache", "k1", {})
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text("two")
    os.utime(file, ns=times)
    assert find(folder, "cache", "k1") is None
    assert find(folder, "cache", "k1", read=False) is not None  # as other ranks ask, which the first one tells
    monkeypatch.setattr(runs, "LARGE", 2)
    assert (find(folder, "cache", "k1") is not None) is (name != "model.safetensors")
    os.utime(file, ns=(times[0], times[1] + 1))
    assert find(folder, "cache", "k1") is None
    file.write_text("short")
    assert find(folder, "cache", "k1", read=False) is None


def test_what_lies_in_a_folder_is_told(tmp_path):
    folder = tmp_path / "teacher"
    assert left_there(folder) == ("", None, 0.0)
    start(folder, "k1", made_of={"seed": 3})
    (folder / "half").write_text("x")
    began = (folder / runs.MARKER).stat().st_mtime
    os.utime(folder / "half", (began + 50, began + 50))
    key, made_of, seconds = left_there(folder)
    assert (key, made_of) == ("k1", {"seed": 3}) and seconds == pytest.approx(50)
    start(folder, "k1", made_of={"seed": 3}, resume=True)  # going on does not begin anew
    assert left_there(folder)[2] == pytest.approx(50)
    finish(folder, "teacher", "k1", {"cost": {"seconds": 7.0}})
    assert left_there(folder) == ("k1", {"seed": 3}, 7.0)
    finish(folder, "teacher", "k1", {"cost": {"seconds": 7.0}, "seconds": 60.0})  # of a run that was stopped before
    assert left_there(folder) == ("k1", {"seed": 3}, 60.0)


@pytest.mark.parametrize("text", ["k1", "", "[]", '{"fingerprint": 3}', '{"made_of": {}}'])
def test_where_the_marker_is_of_another_version_the_manifest_tells(tmp_path, text):
    folder = tmp_path / "teacher"
    made(folder, info={"cost": {"seconds": 7.0}})
    (folder / runs.MARKER).write_text(text)
    assert left_there(folder) == ("k1", None, 7.0) and find(folder, "teacher", "k1") is not None
    (folder / MANIFEST).unlink()
    assert left_there(folder) == ("", None, 0.0)


def test_an_unfinished_stage_of_an_earlier_version_is_known_and_goes_on(tmp_path):
    folder, key = tmp_path / "teacher", fingerprint("teacher", 1)
    start(folder, key)
    (folder / "half").write_text("x")
    (folder / runs.MARKER).write_text(key)
    assert left_there(folder)[0] == key
    start(folder, key, resume=True)
    assert (folder / "half").exists()


def test_a_file_added_later_does_not_undo_a_stage(tmp_path):
    made(tmp_path / "teacher")
    (tmp_path / "teacher" / "notes.txt").write_text("mine")
    assert find(tmp_path / "teacher", "teacher", "k1") is not None


def test_starting_empties_the_folder_unless_a_stopped_run_may_go_on(tmp_path):
    folder = tmp_path / "teacher"
    for resume, key, stays in [(True, "k1", True), (False, "k1", False), (True, "k2", False)]:
        start(folder, "k1")
        (folder / "half").write_text("x")
        start(folder, key, resume=resume)
        assert (folder / "half").exists() is stays
        start(folder, "k3")


def test_starting_a_finished_stage_again_empties_it(tmp_path):
    made(tmp_path / "teacher")
    start(tmp_path / "teacher", "k1", resume=True)
    assert not (tmp_path / "teacher" / "a.txt").exists() and find(tmp_path / "teacher", "teacher", "k1") is None


def test_a_stage_that_mends_keeps_its_damaged_folder_but_not_its_manifest(tmp_path):
    folder = tmp_path / "cache"
    made(folder)
    start(folder, "k1", resume=True, mend=True)
    assert (folder / "a.txt").exists() and find(folder, "teacher", "k1") is None and not (folder / MANIFEST).exists()
    start(folder, "k2", resume=True, mend=True)
    assert not (folder / "a.txt").exists()


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"fingerprint": "k1", "stage": "teacher", "files": {"a.txt": 3}}', "1"]
)
def test_a_manifest_that_says_something_else_is_not_found(tmp_path, content):
    made(tmp_path / "teacher")
    (tmp_path / "teacher" / MANIFEST).write_text(content)
    assert find(tmp_path / "teacher", "teacher", "k1") is None


def test_a_full_disk_is_told_with_the_bytes_that_were_needed(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(runs.DiskFullError, match=r"a\.json: the disk is full, 15 bytes are needed for it; make room"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert read_json(tmp_path / "a.json") == {"old": 1} and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(PermissionError), runs.room_for(tmp_path, 1):
        raise PermissionError


def test_an_array_of_objects_or_half_an_array_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9), allow_pickle=False)
    assert runs.read_array(tmp_path / "a.npy").tolist() == list(range(9))
    whole = (tmp_path / "a.npy").read_bytes()
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "c.npy").write_bytes(whole[:-9])
    (tmp_path / "d.npy").write_bytes(b"")
    for name in ("b", "c", "d"):
        for mode in (None, "r"):
            with pytest.raises(UserError, match=rf"{name}\.npy is not an array of plain numbers"):
                runs.read_array(tmp_path / f"{name}.npy", mode)


def test_discarding_makes_a_stage_neither_done_nor_resumable(tmp_path):
    made(tmp_path / "teacher")
    runs.discard(tmp_path / "teacher")
    assert find(tmp_path / "teacher", "teacher", "k1") is None
    start(tmp_path / "teacher", "k1", resume=True)
    assert not (tmp_path / "teacher" / "a.txt").exists()
    runs.discard(tmp_path / "nothing")


def test_an_atomic_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": "ü"})
    assert read_json(path) == {"a": "ü"} and "ü" in path.read_text(encoding="utf-8")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": "ü"} and [p.name for p in path.parent.iterdir()] == ["file.json"]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": "ü"}


HOLD = """
import sys, time
from pathlib import Path
from distill.runs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_folder_is_held_by_one_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another process"), locked(tmp_path / "run"):
            pytest.fail("held twice")
        other.communicate("")
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    with locked(tmp_path / "run"):
        pass


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pytest.fail("made")


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 0, 10**9)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda folder: usage)
    runs.check_disk(tmp_path, 9 * 10**8)
    with pytest.raises(UserError, match=r"needs 0.99 GB, 1.00 GB are free; make room"):
        runs.check_disk(tmp_path, 99 * 10**7)


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_seeds_reach_every_generator():
    runs.seed_everything(3)
    first = draws()
    assert all(one != other for one, other in zip(first, draws(), strict=True))
    runs.seed_everything(3)
    assert draws() == first
    runs.seed_everything(4)
    assert all(one != other for one, other in zip(first, draws(), strict=True))


def test_a_stage_is_copied_whole_or_not_at_all(tmp_path, monkeypatch):
    source, folder = tmp_path / "one" / "stage", tmp_path / "two" / "stage"
    start(source, "key")
    (source / "inner").mkdir()
    for name in ("a.bin", "inner/b.bin"):
        (source / name).write_bytes(name.encode())
    finish(source, "stage", "key", {"n": 1})
    start(folder, "other")
    copyfile, copied = shutil.copyfile, []

    def full(path, target):
        if len(copied) == 2:
            raise OSError(errno.ENOSPC, "no space")
        copied.append(copyfile(path, target))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(DiskFullError, match="the disk is full"):
            copy_stage(source, folder, "stage", "key")
    assert [path.name for path in folder.parent.iterdir()] == ["stage"] and find(folder, "stage", "key") is None
    assert copy_stage(source, folder, "stage", "key")
    found = find(folder, "stage", "key")
    monkeypatch.setattr(runs, "BULK", ("*.bin",))
    monkeypatch.setattr(runs, "LARGE", 0)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "sha256_file", lambda path: pytest.fail(f"{path} was read"))
        assert find(folder, "stage", "key") is not None  # files have the times that the manifest has
    assert found is not None and found.info == {"n": 1} and (folder / "inner/b.bin").read_bytes() == b"inner/b.bin"
    assert [path.name for path in folder.parent.iterdir()] == ["stage"]
    (source / "a.bin").write_bytes(b"other")
    assert not copy_stage(source, folder, "stage", "key") and find(folder, "stage", "key") is not None
