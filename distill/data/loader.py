"""Prepared rows to batches: one :class:`~distill.contracts.Batch` a model, of the same rows and views.

The order of an epoch depends on (seed, epoch) alone, and a batch on its rows and views alone. So a run can go on
at any batch, and the slices of K ranks, put together, are the batch of one rank.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config import ClassBalance, MixImages
from distill.contracts import CLEAN_VIEW, INPUTS, Batch, UserError
from distill.data.augment import augment
from distill.data.batches import Batches
from distill.data.class_balance import drawn_rows
from distill.data.hashing import mix
from distill.data.mix_images import draw_mix, mix_batch
from distill.data.order import GroupedOrder, Order, TwoLevelOrder, draw_hashes, shuffled
from distill.data.prepared import PreparedData
from distill.data.texts import Texts
from distill.data.tokens import TokenTable
from distill.data_config import AugmentConfig, TextAugment
from distill.formats import TABULAR, TEXT
from distill.token_rows import TokenRows

KEPT_ORDERS = 2  # of the epochs that threads may be at


@dataclass(frozen=True)
class InputSpec:
    """What one model reads.

    Attributes:
        media: modalities that it reads, text aside.
        tokenizer: its ``tokenizer.json``; None if it reads no text.
        max_length: most tokens of a text.
        pad_id: token id where the mask is False.
        rows: its own ids of the tokenizer's, after its vocabulary was pruned; None: they are the same.
    """

    media: tuple[str, ...] = ()
    tokenizer: Path | None = None
    max_length: int = 0
    pad_id: int = 0
    rows: TokenRows | None = None

    @property
    def modalities(self) -> list[str]:
        """All that it reads."""
        return [*self.media, *([TEXT] if self.tokenizer is not None else [])]

    def only(self, modalities: Collection[str]) -> InputSpec:
        """What a part of the model reads, which has no other modality."""
        tokenizer = self.tokenizer if TEXT in modalities else None
        return replace(self, media=tuple(name for name in self.media if name in modalities), tokenizer=tokenizer)


class Loader(Batches):
    """Batches of one split for one or more models.

    Attributes:
        data: the prepared data.
        row_positions: int64 [N], positions in ``data`` of the split's rows that it reads, in order of id.
        num_rows: N.
        batch_size: rows of a global batch, over all ranks.
        augment: the augmentation in use; None where every view is clean.
    """

    def __init__(
        self,
        data: PreparedData,
        split: str,
        specs: dict[str, InputSpec],
        *,
        batch_size: int,
        seed: int,
        augment: AugmentConfig | None,
        views: int | None = None,
        view: int | None = None,
        shuffle: bool,
        labelled: bool = False,
        class_balance: ClassBalance | None = None,
        mix_images: MixImages | None = None,
        group_by_length: bool = False,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        two_level_rows: int = 10**8,
    ) -> None:
        """Tokenize the split's texts, once for each distinct tokenizer.

        Args:
            data: the prepared data.
            split: train, valid or test.
            specs: model name -> what it reads.
            batch_size: rows of a global batch, over all ranks.
            seed: of the epoch order and of the augmentation.
            augment: None for clean rows.
            views: number of views that repeat from epoch to epoch (a teacher cache has K); None: a new view an epoch.
            view: the one view of every epoch, augmented also where ``shuffle`` is False.
            shuffle: a new order each epoch. Without it rows come in order of id, and clean unless ``view`` is given.
            labelled: only rows with a label of any task.
            class_balance: shuffled rows are drawn with replacement, those of rare classes more often. Where views
                repeat, each draw has one of them by itself: so a row that is drawn often is not the same each time.
            mix_images: batches that :meth:`at` returns have their images mixed; all models read images alone.
            group_by_length: shuffled batches have texts of like length.
            rank: this process, which takes its slice of each global batch.
            world_size: number of processes.
            workers: threads that make batches ahead.
            two_level_rows: rows of the split above which the order of an epoch has two levels.

        Raises:
            UserError: a model reads a modality that the data lacks, its tokenizer is unusable, or no model reads the
                texts that are to be grouped.
        """
        self.data, self.batch_size, self._seed, self._shuffle = data, batch_size, seed, shuffle
        self.augment = augment if augment != AugmentConfig() else None
        self._views, self._view, self._rank, self._world_size = views, view, rank, world_size
        self._specs, self.workers = specs, workers
        self.row_positions = data.rows(split, labelled=labelled)
        self.num_rows = len(self.row_positions)
        self._two_level_rows = two_level_rows
        self._drawn = drawn_rows(data, split, self.row_positions, class_balance) if class_balance and shuffle else None
        self._mix = mix_images
        texts = data.texts if isinstance(data.texts, Texts) else Texts.of(data.texts)
        self._texts: dict[InputSpec, TokenTable] = {}
        for name, spec in specs.items():
            _check_modalities(name, spec, data)
            key = _text_key(spec)
            if spec.tokenizer is not None and key not in self._texts:
                self._texts[key] = TokenTable(texts, self.row_positions, spec, data.folder)
        self._inputs = {name: [key for key in INPUTS if key.split("_")[0] == name] for name in data.present}
        records: Any = data.formats.get(TABULAR)
        self._numbers = len(records.numbers) if records else 0
        self._orders: dict[int, Order] = {}
        self._lock = Lock()
        self._grouped = group_by_length
        if group_by_length and not self._texts:
            raise UserError(
                f"group_by_length: {' and '.join(specs)} read no text whose length could be told; set it to false"
            )

    def __len__(self) -> int:
        """Return the number of global batches an epoch; the last may be smaller."""
        return -(-self.num_rows // self.batch_size)

    def order(self, epoch: int) -> Order:
        """Return the positions in ``data`` of an epoch's rows, in the order they are read."""
        if not self._shuffle:
            return self.row_positions
        if self._drawn is not None:
            return self._in_groups(self._drawn.order(self._seed, epoch), epoch)
        two_levels = self.num_rows > self._two_level_rows
        order: Order = (
            TwoLevelOrder(self.row_positions, self._seed, epoch)
            if two_levels
            else shuffled(self.row_positions, self._seed, epoch, self.data.folder)
        )
        return self._in_groups(order, epoch)

    def _in_groups(self, order: Order, epoch: int) -> Order:
        if not self._grouped:
            return order
        return GroupedOrder(order, next(iter(self._texts.values())).lengths, self.batch_size, self._seed, epoch)

    def view(self, epoch: int) -> int:
        """Return the view that all rows of an epoch have."""
        if self.augment is None:
            return CLEAN_VIEW
        if self._view is not None:
            return self._view
        if not self._shuffle:
            return CLEAN_VIEW
        return epoch % self._views if self._views else epoch

    def at(self, epoch: int, number: int) -> dict[str, Batch]:
        """Return this rank's slice of a global batch of an epoch.

        The slices of the ranks follow each other in rank order and differ in size by at most one row; a rank has
        an empty one only where the global batch has fewer rows than there are ranks.
        """
        with self._lock:
            if epoch not in self._orders:
                if len(self._orders) == KEPT_ORDERS:
                    del self._orders[next(iter(self._orders))]
                self._orders[epoch] = self.order(epoch)
            order = self._orders[epoch]
        start = number * self.batch_size
        rows = order[start : start + self.batch_size]
        views = self._views_of(epoch, start, len(rows))
        mixing = None if self._mix is None else draw_mix(self._mix, (self._seed, epoch, number), len(rows))
        own = self._slice(np.arange(len(rows)))
        if mixing is None:
            return self.batch(rows[own], views[own])
        read, places = np.unique(np.concatenate([own, mixing.partners[own]]), return_inverse=True)
        first, second = torch.from_numpy(places[: len(own)]), torch.from_numpy(places[len(own) :])
        batches = self.batch(rows[read], views[read])
        return dict.fromkeys(batches, mix_batch(next(iter(batches.values())), first, second, mixing))

    def _views_of(self, epoch: int, start: int, count: int) -> Tensor:
        """The views of an epoch's places from ``start`` on, [count]."""
        view = self.view(epoch)
        if self._drawn is None or not self._views or self._view is not None or view == CLEAN_VIEW:
            return torch.full((count,), view)
        others = mix(~draw_hashes(self._seed, epoch, start, start + count)) % np.uint64(self._views)
        return torch.from_numpy((view + others.astype(np.int64)) % self._views)

    def batch(self, rows: NDArray[np.int64], views: Tensor) -> dict[str, Batch]:
        """Return one batch a model of exactly these rows and views.

        Args:
            rows: int64 [B], positions in ``data`` of rows of the loader's split.
            views: int64 [B], the view of each row.

        Returns:
            Model name -> batch; ids, views, present, targets and media are the same tensors in all of them.
        """
        ids = torch.from_numpy(self.data.ids[rows])
        present = {modality: torch.from_numpy(values[rows]) for modality, values in self.data.present.items()}
        targets = {task: torch.from_numpy(values[rows]) for task, values in self.data.targets.items()}
        read = dict.fromkeys(name for spec in self._specs.values() for name in spec.media)
        media = {name: self._media(name, rows, ids, views, present[name]) for name in read}
        dropping = self.augment.text if self.augment else TextAugment()
        texts = {key: table.batch(rows, ids, views, self._seed, dropping) for key, table in self._texts.items()}
        batches = {}
        for name, spec in self._specs.items():
            inputs = {key: value for modality in spec.media for key, value in media[modality].items()}
            if spec.tokenizer is not None:
                inputs["text"], inputs["text_mask"] = texts[_text_key(spec)]
            batches[name] = Batch(ids, views, inputs, present, targets)
        return batches

    @staticmethod
    def clean_views(num_rows: int) -> Tensor:
        """Return the views of rows that are not augmented, int64 [B]."""
        return torch.full((num_rows,), CLEAN_VIEW)

    def _slice(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        first, last = (len(rows) * rank // self._world_size for rank in (self._rank, self._rank + 1))
        return rows[first:last]

    def _media(
        self, modality: str, rows: NDArray[np.int64], ids: Tensor, views: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """A modality's inputs; what is absent stays zeros."""
        inputs = {name: torch.from_numpy(self.data.arrays[name][rows]) for name in self._inputs[modality]}
        if self.augment is None:
            return inputs
        inputs |= augment(modality, inputs, ids, views, self._seed, self.augment, self._numbers)
        if bool(present.all()):
            return inputs
        return {name: value * present.view(-1, *[1] * (value.ndim - 1)) for name, value in inputs.items()}


def _text_key(spec: InputSpec) -> InputSpec:
    """The part of a spec that decides its text inputs."""
    return replace(spec, media=())


def _check_modalities(name: str, spec: InputSpec, data: PreparedData) -> None:
    for modality in spec.modalities:
        if modality not in data.present:
            raise UserError(f"model {name!r} reads {modality}, which data.modalities does not name; add it there")
