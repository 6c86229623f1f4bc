"""The teacher cache, and the store that encodes each distinct input of a frozen tower once.

A cached teacher answers ``Batch -> Outputs`` like a live one: it holds the chosen outputs of every row under K
augmentation views, which replayable augmentation makes the same views that the student sees. What the content
depends on is its *key*, a flat dict of named parts; a cache whose key differs is refused, with the part named.
Files are safetensors and JSON (see ``distill/shards.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.contracts import Batch, Outputs, UserError
from distill.inventory import CACHE_MANIFEST
from distill.positions import Positions
from distill.shards import Progress, Shard, ShardReader, array_hash, fill_store, open_manifest, shard_key, shard_size

STORE_MANIFEST = "encoded.json"
MIN_COSINE = 0.999
_USUAL_SHARDS, _FEWEST_ROWS, _MOST_ROWS = 64, 2048, 16_384  # a shard is in memory while it is filled


def flatten(outputs: Outputs) -> dict[str, Tensor]:
    """Return one dict: ``logits.TASK``, ``embeddings.NAME``, ``features.TAP``."""
    return {f"{part}.{name}": value for part in Outputs._fields for name, value in getattr(outputs, part).items()}


def unflatten(tensors: Mapping[str, Tensor]) -> Outputs:
    """Undo :func:`flatten`."""
    outputs = Outputs({}, {}, {})
    for full, value in tensors.items():
        part, name = full.split(".", 1)
        getattr(outputs, part)[name] = value
    return outputs


class TeacherCache:
    """Stored outputs of a teacher for K views of each row; callable like the teacher itself.

    Attributes:
        info: the manifest: ``tensors``, ``rows``, ``views``, ``bytes``, ``bytes_per_row``, ``seconds``, ``key``
        ids: int32 or int64 [N], the sorted ids that it holds, memory-mapped.
        views: the views that it holds, in stored order.
    """

    @staticmethod
    def fill(
        folder: Path,
        *,
        rows: np.ndarray,
        views: Sequence[int],
        produce: Callable[[np.ndarray, int], Outputs],
        key: Mapping[str, Any],
        dtype: str,
        batch_size: int,
        shard_rows: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Store a teacher's outputs; goes on where a killed fill of the same key stopped.

        Every rank calls it with the same arguments but ``rank``; all must be back before the cache is opened.

        Args:
            folder: where to; shards there that have another key are replaced.
            rows: int64 [N] ids, strictly increasing.
            views: the augmentation views to store; ``CLEAN_VIEW`` may be one.
            produce: ``(ids int64 [B], view) -> Outputs`` whose tensors have the ids' order, any device.
            key: what the outputs depend on: part -> JSON value ("teacher", "preprocessing", "data", ...).
            dtype: "float16", "bfloat16" or "float32", of floating tensors.
            batch_size: most rows a call of ``produce``.
            shard_rows: rows a file, more for very large caches; by default 2,048 to 16,384, about 64 files a view. A
                killed fill loses at most one file a rank.
            rank: this process among ``world_size``.
            world_size: processes that fill disjoint shards.
            progress: called with (rows done, rows in all) of this rank, each row counted once a view.

        Returns:
            The manifest, or ``{}`` on a rank that was done before another.

        Raises:
            UserError: the disk is too small, or an output is not finite in ``dtype``.
        """
        assert rows.ndim == 1 and len(rows) and (rows[1:] > rows[:-1]).all(), "ids must be strictly increasing"
        size = shard_size(len(rows), shard_rows or default_shard_rows(len(rows)))
        plan, shards = _plan(rows, views, size, key, dtype)

        def compute(number: int, start: int, stop: int) -> dict[str, Tensor]:
            view, ids = plan[number]
            return flatten(produce(ids[start:stop], view))

        content = {"key": dict(key), "dtype": dtype, "rows": len(rows), "views": list(views), "shard_rows": size}
        return fill_store(
            folder,
            CACHE_MANIFEST,
            shards,
            compute,
            index={"ids": _narrowest(rows)},
            content=content,
            dtype=dtype,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            progress=progress,
        )

    @classmethod
    def open(cls, folder: Path, key: Mapping[str, Any]) -> TeacherCache:
        """Open a filled cache.

        Raises:
            UserError: there is none, it was made with another key (the parts are named), or files are damaged.
        """
        return cls(folder, open_manifest(folder, CACHE_MANIFEST, key, "teacher cache"))

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        """Use :meth:`open`, which checks the key."""
        self.folder, self.info = folder, info
        self.views: list[int] = info["views"]
        self._reader = ShardReader(folder, info)
        self.ids = self._reader.index["ids"]
        self._blocks = len(self._reader.shards) // len(self.views)
        self._positions = Positions(self.ids)
        self._view_order = {view: number for number, view in enumerate(self.views)}

    def lookup(self, ids: Tensor, views: Tensor, dtype: torch.dtype | None = torch.float32) -> Outputs:
        """Read outputs, in the order asked for.

        Args:
            ids: int64 [B].
            views: int64 [B].
            dtype: of floating tensors; None keeps the stored type.

        Returns:
            Outputs on the CPU, rows first.

        Raises:
            UserError: an id or a view is not in the cache, or a shard is damaged.
        """
        rows = ids.cpu().numpy()
        position, known = self._positions.find(rows)
        if not known.all():
            unknown = int(rows[~known][0])
            raise UserError(f"teacher cache {self.folder} does not hold row {unknown}; fill it for these rows")
        size = self.info["shard_rows"]
        numbers = self._view_numbers(views) * self._blocks + position // size
        return unflatten(self._reader.gather(numbers, position % size, dtype))

    def __call__(self, batch: Batch) -> Outputs:
        """Return the stored outputs of a batch's rows and views, float32, on the batch's device."""
        return self.lookup(batch.ids, batch.views).to(batch.ids.device)

    def lookup_each(self, batches: Sequence[Batch]) -> list[Outputs]:
        """Return the stored outputs of each batch, float32, on the CPU; faster than one batch after the other."""
        ids, views = torch.cat([batch.ids for batch in batches]), torch.cat([batch.views for batch in batches])
        sizes = [len(batch.ids) for batch in batches]
        found = {name: tensor.split(sizes) for name, tensor in flatten(self.lookup(ids, views)).items()}
        return [unflatten({name: parts[number] for name, parts in found.items()}) for number in range(len(batches))]

    def verify(self) -> None:
        """Check the hash of every file.

        Raises:
            UserError: naming the first that differs.
        """
        self._reader.verify()

    def check(self, produce: Callable[[np.ndarray, int], Outputs], count: int = 8) -> float:
        """Compute a few rows again and compare them with what is stored.

        Args:
            produce: as given to :meth:`fill`.
            count: rows, spread over the ids; each view takes its share.

        Returns:
            The lowest cosine, over rows and tensors.

        Raises:
            UserError: a cosine is below 0.999; the worst row and output are named.
        """
        picked = np.unique(np.linspace(0, len(self.ids) - 1, min(count, len(self.ids))).round().astype(np.int64))
        worst = (1.0, 0, 0, "")
        for number, view in enumerate(self.views):
            ids = self.ids[picked[number % len(picked) :: len(self.views)]].astype(np.int64)
            if not len(ids):
                continue
            stored = flatten(self.lookup(torch.from_numpy(ids), torch.full((len(ids),), view)))
            fresh = flatten(produce(ids, view))
            if stored.keys() != fresh.keys():
                odd = sorted(stored.keys() ^ fresh.keys())[0]
                raise UserError(
                    f"teacher cache {self.folder}: cache and teacher differ in having {odd!r}; fill it again"
                )
            for name, tensor in stored.items():
                for row, cosine in zip(ids.tolist(), _cosines(tensor, fresh[name]).tolist(), strict=True):
                    worst = min(worst, (cosine, row, view, name))
        if worst[0] < MIN_COSINE:
            raise UserError(
                f"teacher cache {self.folder}: {worst[3]!r} of row {worst[1]}, view {worst[2]}, differs from what the "
                f"teacher gives now (cosine {worst[0]:.4f}, expected {MIN_COSINE}); fill it again"
            )
        return worst[0]

    def _view_numbers(self, views: Tensor) -> np.ndarray:
        wanted = views.cpu().numpy()
        numbers = np.empty(len(wanted), np.int64)
        for view in sorted(set(wanted.tolist())):
            if view not in self._view_order:
                raise UserError(f"teacher cache {self.folder} holds views {self.views}, not {view}; set cache.views")
            numbers[wanted == view] = self._view_order[view]
        return numbers


