"""The tokens of a split's distinct texts, made once and kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill import runs
from distill.contracts import CLEAN_VIEW
from distill.data.scratch import chunks, scratch, unnamed_file
from distill.data.texts import Texts
from distill.data.transforms import drop_words
from distill.data_config import TextAugment
from distill.preprocess import Tokenizer
from distill.token_rows import TokenRows

CHUNK = 4096  # texts tokenized at a time: a tokenizer's own results take kilobytes a text


class Readable(Protocol):
    """What a model reads of texts."""

    @property
    def tokenizer(self) -> Path | None:
        """Its ``tokenizer.json``."""

    @property
    def max_length(self) -> int:
        """Most tokens of a text."""

    @property
    def pad_id(self) -> int:
        """Token id where the mask is False."""

    @property
    def rows(self) -> TokenRows | None:
        """Its own ids of the tokenizer's; None: they are the same."""


class TokenTable:
    """The tokens of rows' texts: tokenizing in every step would cost more than the step.

    Args:
        texts: of all rows.
        row_positions: int64 [N], the rows that will be read.
        spec: how they are tokenized.
        folder: where tables are kept that are not small, in files without a name.
    """

    def __init__(self, texts: Texts, row_positions: NDArray[np.int64], spec: Readable, folder: Path) -> None:
        assert spec.tokenizer is not None
        self._numbers, self._pad_id = texts.numbers, spec.pad_id
        used = scratch(folder, texts.num_distinct, np.bool_)
        for rows in chunks(len(row_positions)):
            used[texts.numbers[row_positions[rows]]] = True
        self._slots, count = scratch(folder, texts.num_distinct, np.int64, fill=-1), 0  # number -> place in the table
        for part in chunks(texts.num_distinct):
            self._slots[part][used[part]] = count + np.arange(np.count_nonzero(used[part]))
            count += int(np.count_nonzero(used[part]))
        tokenizer = Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id, spec.rows)
        self._ends, done, total = scratch(folder, count + 1, np.int64), 1, 0
        with unnamed_file(folder) as file:
            for strings in texts.distinct(used, CHUNK):
                ids, mask, words = tokenizer.words(strings)
                self._ends[done : done + len(ids)] = total + np.cumsum(mask.sum(1))
                done, total = done + len(ids), total + int(mask.sum())
                pairs = np.stack([ids[mask], words[mask]], axis=1).astype(np.int32)
                with runs.room_for(folder, pairs.nbytes):
                    file.write(pairs.tobytes())
            file.flush()
            self._pairs: NDArray[np.int32] = np.zeros((1, 2), np.int32)  # [tokens of all texts, token and word]
            if total:
                self._pairs = np.asarray(np.memmap(file, np.int32, "r", shape=(total, 2)))

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each row's text, int64 [N], before any are dropped."""
        slots = self._slots[self._numbers[rows]]
        return self._ends[slots + 1] - self._ends[slots]

    def batch(
        self, rows: NDArray[np.int64], ids: Tensor, views: Tensor, seed: int, dropping: TextAugment
    ) -> tuple[Tensor, Tensor]:
        """Return tokens int64 [B, L] and mask bool [B, L] after word dropout, moved left; L is the longest row."""
        slots = self._slots[self._numbers[rows]]
        assert (slots >= 0).all(), "rows of another split"
        starts = self._ends[slots]
        lengths = self._ends[slots + 1] - starts
        places = starts[:, None] + np.arange(lengths.max(initial=1))
        pairs = self._pairs[np.minimum(places, len(self._pairs) - 1)]
        tokens, mask = self._trim(pairs[:, :, 0], lengths)
        if not dropping.word_dropout or not bool((views != CLEAN_VIEW).any()):
            return torch.from_numpy(tokens), torch.from_numpy(mask)
        if dropping.views:
            views = torch.where(views == CLEAN_VIEW, views, views % dropping.views)
        words = torch.from_numpy(np.where(mask, pairs[:, :, 1], -1))
        keep = mask & drop_words(words, ids, views, seed, dropping.word_dropout).numpy()
        kept_first = (~keep).argsort(axis=1, kind="stable")
        tokens, mask = self._trim(np.take_along_axis(tokens, kept_first, axis=1), keep.sum(axis=1))
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def _trim(
        self, tokens: NDArray[np.integer[Any]], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        longest = int(lengths.max(initial=0)) or 1
        mask = np.arange(longest) < lengths[:, None]
        return np.where(mask, tokens[:, :longest], np.int64(self._pad_id)), mask


def count_tokens(
    texts: Texts, row_positions: NDArray[np.int64], tokenizer: Tokenizer, size: int, folder: Path
) -> NDArray[np.int64]:
    """Return how often rows' texts have each token, as far as they are read, int64 [size].

    Args:
        texts: of all rows.
        row_positions: int64 [N], the rows that count; a text of two rows counts twice.
        tokenizer: whose ids are counted.
        size: ids there are.
        folder: where numbers are kept that are not few, in files without a name.
    """
    rows, used = scratch(folder, texts.num_distinct, np.int64), scratch(folder, texts.num_distinct, np.bool_)
    for part in chunks(len(row_positions)):
        numbers = texts.numbers[row_positions[part]]
        np.add.at(rows, numbers, 1)
        used[numbers] = True
    times = (count for part in chunks(texts.num_distinct) for count in rows[part][used[part]])
    counts = np.zeros(size, dtype=np.int64)
    for strings in texts.distinct(used, CHUNK):
        ids, mask = tokenizer(strings)
        often = np.fromiter(times, dtype=np.int64, count=len(strings))
        np.add.at(counts, ids[mask], np.repeat(often, mask.sum(axis=1)))
    return counts
