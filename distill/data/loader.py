"""Prepared rows to batches: one :class:`~distill.contracts.Batch` a model, of the same rows and views.

The order of an epoch depends on (seed, epoch) alone, and a batch on its rows and views alone. So a run can go on
at any batch, and the slices of K ranks, put together, are the batch of one rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config import AugmentConfig, TextAugment
from distill.contracts import CLEAN_VIEW, Batch, UserError
from distill.data.prepare import PreparedData
from distill.data.texts import distinct_texts
from distill.data.transforms import augment_images, drop_words
from distill.preprocess import Tokenizer

PREFETCH = 2  # batches made ahead by each worker
GROUPED = 16  # batches in which rows are sorted by the length of their text
CHUNK = 4096  # texts tokenized at a time: a tokenizer's own results take kilobytes a text


@dataclass(frozen=True)
class InputSpec:
    """What one model reads.

    Attributes:
        image: whether it reads images.
        tokenizer: its ``tokenizer.json``; None if it reads no text.
        max_length: most tokens of a text.
        pad_id: token id where the mask is False.
    """

    image: bool
    tokenizer: Path | None
    max_length: int
    pad_id: int = 0


class Batches(Protocol):
    """What the engine reads: a loader, or one whose batches were added to."""

    def __len__(self) -> int:
        """Return the number of batches an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Batch]]:
        """Yield the batches of an epoch, by name of the model that reads them."""


