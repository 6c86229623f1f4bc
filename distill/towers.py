"""Frozen towers: their outputs are computed once for each distinct input and kept on disk.

A frozen tower says the same of the same input in every epoch and every stage. So the inputs of all rows and views
are collected, equal ones are encoded once, and :class:`WithTowers` puts what was kept into the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from distill.batch_parts import InParts
from distill.build import Model
from distill.cache import STORE_MANIFEST, EncodedStore, encode_once
from distill.contracts import CLEAN_VIEW, Batch
from distill.data.batches import Batches
from distill.data.loader import Loader
from distill.formats import TEXT
from distill.progress import Progress
from distill.ranks import Ranks
from distill.runs import read_json

CHUNK = 64  # inputs a forward of a tower
POSITIONS = "positions.safetensors"


@dataclass(frozen=True)
class Rows:
    """All rows of a loader's split under one view; the loader's one spec is named ``reads``."""

    loader: Loader
    view: int


def frozen_towers(model: Model) -> list[str]:
    """Modalities whose encoder is frozen and can be run apart from the model."""
    return [name for name, encoder in model.encoders.items() if encoder.frozen and hasattr(encoder, "encode")]


def encode_towers(
    model: Model,
    sources: Mapping[str, Sequence[Rows]],
    folder: Path,
    *,
    reads: str,
    key: Mapping[str, Any],
    report: Progress,
    ranks: Ranks,
) -> dict[str, Any]:
    """Encode every distinct input of a model's frozen towers, one subfolder a modality.

    Args:
        model: the model, in eval mode.
        sources: modality of a frozen tower -> the rows and views that later stages will read.
        folder: where to.
        reads: name of the model's batch in the loaders.
        key: what the outputs depend on besides the inputs.
        report: progress in distinct inputs.
        ranks: who shares the work.

    Returns:
        modality -> number of inputs and of distinct ones, bytes, seconds.
    """
    info, in_parts = {}, InParts()
    for name in frozen_towers(model):
        inputs = _text_inputs(sources[name], reads) if name == TEXT else _row_inputs(sources[name], name)
        encoder: Any = model.encoders[name].to(ranks.device)

        def produce(
            positions: NDArray[np.int64], *, encoder: Any = encoder, inputs: _Inputs = inputs
        ) -> dict[str, Tensor]:
            with torch.inference_mode():
                tokens = in_parts(lambda some: inputs.encode(encoder, positions[some]), len(positions), torch.cat)
            return {"tokens": tokens}

        encode_once(
            folder / name,
            keys=inputs.keys,
            produce=produce,
            key=dict(key),
            dtype="float16",
            batch_size=CHUNK,
            rank=ranks.rank,
            world_size=ranks.count,
            progress=report,
        )
        ranks.wait()
        if ranks.first:
            save_file({"ids": inputs.ids, "views": inputs.views}, folder / name / POSITIONS)
        made = read_json(folder / name / STORE_MANIFEST)
        info[name] = {field: made[field] for field in ("inputs", "distinct", "bytes", "seconds")}
    return info


class TowerOutputs:
    """The kept outputs of one frozen tower, by row id and view.

    Args:
        folder: the modality's subfolder of :func:`encode_towers`.
        key: as given there.
        repeat: number of views after which inputs repeat; None where each view was encoded.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], repeat: int | None = None) -> None:
        self._repeat = repeat
        self._store = EncodedStore.open(folder, dict(key))
        kept = load_file(folder / POSITIONS)
        self._by_view = {}
        for view in np.unique(kept["views"]).tolist():
            positions = np.flatnonzero(kept["views"] == view)
            order = np.argsort(kept["ids"][positions])
            self._by_view[view] = (kept["ids"][positions][order], positions[order])

    def lookup(self, batch: Batch) -> Tensor:
        """Return the tower's tokens for a batch's rows and views: float32 [B, T, D]."""
        ids, views = batch.ids.numpy(), batch.views.numpy()
        if self._repeat:
            views = np.where(views == CLEAN_VIEW, views, views % self._repeat)
        positions = np.empty(len(ids), dtype=np.int64)
        for view in np.unique(views).tolist():
            known, places = self._by_view[view]
            chosen = views == view
            positions[chosen] = places[np.searchsorted(known, ids[chosen])]
        return self._store.lookup(positions)["tokens"]


