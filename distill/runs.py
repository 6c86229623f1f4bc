"""Run folders: fingerprints, manifests written last, atomic files, the lock, seeds.

A stage writes into ``STAGE.tmp/`` or straight into its folder (when it can resume there) and is finished by
:func:`finish`, which hashes every file and writes ``manifest.json`` last. A present manifest with the expected
fingerprint, whose files still have their hashes, *is* "done".
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distill.contracts import Artifact, UserError

MANIFEST = "manifest.json"
MARKER = ".fingerprint"
"""File that says, from a stage's start on, what it is working on."""


def fingerprint(*parts: Any) -> str:
    """Return a 16-digit hex hash of JSON values; equal values give equal hashes on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def start(folder: Path, key: str, *, resume: bool = False, mend: bool = False) -> Path:
    """Make a stage's folder ready: empty, unless what is there belongs to this fingerprint and may stay.

    A folder without a manifest is a stopped run's: with ``resume`` all of it stays. One with a manifest was finished,
    so whoever starts it again found it damaged: with ``mend`` the files that have the manifest's hashes stay, and no
    others.
    """
    manifest, marker = _manifest(folder), folder / MARKER
    if mend and manifest.get("fingerprint") == key:
        whole = {folder / name for name, entry in manifest["files"].items() if _is_whole(folder / name, entry)}
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            if path not in whole and path.name not in (MANIFEST, MARKER):
                path.unlink()
        (folder / MANIFEST).unlink()
    elif folder.exists() and not (
        resume and marker.is_file() and marker.read_text() == key and not (folder / MANIFEST).exists()
    ):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(key)
    return folder


def discard(folder: Path) -> None:
    """Make a stage's folder neither finished nor resumable."""
    for name in (MANIFEST, MARKER):
        (folder / name).unlink(missing_ok=True)


def finish(folder: Path, stage: str, key: str, info: dict[str, Any]) -> Artifact:
    """Hash a stage's files and write its manifest: from then on the stage is done."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, MARKER)
    }
    write_json(folder / MANIFEST, {"stage": stage, "fingerprint": key, "info": info, "files": files})
    return Artifact(stage, folder, key, info)


def find(folder: Path, stage: str, key: str) -> Artifact | None:
    """Return the finished artifact of this fingerprint, or None if it is absent, other or damaged."""
    content = _manifest(folder)
    if content.get("fingerprint") != key or content.get("stage") != stage:
        return None
    if not all(_is_whole(folder / name, entry) for name, entry in content["files"].items()):
        return None
    return Artifact(stage, folder, key, content["info"])


def _manifest(folder: Path) -> dict[str, Any]:
    """Return a stage's manifest, empty if it is absent or damaged."""
    try:
        content = read_json(folder / MANIFEST)
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]


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


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; call before a model is built."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
