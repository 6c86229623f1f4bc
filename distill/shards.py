"""Sharded tensors on disk: written once, resumable, hashed, memory-mapped, read at random.

A store is a folder. Each shard is ``NAME.safetensors`` (rows packed by ``distill/records.py``) beside ``NAME.json``,
which holds its key, size, seconds and sha256 and is written after it; so a shard with a fitting entry is whole, a
killed fill goes on with the first one that is not, and ranks that fill disjoint shards need no common journal.
The store's manifest is written when all shards are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save as serialize_arrays
from safetensors.torch import save as serialize
from torch import Tensor

from distill.contracts import UserError
from distill.inventory import INDEX, mark_damaged
from distill.records import describe, describe_packed, pack, unpack
from distill.runs import atomic, check_disk, fingerprint, read_json, room_for, sha256_file, write_json

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_SHARDS = 1024
"""In one run of rows; larger runs get larger shards, as each open shard is a memory mapping of the process."""


class Shard(NamedTuple):
    """A file to be: its name, the hash of all that its content depends on, and its number of rows."""

    name: str
    key: str
    rows: int


Produce = Callable[[int, int, int], dict[str, Tensor]]
"""``(shard number, start, stop) -> tensors`` of the shard's rows ``start:stop``, each [stop - start, ...]."""

Progress = Callable[[int, int], None]
_Arrays = list[tuple[str, np.ndarray]]