class WithTowers(Batches):
    """A loader whose batches of one model carry the kept outputs of frozen towers in place of raw inputs.

    Args:
        loader: the loader.
        towers: modality -> kept outputs.
        reads: name of the model's batch.
    """

    def __init__(self, loader: Loader, towers: Mapping[str, TowerOutputs], reads: str) -> None:
        self.loader, self.towers, self.reads = loader, towers, reads
        self.row_positions, self.data, self.workers = loader.row_positions, loader.data, loader.workers

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        return len(self.loader)

    def at(self, epoch: int, number: int) -> dict[str, Batch]:
        """As :meth:`distill.data.loader.Loader.at`."""
        return self._filled(self.loader.at(epoch, number))

    def batch(self, rows: NDArray[np.int64], views: Tensor) -> dict[str, Batch]:
        """As :meth:`distill.data.loader.Loader.batch`."""
        return self._filled(self.loader.batch(rows, views))

    def _filled(self, batches: dict[str, Batch]) -> dict[str, Batch]:
        batch = batches[self.reads]
        inputs = dict(batch.inputs)
        for name, tower in self.towers.items():
            if name not in inputs:
                continue
            raw = inputs.pop(name)
            tokens = tower.lookup(batch)
            inputs[f"{name}_encoded"] = tokens[:, : raw.shape[1]] if name == TEXT else tokens
        return {**batches, self.reads: batch._replace(inputs=inputs)}


@dataclass(frozen=True)
class _Inputs:
    """M inputs of a tower: what tells them apart, whose they are, and how they are encoded."""

    keys: NDArray[np.int64]  # [M, ...]
    ids: NDArray[np.int64]  # [M]
    views: NDArray[np.int64]  # [M]
    encode: Callable[[Any, NDArray[np.int64]], Tensor]  # (encoder, positions) -> [B, T, D]


def _text_inputs(sources: Sequence[Rows], reads: str) -> _Inputs:
    """Token rows, told apart by content and sorted by length, so that a chunk has little padding."""
    parts, ids, views = [], [], []
    for source in sources:
        for rows in np.array_split(source.loader.row_positions, -(-len(source.loader.row_positions) // 1024)):
            batch = source.loader.batch(rows, torch.full((len(rows),), source.view))[reads]
            lengths = batch.inputs["text_mask"].sum(1, keepdim=True)
            parts.append(torch.cat([lengths, batch.inputs["text"]], dim=1).numpy())
            ids.append(batch.ids.numpy())
            views.append(batch.views.numpy())
    width = max(part.shape[1] for part in parts)
    keys = np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])
    order = np.argsort(keys[:, 0], kind="stable")
    keys = keys[order]

    def encode(encoder: Any, positions: NDArray[np.int64]) -> Tensor:
        chosen = torch.from_numpy(keys[positions])
        lengths = chosen[:, 0]
        longest = max(1, int(lengths.max()))  # of absent texts: towers need a column
        text = chosen[:, 1 : longest + 1]
        mask = torch.arange(longest) < lengths[:, None]
        device = next(encoder.parameters()).device
        tokens = encoder.encode(text.to(device), mask.to(device))
        return tokens if encoder.projected else torch.nn.functional.pad(tokens, (0, 0, 0, width - 1 - longest))

    return _Inputs(keys, np.concatenate(ids)[order], np.concatenate(views)[order], encode)


def _row_inputs(sources: Sequence[Rows], modality: str) -> _Inputs:
    """Images and the like: every (row, view) is an input of its own."""
    counts = [len(source.loader.row_positions) for source in sources]
    rows = np.concatenate([source.loader.row_positions for source in sources])
    number = np.repeat(np.arange(len(sources)), counts)
    views = np.repeat([source.view for source in sources], counts)
    ids = sources[0].loader.data.ids[rows]

    def encode(encoder: Any, positions: NDArray[np.int64]) -> Tensor:
        tokens: dict[int, Tensor] = {}
        device = next(encoder.parameters()).device
        for at in np.unique(number[positions]):
            here = positions[number[positions] == at]
            (batch,) = sources[at].loader.batch(rows[here], torch.from_numpy(views[here])).values()
            own = [value.to(device) for value in batch.inputs_of(modality).values()]
            tokens.update(zip(here.tolist(), encoder.encode(*own), strict=True))
        return torch.stack([tokens[position] for position in positions.tolist()])

    return _Inputs(np.stack([ids, views], axis=1), ids, views, encode)
