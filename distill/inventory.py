"""What a filled teacher cache holds, and whether its files are whole: read from its manifests, without torch.

distill cache info FOLDER
distill cache verify FOLDER
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.contracts import UserError
from distill.runs import MANIFEST, read_json, sha256_file

CACHE_MANIFEST = "cache.json"
INDEX = "index.safetensors"
TRANSFER = "transfer"
"""Folder of the answers to the transfer set, inside of the cache's."""

_FIELDS = {"key", "dtype", "rows", "views", "tensors", "bytes", "bytes_per_row", "seconds", "index_sha256", "shards"}


def describe(folder: Path) -> dict[str, Any]:
    """Describe a cache.

    Args:
        folder: the cache's, or that of a run.

    Returns:
        ``folder``, ``rows``, ``views``, ``dtype``, ``outputs`` (name -> row shape and dtype), ``shards`` (count),
        ``bytes`` (without the manifest), ``bytes_per_row`` (a row under one view), ``seconds`` of computing, ``key``
        (part -> value), ``teacher`` (its fingerprint, or None), and ``transfer``: the same of the transfer set's
        part, or None.

    Raises:
        UserError: there is no finished cache, or its manifest is damaged.
    """
    cache = _find(folder)
    return {
        "folder": str(cache),
        **_describe(cache),
        "transfer": _describe(part) if (part := _transfer(cache)) else None,
    }


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file of a cache, and of its transfer part, with the hash that it had when it was written.

    Damaged files get a new time of change, so that the next run reads them and makes them again.

    Args:
        folder: the cache's, or that of a run.

    Returns:
        ``folder``, ``ok``, ``files`` (how many were compared), ``damaged`` (file -> what is wrong with it), and
        ``rows``, ``views``, ``bytes`` of cache and transfer part together (rows and views of the cache alone).

    Raises:
        UserError: there is no finished cache.
    """
    cache = _find(folder)
    parts = [cache, *([part] if (part := _transfer(cache)) else [])]
    damaged: dict[str, str] = {}
    expected: dict[str, Mapping[str, Any]] = {}
    stage = _read(cache / MANIFEST, {"files"})
    if stage is not None:
        expected |= stage["files"]
    elif (cache / MANIFEST).exists():
        damaged[MANIFEST] = "not readable"
    stores = {part: _read(part / CACHE_MANIFEST, _FIELDS) for part in parts}
    for part, store in stores.items():
        prefix = "" if part == cache else f"{part.name}/"
        if store is None:
            damaged[f"{prefix}{CACHE_MANIFEST}"] = "absent or not readable"
            continue
        found = {f"{shard['name']}.safetensors": shard for shard in store["shards"]}
        found[INDEX] = {"sha256": store["index_sha256"]}
        expected = {f"{prefix}{name}": entry for name, entry in found.items()} | expected
    for name, entry in expected.items():
        if name not in damaged and (wrong := _wrong(cache / name, entry)):
            damaged[name] = wrong
    for name in damaged:
        if (cache / name).is_file():
            mark_damaged(cache / name)
    main = stores[cache] or {"rows": None, "views": None}
    return {
        "folder": str(cache),
        "ok": not damaged,
        "files": len(expected | damaged),
        "damaged": damaged,
        "rows": main["rows"],
        "views": main["views"],
        "bytes": sum(store["bytes"] for store in stores.values() if store),
    }


def mark_damaged(path: Path) -> None:
    """Give a file a new time of change, so that the next start of a run reads it, finds the damage and mends it.

    Starts do not read all of a large store (see ``distill.runs.find``).
    """
    with suppress(OSError):
        path.touch()


def render(found: Mapping[str, Any]) -> list[str]:
    """Return a description as lines of text."""
    lines = [found["folder"], *_lines(found), *(f"  {part}: {value}" for part, value in found["key"].items())]
    lines.insert(len(_lines(found)) + 1, "depends on")
    if found["transfer"]:
        lines += ["transfer set", *_lines(found["transfer"])]
    return lines


def _lines(found: Mapping[str, Any]) -> list[str]:
    size = f"{found['bytes']:,} bytes in {found['shards']} shards, {found['bytes_per_row']:.1f} a row and view"
    lines = [f"rows: {found['rows']:,}", f"views: {', '.join(map(str, found['views']))}", f"size: {size}"]
    lines += [f"computed in: {found['seconds']:.1f} s", "outputs"]
    return lines + [f"  {name}: {spec['shape']} {spec['dtype']}" for name, spec in found["outputs"].items()]


def _find(folder: Path) -> Path:
    for cache in (folder, folder / "cache"):
        finished = _read(cache / MANIFEST, {"stage"}) or {}
        if (cache / CACHE_MANIFEST).is_file() or finished.get("stage") == "cache":
            return cache
    raise UserError(
        f"{folder} holds no finished teacher cache; give the folder of a cache or of a run whose cache is filled "
        "(`distill cache RECIPE` fills it)"
    )


def _transfer(cache: Path) -> Path | None:
    part = cache / TRANSFER
    return part if part.is_dir() else None


def _describe(part: Path) -> dict[str, Any]:
    store = _read(part / CACHE_MANIFEST, _FIELDS)
    if store is None:
        raise UserError(f"{part / CACHE_MANIFEST} is absent or not readable; `distill cache RECIPE` writes it again")
    same = {name: store[name] for name in ("rows", "views", "dtype", "bytes", "bytes_per_row", "seconds", "key")}
    return {**same, "outputs": store["tensors"], "shards": len(store["shards"]), "teacher": store["key"].get("teacher")}


def _read(path: Path, fields: set[str]) -> dict[str, Any] | None:
    """Return a JSON object that has these fields, or None."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and fields <= value.keys() else None


def _wrong(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return "absent"
    size = path.stat().st_size
    if size != expected.get("bytes", size):
        return f"{size} bytes instead of {expected['bytes']}"
    return None if sha256_file(path) == expected["sha256"] else "other content than when it was written"