class Loader:
    """Batches of one split for one or more models.

    Attributes:
        data: the prepared data.
        row_positions: int64 [N], positions in ``data`` of the split's rows, in order of id.
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
        group_by_length: bool = False,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
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
            group_by_length: shuffled batches have texts of like length.
            rank: this process, which takes its slice of each global batch.
            world_size: number of processes.
            workers: threads that make batches ahead; with 0 each is made when it is asked for.

        Raises:
            UserError: a model reads a modality that the data lacks, its tokenizer is unusable, or no model reads the
                texts that are to be grouped.
        """
        self.data, self.batch_size, self._seed, self._shuffle = data, batch_size, seed, shuffle
        self.augment = augment if augment != AugmentConfig() else None
        self._views, self._view, self._rank, self._world_size = views, view, rank, world_size
        self._specs, self._workers = specs, workers
        self.row_positions = data.rows(split)
        self.num_rows = len(self.row_positions)
        self._tensors = _RowTensors(data)
        self._texts: dict[InputSpec, _TokenTable] = {}
        for name, spec in specs.items():
            _check_modalities(name, spec, data)
            key = _text_key(spec)
            if spec.tokenizer is not None and key not in self._texts:
                self._texts[key] = _TokenTable(data, self.row_positions, spec)
        self._grouped = group_by_length
        if group_by_length and not self._texts:
            raise UserError(
                f"group_by_length: {' and '.join(specs)} read no text whose length could be told; set it to false"
            )

    def __len__(self) -> int:
        """Return the number of global batches an epoch; the last may be smaller."""
        return -(-self.num_rows // self.batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the positions in ``data`` of an epoch's rows, int64 [N], in the order they are read."""
        if not self._shuffle:
            return self.row_positions
        order = np.random.default_rng((self._seed, epoch)).permutation(self.row_positions)
        return self._by_length(order, epoch) if self._grouped else order

    def _by_length(self, order: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Sort a few batches at a time by length of text, and shuffle them; a smaller last batch stays the last."""
        generator, size = np.random.default_rng((self._seed, epoch, 1)), self.batch_size
        lengths = next(iter(self._texts.values())).lengths(order)
        parts = []
        for start in range(0, len(order), GROUPED * size):
            window = slice(start, start + GROUPED * size)
            rows = order[window][np.argsort(lengths[window], kind="stable")]
            whole = len(rows) // size * size
            parts += [generator.permutation(rows[:whole].reshape(-1, size)).ravel(), rows[whole:]]
        return np.concatenate(parts)

    def view(self, epoch: int) -> int:
        """Return the view that all rows of an epoch have."""
        if self.augment is None:
            return CLEAN_VIEW
        if self._view is not None:
            return self._view
        if not self._shuffle:
            return CLEAN_VIEW
        return epoch % self._views if self._views else epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Batch]]:
        """Yield this rank's slices of an epoch's global batches, from batch ``start`` on.

        The slices of the ranks follow each other in rank order and differ in size by at most one row; a rank has
        an empty one only where the global batch has fewer rows than there are ranks. Batches are made ahead by
        the workers, which end with the iterator; their exceptions are raised here.
        """
        order, view = self.order(epoch), self.view(epoch)

        def make(number: int) -> dict[str, Batch]:
            rows = self._slice(order[number * self.batch_size : (number + 1) * self.batch_size])
            return self.batch(rows, torch.full((len(rows),), view))

        if not self._workers:
            yield from map(make, range(start, len(self)))
            return
        pending: deque[Future[dict[str, Batch]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="loader")
        try:
            for number in range(start, len(self)):
                pending.append(pool.submit(make, number))
                if len(pending) > PREFETCH * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, rows: NDArray[np.int64], views: Tensor) -> dict[str, Batch]:
        """Return one batch a model of exactly these rows and views.

        Args:
            rows: int64 [B], positions in ``data`` of rows of the loader's split.
            views: int64 [B], the view of each row.

        Returns:
            Model name -> batch; ids, views, present, targets and images are the same tensors in all of them.
        """
        index = torch.from_numpy(rows)
        ids = self._tensors.ids[index]
        present = {modality: values[index] for modality, values in self._tensors.present.items()}
        targets = {task: values[index] for task, values in self._tensors.targets.items()}
        images = self._images(rows, ids, views) if any(spec.image for spec in self._specs.values()) else None
        dropping = self.augment.text if self.augment else TextAugment()
        texts = {key: table.batch(rows, ids, views, self._seed, dropping) for key, table in self._texts.items()}
        batches = {}
        for name, spec in self._specs.items():
            inputs = {"image": images} if spec.image and images is not None else {}
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

    def _images(self, rows: NDArray[np.int64], ids: Tensor, views: Tensor) -> Tensor:
        assert self.data.images is not None
        images = torch.from_numpy(self.data.images[rows])
        if self.augment is None:
            return images
        images = augment_images(images, ids, views, self._seed, self.augment.image)
        present = self._tensors.present["image"][torch.from_numpy(rows)]
        return images if bool(present.all()) else images * present.view(-1, 1, 1, 1)  # absent images stay zero


class _RowTensors:
    """The small columns of all rows, as tensors."""

    def __init__(self, data: PreparedData) -> None:
        self.ids = torch.tensor(data.ids)
        self.present = {modality: torch.tensor(values) for modality, values in data.present.items()}
        self.targets = {task: torch.tensor(values) for task, values in data.targets.items()}


class _TokenTable:
    """The tokens of a split's distinct texts, made once: tokenizing in every step would cost more than the step."""

    def __init__(self, data: PreparedData, row_positions: NDArray[np.int64], spec: InputSpec) -> None:
        assert spec.tokenizer is not None
        texts, number = distinct_texts(data.texts, row_positions)
        self._text_of_row = torch.full((len(data),), -1, dtype=torch.int32)
        self._text_of_row[torch.from_numpy(row_positions)] = torch.tensor(number)
        tokenizer = Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id)
        parts = [_tokenized(tokenizer, texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
        shape = len(texts), max((part[0].shape[1] for part in parts), default=1)
        self._tokens = torch.full(shape, spec.pad_id, dtype=torch.int32)  # [distinct texts, longest]
        self._words = torch.full(shape, -1, dtype=torch.int32)
        for start, (tokens, words, _) in zip(range(0, len(texts), CHUNK), parts, strict=True):
            rows = slice(start, start + len(tokens))
            self._tokens[rows, : tokens.shape[1]], self._words[rows, : tokens.shape[1]] = tokens, words
        self._lengths = torch.cat([torch.zeros(0, dtype=torch.int64), *(lengths for _, _, lengths in parts)])
        self._pad_id = spec.pad_id

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each row's text, int64 [N], before any are dropped."""
        return self._lengths[self._text_of_row[torch.from_numpy(rows)]].numpy()

    def batch(
        self, rows: NDArray[np.int64], ids: Tensor, views: Tensor, seed: int, dropping: TextAugment
    ) -> tuple[Tensor, Tensor]:
        """Return tokens int64 [B, L] and mask bool [B, L] after word dropout, moved left; L is the longest row."""
        text = self._text_of_row[torch.from_numpy(rows)]
        assert bool((text >= 0).all()), "rows of another split"
        tokens, mask = self._trim(self._tokens[text], self._lengths[text])
        if not dropping.word_dropout or not bool((views != CLEAN_VIEW).any()):
            return tokens, mask
        if dropping.views:
            views = torch.where(views == CLEAN_VIEW, views, views % dropping.views)
        words = self._words[text, : mask.shape[1]]
        keep = mask & drop_words(words, ids, views, seed, dropping.word_dropout)
        kept_first = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return self._trim(tokens.gather(1, kept_first), keep.sum(dim=1))

    def _trim(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        longest = max(lengths.tolist(), default=0) or 1
        mask = torch.arange(longest) < lengths[:, None]
        return tokens[:, :longest].to(torch.int64).masked_fill_(~mask, self._pad_id), mask


def _tokenized(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and words, int32 [B, L], and lengths, int64 [B]."""
    ids, mask, words = tokenizer.words(texts)
    return torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(words.astype(np.int32)), torch.tensor(mask.sum(1))


def _text_key(spec: InputSpec) -> InputSpec:
    """The part of a spec that decides its text inputs."""
    return replace(spec, image=False)


def _check_modalities(name: str, spec: InputSpec, data: PreparedData) -> None:
    for modality, wanted in (("image", spec.image), ("text", spec.tokenizer is not None)):
        if wanted and modality not in data.present:
            raise UserError(f"model {name!r} reads {modality}, which data.modalities does not name; add it there")
