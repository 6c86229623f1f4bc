"""Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947): a student learns captions that its teacher writes.

What a teacher finds most probable is easier to learn than what people wrote, which varies: the teacher writes a caption
for each training row by beam search, once, and the student is told it in place of the true one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill import evaluate
from distill.build import input_spec
from distill.config import Recipe
from distill.contracts import IGNORE, TRAIN, Batch, UserError
from distill.data.batches import Batches
from distill.data.hashing import mix
from distill.losses.terms import LOSSES, TEACHING
from distill.progress import progress
from distill.targets import CAPTIONING, LAST
from distill.tasks import CaptionHead
from distill.workspace import TEACHER, Workspace

WRITTEN_FILE = "captions.safetensors"
IDS = "ids"


def write_captions(work: Workspace, folder: Path) -> dict[str, Any]:
    """Let the teacher write a caption for each training row as it is without augmentation, if the recipe wants it.

    ``captions.safetensors`` holds ``ids`` int64 [N], rising, and for each task that has captions int64 [N, L].
    """
    config = work.recipe.cache.captions
    heads = work.recipe.teacher.heads or work.tasks()
    names = [name for name, task in work.tasks().items() if task.kind == CAPTIONING and name in heads]
    if config is None:
        return {}
    path = folder / WRITTEN_FILE
    if work.ranks.first and not path.is_file():
        model: Any = work.teacher()
        for head in model.modules():
            if isinstance(head, CaptionHead):
                head.beams = config.beams
        loader = work.towers(work.clean_loader(TRAIN, input_spec(model), TEACHER), model)
        with progress("write captions", quiet=work.quiet) as report:
            said = evaluate.predict_torch(model, evaluate.clean_batches(loader, TEACHER), report=report)
        ids = loader.data.ids[loader.row_positions]
        arrays = {name: said[f"logits.{name}"].astype(np.int64) for name in names}
        evaluate.write_arrays(path, {IDS: ids, **arrays})
    work.ranks.wait()
    return {"captions": len(evaluate.read_arrays(path)[IDS])}


def as_told(work: Workspace, loader: Batches) -> Batches:
    """Return batches in which the teacher's captions stand in place of true ones, if the recipe wants it."""
    config = work.recipe.cache.captions
    if config is None:
        return loader
    arrays = evaluate.read_arrays(work.path("cache") / WRITTEN_FILE)
    return Retold(loader, arrays.pop(IDS), arrays, config.share, work.recipe.seed)


class Retold(Batches):
    """Batches whose rows are told other captions.

    Args:
        loader: the batches.
        ids: int64 [N], rising, of the rows that have another caption.
        captions: task -> int64 [N, L] token ids, as :class:`~distill.tasks.CaptionHead` writes them.
        share: of these rows that are told it, chosen by a hash of seed and id.
        seed: the run's.
    """

    def __init__(
        self, loader: Batches, ids: NDArray[np.int64], captions: dict[str, NDArray[Any]], share: float, seed: int
    ) -> None:
        key = mix(np.array([seed], np.uint64))
        places = mix(key ^ ids.astype(np.uint64))
        told = np.ones(len(ids), bool) if share >= 1 else places < np.uint64(share * 2**64)
        self._loader, self.workers, self._ids = loader, loader.workers, ids[told]
        self._captions = {name: targets_of(torch.from_numpy(values[told])) for name, values in captions.items()}

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        return len(self._loader)

    def at(self, epoch: int, number: int) -> dict[str, Batch]:
        """Return a batch of an epoch."""
        return {name: self._retold(batch) for name, batch in self._loader.at(epoch, number).items()}

    def _retold(self, batch: Batch) -> Batch:
        wanted = batch.ids.numpy()
        places = np.minimum(np.searchsorted(self._ids, wanted), max(0, len(self._ids) - 1))
        told = torch.from_numpy(self._ids[places] == wanted if len(self._ids) else np.zeros(len(wanted), bool))
        found = {
            name: torch.where(told[:, None], captions[places], batch.targets[name])
            for name, captions in self._captions.items()
            if len(captions)
        }
        return batch._replace(targets={**batch.targets, **found})


def targets_of(written: Tensor) -> Tensor:
    """Return what was written as targets, int64 [N, L]: IGNORE behind the closing token."""
    ended = (written == LAST).cumsum(dim=1) - (written == LAST).long() > 0
    return torch.where(ended, IGNORE, written)


def check_written(recipe: Recipe) -> None:
    """Check that a teacher whose captions are wanted can write, and that nothing is compared under other captions.

    Raises:
        UserError: it cannot, or stored logits are of the true captions.
    """
    if recipe.cache.captions is None:
        return
    heads = recipe.teacher.heads or recipe.data.targets
    if not any(recipe.data.targets[task].kind == CAPTIONING for task in heads):
        raise UserError("cache.captions: the teacher has no task with captions to write; leave it out")
    for number, term in enumerate(recipe.student.objective):
        loss = LOSSES[term.loss]
        if recipe.cache.enabled and loss.kind in TEACHING and CAPTIONING in loss.tasks:
            raise UserError(
                f"student.objective[{number}]: {term.loss} compares under the captions that the student is told, and "
                "the cache holds what the teacher says under the true ones; set cache.enabled to false, or leave out "
                "cache.captions"
            )