def shard_size(rows: int, shard_rows: int) -> int:
    """Return the rows of a shard: ``shard_rows``, or more where that would make too many shards."""
    return max(shard_rows, -(-rows // MOST_SHARDS))


def fill_store(
    folder: Path,
    manifest_name: str,
    shards: Sequence[Shard],
    produce: Produce,
    *,
    index: Mapping[str, np.ndarray],
    content: Mapping[str, Any],
    dtype: str,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write this rank's shards that are not there yet (number ``rank``, ``rank + world_size``, ...), then seal.

    Args:
        folder: the store.
        manifest_name: file name of its manifest, which the rank that ends last writes.
        shards: all shards of the store, the same on every rank.
        produce: computes a batch of rows; it never spans two shards.
        index: small arrays that say where what is, kept beside the shards.
        content: what the manifest says besides.
        dtype: "float32", "float16" or "bfloat16": how floating tensors are stored; others keep their type.
        batch_size: rows a call of ``produce``.
        rank: this process among ``world_size``.
        world_size: how many processes fill the store.
        progress: called with (rows done, rows in all) of this rank.

    Returns:
        The manifest: ``content``, ``tensors`` (name -> row shape and dtype), ``shards``, ``bytes`` (without the
        manifest), ``bytes_per_row``, ``seconds`` (of computing, all ranks); ``{}`` while other ranks are at work.

    Raises:
        UserError: the disk is too small, a value is not finite in ``dtype``, or batches hold different tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = [shards[number] for number in range(rank, len(shards), world_size)]
    whole = [shard for shard in mine if _is_whole(folder, shard)]
    total, done, checked = sum(shard.rows for shard in mine), sum(shard.rows for shard in whole), False
    if len(whole) < len(mine):
        (folder / manifest_name).unlink(missing_ok=True)
    elif progress:
        progress(done, total)
    for number in range(rank, len(shards), world_size):
        shard, parts, began = shards[number], [], time.perf_counter()
        if shard in whole:
            continue
        for start in range(0, shard.rows, batch_size):
            stop = min(start + batch_size, shard.rows)
            parts.append(_stored(produce(number, start, stop), stop - start, dtype, f"{folder}: {shard.name}"))
            if not checked:
                row_bytes = sum(tensor.nbytes for tensor in parts[0].values()) / (stop - start)
                check_disk(folder, int(row_bytes * sum(s.rows for s in shards if not _entry(folder, s))))
                checked = True
            done += stop - start
            if progress:
                progress(done, total)
        _write(folder, shard, parts, began)
    return _seal(folder, manifest_name, shards, index, content)


def open_manifest(folder: Path, manifest_name: str, key: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Read a store's manifest and require that its key is ``key``.

    Args:
        folder: the store.
        manifest_name: its manifest's file name.
        key: the parts that the content must depend on.
        what: the store's name in error messages.

    Raises:
        UserError: there is no finished store, or its key differs; the differing parts are named.
    """
    path = folder / manifest_name
    if not path.is_file():
        raise UserError(f"no finished {what} in {folder}; fill it first")
    try:
        manifest: dict[str, Any] = read_json(path)
        manifest["key"].keys(), manifest["shards"], manifest["tensors"], manifest["index_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has changed since it was written; {_MEND}") from error
    key, absent = json.loads(json.dumps(dict(key))), object()  # as the manifest has it: lists for tuples
    parts = sorted(manifest["key"].keys() | key.keys())
    differing = [part for part in parts if manifest["key"].get(part, absent) != key.get(part, absent)]
    if differing:
        one = differing[0]
        raise UserError(
            f"the {what} in {folder} was made with another {', '.join(differing)} "
            f"({one}: {manifest['key'].get(one, 'absent')!r}, now {key.get(one, 'absent')!r}); fill it again"
        )
    return manifest


class ShardReader:
    """Random access to the rows of a sealed store.

    Shards are memory-mapped; each one's hash is verified when it is first read, once.

    Attributes:
        index: the arrays that were stored with it, memory-mapped.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Read the index and check that every shard is there in its size.

        Args:
            folder: the store.
            manifest: as :func:`open_manifest` returned it.

        Raises:
            UserError: a file is absent or has another size, or the index another hash.
        """
        self.folder, self.shards = folder, list(manifest["shards"])
        if not (folder / INDEX).is_file() or sha256_file(folder / INDEX) != manifest["index_sha256"]:
            raise UserError(f"{folder / INDEX} is absent or has changed since it was written; {_MEND}")
        self.index = _mapped(folder / INDEX)
        self._tensors = manifest["tensors"]
        packed = describe_packed(self._tensors).items()
        self._packed = [(name, tuple(spec["shape"]), getattr(torch, spec["dtype"])) for name, spec in packed]
        self._maps: list[dict[str, np.ndarray] | None] = [None] * len(self.shards)
        for shard in self.shards:
            path = self._path(shard)
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise UserError(f"{path} is absent or has another size than when it was written; {_MEND}")

    def gather(self, numbers: np.ndarray, rows: np.ndarray, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Copy rows out.

        Args:
            numbers: int64 [B], shard of each row.
            rows: int64 [B], row within that shard; both must be in range.
            dtype: of floating tensors; None keeps the stored type.

        Returns:
            name -> [B, ...] on the CPU.

        Raises:
            UserError: a shard that is read for the first time does not have its hash.
        """
        found = {name: torch.empty((len(rows), *shape), dtype=stored) for name, shape, stored in self._packed}
        arrays = [(name, _numpy(tensor)) for name, tensor in found.items()]
        if len(rows) and (numbers == numbers[0]).all():
            self._copy(int(numbers[0]), rows, arrays, slice(None))
        elif len(rows):
            back = self._copy_sorted(numbers, rows, arrays)
            found = {name: tensor.index_select(0, back) for name, tensor in found.items()}
        return unpack(found, self._tensors, dtype)

    def _copy_sorted(self, numbers: np.ndarray, rows: np.ndarray, arrays: _Arrays) -> Tensor:
        """Copy shard by shard into neighbouring rows; return the places of the rows in the order asked for."""
        order = np.argsort(numbers, kind="stable")
        grouped, rows = numbers[order], rows[order]
        edges = [0, *(np.flatnonzero(grouped[1:] != grouped[:-1]) + 1).tolist(), len(rows)]
        for number, start, stop in zip(grouped[edges[:-1]].tolist(), edges[:-1], edges[1:], strict=True):
            self._copy(number, rows[start:stop], arrays, slice(start, stop))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return torch.from_numpy(back)

    def verify(self) -> None:
        """Check the hash of every shard.

        Raises:
            UserError: naming the first that differs.
        """
        for shard in self.shards:
            self._verify(shard)

    def _copy(self, number: int, rows: np.ndarray, arrays: _Arrays, place: slice) -> None:
        maps = self._maps[number]
        if maps is None:
            maps = self._maps[number] = self._map(number)
        for name, array in arrays:
            maps[name].take(rows, axis=0, out=array[place], mode="clip")  # "clip" writes straight into `out`

    def _map(self, number: int) -> dict[str, np.ndarray]:
        path = self._path(self.shards[number])
        self._verify(self.shards[number])
        arrays = _mapped(path)
        if arrays.keys() != {name for name, _, _ in self._packed}:
            raise UserError(f"{path} was written by another version; {_MEND}")
        return arrays

    def _verify(self, shard: Mapping[str, Any]) -> None:
        path = self._path(shard)
        if sha256_file(path) != shard["sha256"]:
            mark_damaged(path)
            raise UserError(f"{path} has changed since it was written; {_MEND}")

    def _path(self, shard: Mapping[str, Any]) -> Path:
        return self.folder / f"{shard['name']}.safetensors"


_MEND = "run the same command again: it makes damaged files again and keeps the others"


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """Return a file's tensors as arrays whose pages are those of the file."""
    with safe_open(path, framework="pt") as file:
        return {name: _numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - it is no dict


def _numpy(tensor: Tensor) -> np.ndarray:
    """Share memory with numpy, which has no bfloat16: its bits go as int16."""
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _stored(tensors: Mapping[str, Tensor], rows: int, dtype: str, where: str) -> dict[str, Tensor]:
    """Bring a batch to the CPU in the stored type, and refuse what that type cannot hold."""
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        assert len(tensor) == rows, f"{where}: {name} has {len(tensor)} rows, expected {rows}"
        if tensor.is_floating_point():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{where}: {name!r} holds NaN or infinite values; check the model and its inputs")
            tensor = tensor.to(DTYPES[dtype])
            if not torch.isfinite(tensor).all():
                raise UserError(f"{where}: {name!r} exceeds the range of {dtype}; store it as bfloat16 or float32")
        result[name] = tensor.cpu()
    return result


def _write(folder: Path, shard: Shard, parts: list[dict[str, Tensor]], began: float) -> None:
    described, packed = describe(parts[0]), [pack(part) for part in parts]
    joined = {name: torch.cat([part[name] for part in packed]) for name in packed[0]}
    data = serialize(joined, metadata={"tensors": json.dumps(described)})
    path = folder / f"{shard.name}.safetensors"
    entry_path = folder / f"{shard.name}.json"
    entry_path.unlink(missing_ok=True)
    with room_for(path, len(data)), atomic(path) as temporary:
        temporary.write_bytes(data)
    entry = {
        "name": shard.name,
        "key": shard.key,
        "rows": shard.rows,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "seconds": time.perf_counter() - began,
        "tensors": described,
    }
    write_json(entry_path, entry)
    _flush_folder(folder)


def _entry(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """Return the entry of a shard that is written, of this key and of its size."""
    path = folder / f"{shard.name}.safetensors"
    try:
        entry: dict[str, Any] = read_json(folder / f"{shard.name}.json")
        same = entry["key"] == shard.key and path.stat().st_size == entry["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry if same else None


def _is_whole(folder: Path, shard: Shard) -> bool:
    """Return whether a shard and all that its entry says of it are as they were written."""
    path, entry = folder / f"{shard.name}.safetensors", _entry(folder, shard)
    if entry is None or sha256_file(path) != entry.get("sha256"):
        return False
    with safe_open(path, framework="pt") as file:
        held = json.loads((file.metadata() or {}).get("tensors", "null"))  # absent from shards of earlier versions
    said = (entry.get("name"), entry.get("rows"), entry.get("tensors"))
    return said == (shard.name, shard.rows, held) and isinstance(entry.get("seconds"), float)


def _seal(
    folder: Path,
    manifest_name: str,
    shards: Sequence[Shard],
    index: Mapping[str, np.ndarray],
    content: Mapping[str, Any],
) -> dict[str, Any]:
    """Write index and manifest if every shard is there."""
    entries = [entry for shard in shards if (entry := _entry(folder, shard))]
    if len(entries) < len(shards):
        return {}
    for entry in entries:
        if entry["tensors"] != entries[0]["tensors"]:
            raise UserError(
                f"{folder}: {entry['name']} holds {entry['tensors']}, {entries[0]['name']} {entries[0]['tensors']}; "
                "the model must give the same outputs for every batch"
            )
    names = {shard.name for shard in shards}
    for path in [*folder.glob("shard-*"), *folder.glob(".shard-*.tmp")]:
        if path.stem not in names:  # of a killed fill, or of one with other views or another shard size
            path.unlink(missing_ok=True)
    data = serialize_arrays(dict(index))
    with atomic(folder / INDEX) as temporary:
        temporary.write_bytes(data)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".tmp" and path.name != manifest_name)
    manifest = dict(content) | {
        "tensors": entries[0]["tensors"],
        "bytes": size,
        "bytes_per_row": size / sum(shard.rows for shard in shards),
        "seconds": round(sum(entry["seconds"] for entry in entries), 3),
        "index_sha256": hashlib.sha256(data).hexdigest(),
        "shards": [{part: entry[part] for part in ("name", "rows", "bytes", "sha256")} for entry in entries],
    }
    write_json(folder / manifest_name, manifest)
    return manifest


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and writes its entries through
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shard_key(key: Mapping[str, Any], *parts: Any) -> str:
    """Return the hash that a shard's entry must have to be kept."""
    return fingerprint(dict(key), *parts)


def array_hash(array: np.ndarray) -> str:
    """Return a 16-digit hash of an array's type, shape and bytes."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()[:16]