def encode_once(
    folder: Path,
    *,
    keys: np.ndarray,
    produce: Callable[[np.ndarray], Mapping[str, Tensor]],
    key: Mapping[str, Any],
    dtype: str,
    batch_size: int,
    shard_rows: int = 4096,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compute each distinct input of a frozen tower once, and keep it for all positions that hold it.

    Args:
        folder: where to.
        keys: [M, ...], one row an input (token rows, pixels, ...); inputs equal in bytes are the same input.
        produce: ``positions int64 [B] -> name -> [B, ...]``, the tower's outputs of ``keys[positions]``.
        key: what the outputs depend on, besides ``keys``: part -> JSON value.
        dtype: "float16", "bfloat16" or "float32", of floating tensors.
        batch_size: most positions a call of ``produce``.
        shard_rows: distinct inputs a file, more for large stores.
        rank: this process among ``world_size``.
        world_size: processes that fill disjoint shards.
        progress: called with (distinct inputs done, in all) of this rank.

    Returns:
        The manifest (``inputs``, ``distinct``, ``bytes``, ``seconds``...), or ``{}`` on a rank that was done
        before another.

    Raises:
        UserError: the disk is too small, or an output is not finite in ``dtype``.
    """
    first, slots, digest = _distinct(keys)
    size = shard_size(len(first), shard_rows)
    starts = range(0, len(first), size)
    shards = [
        Shard(f"shard-{i:05d}", shard_key(key, dtype, digest, start, size), min(size, len(first) - start))
        for i, start in enumerate(starts)
    ]

    def compute(number: int, start: int, stop: int) -> dict[str, Tensor]:
        return dict(produce(first[starts[number] + start : starts[number] + stop]))

    content = {"key": dict(key), "dtype": dtype, "inputs": len(slots), "distinct": len(first), "shard_rows": size}
    return fill_store(
        folder,
        STORE_MANIFEST,
        shards,
        compute,
        index={"slots": slots},
        content=content,
        dtype=dtype,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )


class EncodedStore:
    """The outputs of a frozen tower by position, made by :func:`encode_once`.

    Attributes:
        info: the manifest.
        slots: int32 [M], the distinct input that each position holds.
    """

    @classmethod
    def open(cls, folder: Path, key: Mapping[str, Any]) -> EncodedStore:
        """Open a filled store.

        Raises:
            UserError: there is none, it was made with another key (the parts are named), or files are damaged.
        """
        return cls(folder, open_manifest(folder, STORE_MANIFEST, key, "store of encoded inputs"))

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        """Use :meth:`open`, which checks the key."""
        self.folder, self.info = folder, info
        self._reader = ShardReader(folder, info)
        self.slots = self._reader.index["slots"]

    def lookup(self, positions: np.ndarray | Tensor, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
        """Read the outputs of inputs.

        Args:
            positions: integers [B], rows of the ``keys`` that were encoded.
            dtype: of floating tensors; None keeps the stored type.

        Returns:
            name -> [B, ...] on the CPU.

        Raises:
            UserError: a position is out of range, or a shard is damaged.
        """
        wanted = positions.cpu().numpy() if isinstance(positions, Tensor) else np.asarray(positions)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self.slots)):
            odd = int(wanted[(wanted < 0) | (wanted >= len(self.slots))][0])
            raise UserError(f"{self.folder} holds {len(self.slots)} encoded inputs, not position {odd}; fill it again")
        slots = self.slots[wanted].astype(np.int64)
        size = self.info["shard_rows"]
        return self._reader.gather(slots // size, slots % size, dtype)

    def verify(self) -> None:
        """Check the hash of every file.

        Raises:
            UserError: naming the first that differs.
        """
        self._reader.verify()


def default_shard_rows(rows: int) -> int:
    """Return the rows of a shard: a batch reads from every shard, so more rows should not mean many more of them."""
    return min(max(_FEWEST_ROWS, -(-rows // _USUAL_SHARDS)), _MOST_ROWS)


def _plan(
    rows: np.ndarray, views: Sequence[int], size: int, key: Mapping[str, Any], dtype: str
) -> tuple[list[tuple[int, np.ndarray]], list[Shard]]:
    """Return each shard's view and ids, view by view, and the shards."""
    blocks = list(enumerate(rows[start : start + size] for start in range(0, len(rows), size)))
    plan = [(view, ids) for view in views for _, ids in blocks]
    shards = [
        Shard(f"shard-view{view}-{number:05d}", shard_key(key, dtype, view, array_hash(ids)), len(ids))
        for view in views
        for number, ids in blocks
    ]
    return plan, shards


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the first position of each distinct row (int64 [U]), each row's slot (int32 [M]), and a hash of all."""
    digests = np.array([hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in keys], dtype="V16")
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first)  # slots in order of first appearance: neighbours on disk are neighbours in the data
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return first[order].astype(np.int64), rank[inverse.reshape(-1)], array_hash(digests)


def _narrowest(ids: np.ndarray) -> np.ndarray:
    """Halve the bytes of ids that fit into 32 bits."""
    limits = np.iinfo(np.int32)
    return ids.astype(np.int32) if ids[0] >= limits.min and ids[-1] <= limits.max else ids.astype(np.int64)


def _cosines(stored: Tensor, fresh: Tensor) -> Tensor:
    """Return the cosine of each row, float64 [B]; two zero rows agree."""
    a, b = (t.detach().cpu().reshape(len(t), -1).double() for t in (stored, fresh))
    product = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / product.clamp_min(1e-30)
    both_zero = (a.norm(dim=1) < 1e-6) & (b.norm(dim=1) < 1e-6)
    return torch.where(both_zero, torch.ones_like(cosine), cosine)
