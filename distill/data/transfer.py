"""A transfer set: texts without labels, on which a student learns what its teacher says (Hinton et al. 2015,
arXiv 1503.02531).

They are training texts in which random words of the teacher's vocabulary stand in the place of some (word replacement,
as in Tang et al. 2019, arXiv 1903.12136). So the student learns what the teacher makes of words that no training text
has, which labels cannot teach.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from distill.contracts import IGNORE, TRAIN, Batch, Outputs, UserError
from distill.data.loader import Batches, Loader
from distill.data.prepared import PreparedData

SHORTEST = 3  # letters of a word; shorter entries of a vocabulary are mostly no words
LABELLED, TRANSFER = ".labelled", ".transfer"  # behind a model's name: its batch of those rows alone


def whole_words(tokenizer_file: Path) -> list[str]:
    """Return the words, of three letters or more, that a tokenizer keeps in one piece, sorted.

    Raises:
        UserError: it has none, or the file is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{tokenizer_file} is not a tokenizer.json: {' '.join(str(error).split())}") from error
    tokenizer.no_padding()
    found = {tokenizer.decode([token]).strip() for token in range(tokenizer.get_vocab_size())}
    words = sorted(word for word in found if word.isalpha() and len(word) >= SHORTEST)
    whole = [len(encoding.ids) == 1 for encoding in tokenizer.encode_batch(words, add_special_tokens=False)]
    if not any(whole):
        raise UserError(
            f"{tokenizer_file}: no word is a token of its own, so transfer.texts cannot be made; set it to 0"
        )
    return [word for word, kept in zip(words, whole, strict=True) if kept]


def replace_words(
    texts: Sequence[str], words: Sequence[str], count: int, *, probability: float, seed: int
) -> list[str]:
    """Make texts: each is a random one of ``texts`` with some words replaced by random ``words``.

    A word is a run of letters and digits, so a text without spaces between its words counts as one.

    Args:
        texts: to start from.
        words: to put in.
        count: number of texts wanted.
        probability: of replacing a word.
        seed: of every choice.
    """
    random = np.random.default_rng(seed)

    def other(match: re.Match[str]) -> str:
        return words[int(random.integers(len(words)))] if random.random() < probability else match[0]

    return [re.sub(r"\w+", other, texts[int(random.integers(len(texts)))]) for _ in range(count)]


def as_data(texts: list[str], data: PreparedData) -> PreparedData:
    """Return texts as training rows without any target, whose ids follow those of ``data``."""
    first, count = int(data.ids.max()) + 1, len(texts)
    return PreparedData(
        folder=data.folder,
        ids=np.arange(first, first + count),
        split=np.full(count, TRAIN),
        groups=np.arange(count),
        texts=texts,
        images=None,
        present={modality: np.full(count, modality == "text") for modality in data.present},
        targets={task: np.full(count, IGNORE) for task in data.targets},
        labels=data.labels,
    )


class MixedLoader:
    """Batches of labelled rows with rows of a transfer set behind them.

    Steps and epochs are those of the labelled rows. The n-th batch of a run has the n-th batch of the transfer set,
    which starts over as often as needed: so a run can go on at any batch.

    Args:
        labelled: batches of labelled rows.
        transfer: batches of the transfer set, for the same models.
        reads: the trained model, whose batch holds both. Other models' come apart, as ``NAME.labelled`` and
            ``NAME.transfer``; so do ids, views and the like of this one's, for a cached teacher.
        pad_id: token id of that model where its text mask is False.
    """

    def __init__(self, labelled: Batches, transfer: Loader, reads: str, pad_id: int) -> None:
        self.labelled, self.transfer, self.reads, self.pad_id = labelled, transfer, reads, pad_id

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        return len(self.labelled)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Batch]]:
        """Yield the batches of an epoch, from batch ``start`` on."""
        with closing(self._from(epoch * len(self) + start)) as unlabelled:
            for own, other in zip(self.labelled.epoch(epoch, start), unlabelled, strict=False):
                whole = join_batches(own[self.reads], other[self.reads], self.pad_id)
                apart = {f"{name}{LABELLED}": self._apart(name, batch) for name, batch in own.items()}
                apart |= {f"{name}{TRANSFER}": self._apart(name, batch) for name, batch in other.items()}
                yield {self.reads: whole, **apart}

    def _apart(self, name: str, batch: Batch) -> Batch:
        return batch._replace(inputs={}) if name == self.reads else batch

    def _from(self, number: int) -> Generator[dict[str, Batch]]:
        while True:
            epoch, start = divmod(number, len(self.transfer))
            yield from self.transfer.epoch(epoch, start)
            number += len(self.transfer) - start


def join_batches(first: Batch, second: Batch, pad_id: int) -> Batch:
    """Return the rows of ``first``, then those of ``second``; modalities that only one has are absent in the other."""
    rows = len(first.ids), len(second.ids)
    texts = [batch.inputs["text"].shape[1] for batch in (first, second) if "text" in batch.inputs]

    def padded(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        filler = {"text": pad_id, "text_mask": 0}
        return {
            name: F.pad(value, (0, max(texts) - value.shape[1]), value=filler[name]) if name in filler else value
            for name, value in inputs.items()
        }

    return Batch(
        torch.cat([first.ids, second.ids]),
        torch.cat([first.views, second.views]),
        _behind(padded(first.inputs), padded(second.inputs), rows),
        _behind(first.present, second.present, rows),
        _behind(first.targets, second.targets, rows),
    )


def join_outputs(first: Outputs, second: Outputs) -> Outputs:
    """Return outputs for the rows of ``first``, then those of ``second``; what only one has is zero in the other."""
    rows = tuple(len(next(iter(outputs.logits.values()))) for outputs in (first, second))
    return Outputs(*(_behind(mine, other, rows) for mine, other in zip(first, second, strict=True)))


def _behind(first: Mapping[str, Tensor], second: Mapping[str, Tensor], rows: tuple[int, ...]) -> dict[str, Tensor]:
    def part(own: Mapping[str, Tensor], other: Mapping[str, Tensor], count: int, name: str) -> Tensor:
        return own[name] if name in own else other[name].new_zeros((count, *other[name].shape[1:]))

    names = dict.fromkeys([*first, *second])
    return {name: torch.cat([part(first, second, rows[0], name), part(second, first, rows[1], name)]) for name in names}
