"""Run folders: fingerprints, manifests written last, atomic files, the lock, seeds.

A stage writes into its folder and is finished by :func:`finish`, which hashes every file and writes ``manifest.json``
last. A present manifest with the expected fingerprint, whose files still have their hashes, *is* "done".
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from distill.contracts import Artifact, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY_DIGITS = 16
MANIFEST = "manifest.json"
MARKER = ".fingerprint"
"""File that says, from a stage's start on, what it is working on."""
BULK, LARGE = ("shard-*.safetensors", "image.npy"), 4 * 2**30
"""Names of files that may be very many bytes, and from how many bytes of a stage on a start reads of them those alone
that were touched since. Shards are compared with their hash when they are first read; decoded images are not."""


class DiskFullError(RuntimeError):
    """A file did not fit on the disk; what it was to replace is still there."""


def fingerprint(*parts: Any) -> str:
    """Return a 16-digit hex hash of JSON values; equal values give equal hashes on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    with room_for(path, len(data)), atomic(path) as temporary:
        temporary.write_bytes(data)


def read_array(path: Path, mmap_mode: Literal["r", "r+"] | None = None) -> NDArray[Any]:
    """Read a ``.npy`` file of plain numbers.

    Raises:
        UserError: the file is damaged, or holds pickled objects, which are never loaded.
    """
    import numpy as np

    try:
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path} is not an array of plain numbers ({error}); delete its folder to make it again"
        ) from error
    return array


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success flush it to disk and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def start(folder: Path, key: str, *, made_of: Any = None, resume: bool = False, mend: bool = False) -> Path:
    """Make a stage's folder ready: empty, unless it may go on with what a run of this fingerprint left there.

    A folder with a manifest was finished, so whoever starts it again found it damaged or stale.

    Args:
        folder: the stage's folder.
        key: its fingerprint.
        made_of: what the fingerprint is of, as JSON values, for :func:`left_there` to tell later.
        resume: the stage goes on in a folder that was not finished.
        mend: also in a finished one, as it checks each file there before it keeps it.
    """
    same = _marked(folder).get("fingerprint") == key
    if folder.exists() and not (same and resume and (mend or not (folder / MANIFEST).exists())):
        shutil.rmtree(folder)
        same = False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    if not same:
        write_json(folder / MARKER, {"fingerprint": key, "made_of": made_of})
    return folder


def left_there(folder: Path) -> tuple[str, Any, float]:
    """What a stage's folder holds, finished or not.

    Returns:
        The fingerprint ("" where there is nothing), what it is of, and how many seconds of work it took.
    """
    marked = _marked(folder)
    if not marked:
        return "", None, 0.0
    try:
        info = read_json(folder / MANIFEST)["info"]
        seconds = max(float(info["cost"]["seconds"]), float(info.get("seconds", 0)))  # the last process's, and of all
    except (OSError, ValueError, KeyError, TypeError):  # not finished: from its start to the last file that it wrote
        times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
        seconds = max(times, default=0.0) - min(times, default=0.0)
    return marked["fingerprint"], marked.get("made_of"), seconds


def _marked(folder: Path) -> dict[str, Any]:
    """What a folder's marker says, or its manifest: earlier versions wrote the fingerprint alone."""
    for file in (MARKER, MANIFEST):
        try:
            marked = read_json(folder / file)
            if isinstance(marked["fingerprint"], str):
                return dict(marked)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    try:
        plain = (folder / MARKER).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    return {"fingerprint": plain} if len(plain) == KEY_DIGITS else {}


def copy_stage(source: Path, folder: Path, stage: str, key: str) -> bool:
    """Copy a finished stage of another run to where this run has it; whole, or not at all.

    Args:
        source: the other run's folder of the stage.
        folder: this run's.
        stage: its name.
        key: its fingerprint.

    Returns:
        Whether the copy is that stage: the other run may have changed meanwhile.
    """
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    temporary = folder.with_name(f".{folder.name}.copy")
    shutil.rmtree(temporary, ignore_errors=True)  # of a copy that was killed
    try:
        with room_for(folder, sum(path.stat().st_size for path in files)):
            for path in files:
                target = temporary / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        if find(temporary, stage, key) is None:
            return False
        for path in files:
            shutil.copystat(path, temporary / path.relative_to(source))  # with the times that the manifest has
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        return True
    except FileNotFoundError:
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(folder: Path) -> None:
    """Make a stage's folder neither finished nor resumable."""
    for name in (MANIFEST, MARKER):
        (folder / name).unlink(missing_ok=True)


def finish(folder: Path, stage: str, key: str, info: dict[str, Any]) -> Artifact:
    """Hash a stage's files and write its manifest: from then on the stage is done."""
    files = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": sha256_file(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, MARKER)
    }
    write_json(folder / MANIFEST, {"stage": stage, "fingerprint": key, "info": info, "files": files})
    return Artifact(stage, folder, key, info)


def find(folder: Path, stage: str, key: str, *, read: bool = True) -> Artifact | None:
    """Return the finished artifact of this fingerprint, or None if it is absent, other or damaged.

    Args:
        folder: the stage's.
        stage: its name.
        key: its fingerprint.
        read: compare the hashes of its files, but for those of ``BULK`` in a stage of more than 4 GiB that were not
            touched since; without it, their sizes alone.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    try:
        content = read_json(manifest)
        if content["fingerprint"] != key or content["stage"] != stage:
            return None
        large = sum(entry["bytes"] for entry in content["files"].values()) > LARGE
        for name, entry in content["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return None
            bulk = large and any(path.match(pattern) for pattern in BULK)
            untouched = path.stat().st_mtime_ns == entry.get("mtime_ns")
            if read and not (bulk and untouched) and sha256_file(path) != entry["sha256"]:
                return None
        return Artifact(stage, folder, key, dict(content["info"]))
    except (ValueError, KeyError, TypeError, AttributeError):  # not what `finish` wrote
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"run folder {folder} is in use by another process; wait for it to end or choose another name=..."
        ) from None
    except OSError as error:
        raise UserError(f"run folder {folder} cannot be written: {error.strerror}; choose another output") from error
    try:
        yield
    finally:
        lock.release()


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse to start work that the disk cannot hold.

    Raises:
        UserError: less than ``needed_bytes`` (plus 5 %) is free where ``folder`` lies.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes * 1.05:
        raise UserError(f"{folder}: needs {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room")


@contextmanager
def room_for(path: Path, needed_bytes: int) -> Iterator[None]:
    """Say in one sentence that the disk is full, and how many bytes the work inside needed.

    Raises:
        DiskFullError: in place of an ``OSError`` that says so.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{path}: the disk is full, {needed_bytes:,} bytes are needed for it; "
            "make room and run the same command again to go on"
        ) from error


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; call before a model is built."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
