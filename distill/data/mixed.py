"""Texts beside the data's own rows: as rows without other modalities, and behind those rows in each batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import TRAIN, Batch, Outputs
from distill.data.batches import Batches
from distill.data.prepared import PreparedData
from distill.targets import missing_like

LABELLED, TRANSFER = ".labelled", ".transfer"  # behind a model's name: its batch of those rows alone


def as_data(texts: list[str], data: PreparedData) -> PreparedData:
    """Return texts as training rows without any target, whose ids follow those of ``data``."""
    first, count = int(data.ids.max()) + 1, len(texts)
    return PreparedData(
        folder=data.folder,
        ids=np.arange(first, first + count),
        split=np.full(count, TRAIN),
        groups=np.arange(count),
        texts=texts,
        codes={},
        arrays={},
        present={modality: np.full(count, modality == "text") for modality in data.present},
        targets={task: missing_like(values, count) for task, values in data.targets.items()},
        tasks=data.tasks,
    )


class MixedLoader(Batches):
    """Batches of the data's rows with texts of another set behind them.

    Steps and epochs are those of the data. The n-th batch of a run has the n-th batch of the other set, which starts
    over as often as needed: so a run can go on at any batch.

    Args:
        labelled: batches of the data's rows.
        transfer: batches of the other set, for the same models.
        reads: the trained model, whose batch holds both. Other models' come apart, as ``NAME.labelled`` and
            ``NAME.transfer``; so do ids, views and the like of this one's, for a cached teacher.
        pad_id: token id of that model where its text mask is False.
    """

    def __init__(self, labelled: Batches, transfer: Batches, reads: str, pad_id: int) -> None:
        self.labelled, self.transfer, self.reads, self.pad_id = labelled, transfer, reads, pad_id
        self.workers = labelled.workers

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        return len(self.labelled)

    def at(self, epoch: int, number: int) -> dict[str, Batch]:
        """Return a batch of an epoch, with the next texts behind it."""
        own = self.labelled.at(epoch, number)
        other = self.transfer.at(*divmod(epoch * len(self) + number, len(self.transfer)))
        whole = join_batches(own[self.reads], other[self.reads], self.pad_id)
        apart = {f"{name}{LABELLED}": self._apart(name, batch) for name, batch in own.items()}
        apart |= {f"{name}{TRANSFER}": self._apart(name, batch) for name, batch in other.items()}
        return {self.reads: whole, **apart}

    def _apart(self, name: str, batch: Batch) -> Batch:
        return batch._replace(inputs={}) if name == self.reads else batch


def join_batches(first: Batch, second: Batch, pad_id: int) -> Batch:
    """Return the rows of ``first``, then those of ``second``; modalities that only one has are absent in the other.

    Inputs that the second has not end with the first: blank images would take longer to make than to leave out.
    """
    rows = len(first.ids), len(second.ids)
    length = max(batch.inputs["text_mask"].shape[1] for batch in (first, second) if "text_mask" in batch.inputs)

    def padded(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: _lengthened(value, length, pad_id if name == "text" else 0) if name.startswith("text") else value
            for name, value in inputs.items()
        }

    return Batch(
        torch.cat([first.ids, second.ids]),
        torch.cat([first.views, second.views]),
        _inputs_behind(padded(first.inputs), padded(second.inputs), rows),
        _behind(first.present, second.present, rows),
        _behind(first.targets, second.targets, rows),
    )


def _inputs_behind(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], rows: tuple[int, int]
) -> dict[str, Tensor]:
    alone = {name: value for name, value in first.items() if name not in second}
    return alone | _behind({name: value for name, value in first.items() if name in second}, second, rows)


def _lengthened(value: Tensor, length: int, filler: int) -> Tensor:
    """[B, L, ...] with a filler behind it, up to a length."""
    return F.pad(value, (0, 0) * (value.ndim - 2) + (0, length - value.shape[1]), value=filler)


def join_outputs(first: Outputs, second: Outputs) -> Outputs:
    """Return outputs for the rows of ``first``, then those of ``second``; what only one has is zero in the other."""
    rows = tuple(next(len(value) for part in outputs for value in part.values()) for outputs in (first, second))
    return Outputs(*(_behind(mine, other, rows) for mine, other in zip(first, second, strict=True)))


def _behind(first: Mapping[str, Tensor], second: Mapping[str, Tensor], rows: tuple[int, ...]) -> dict[str, Tensor]:
    def part(own: Mapping[str, Tensor], other: Mapping[str, Tensor], count: int, name: str) -> Tensor:
        return own[name] if name in own else other[name].new_zeros((count, *other[name].shape[1:]))

    names = dict.fromkeys([*first, *second])
    return {name: torch.cat([part(first, second, rows[0], name), part(second, first, rows[1], name)]) for name in names}
