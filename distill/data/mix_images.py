"""mixup and CutMix: images of two rows of one global batch made one, alike on every rank.

Partners, shares and boxes are a function of (seed, epoch, number of the batch). A teacher has to see what came of it,
so no cache can answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config import MixImages
from distill.contracts import SHARE, Batch
from distill.data.image_ops import chunks
from distill.targets import known

DRAW = 3  # tells this stream of (seed, epoch, ...) from those of orders


@dataclass(frozen=True)
class Mix:
    """How the images of a global batch are mixed.

    Attributes:
        partners: int64 [B], the row of the batch that each is mixed with.
        share: of a row's own image; of CutMix before its box is cut off at the edges.
        centre: of CutMix's box, row and column as shares of the side; None for mixup.
    """

    partners: NDArray[np.int64]
    share: float
    centre: tuple[float, float] | None


def draw_mix(config: MixImages, key: tuple[int, int, int], num_rows: int) -> Mix | None:
    """Draw what happens to a global batch; None where it stays as it is.

    Args:
        config: strengths and probability.
        key: (seed, epoch, number of the batch).
        num_rows: B.
    """
    random = np.random.default_rng((*key, DRAW))
    drawn, which, down, right = random.random(4).tolist()
    if drawn >= config.probability:
        return None
    total = bool(config.mixup) + bool(config.cutmix)
    cut = bool(config.cutmix) and (total == 1 or which < 0.5)
    alpha = config.cutmix if cut else config.mixup
    return Mix(random.permutation(num_rows), float(random.beta(alpha, alpha)), (down, right) if cut else None)


def mix_batch(batch: Batch, own: Tensor, others: Tensor, mix: Mix) -> Batch:
    """Return rows of a batch with other rows' images mixed in.

    A row without image, or beside one with labels of other tasks than its own, stays as it is.

    Args:
        batch: of a model that reads images alone.
        own: int64 [B], the rows of ``batch`` that are returned.
        others: int64 [B], the rows mixed into them.
        mix: how.

    Returns:
        The rows, with the labels of the others and the share of their own in ``mixed``.
    """
    alike = batch.present["image"][own] & batch.present["image"][others]
    for values in batch.targets.values():
        there = torch.from_numpy(known(values.numpy()))
        alike &= there[own] == there[others]
    others = torch.where(alike, others, own)
    images = batch.inputs["image"]
    if mix.centre is None:
        image, share = _blended(images[own], images[others], mix.share), mix.share
    else:
        image, share = _pasted(images[own], images[others], mix.share, mix.centre)
    rows = batch.ids[own], batch.views[own], {"image": image}
    present, targets = ({name: v[own] for name, v in part.items()} for part in (batch.present, batch.targets))
    mixed = {f"target.{task}": values[others] for task, values in batch.targets.items()}
    return Batch(*rows, present, targets, {SHARE: torch.full((len(own),), share), **mixed})


def _blended(images: Tensor, others: Tensor, share: float) -> Tensor:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412): ``share * image + (1 - share) * other``, rounded."""
    result = torch.empty_like(images)
    for some in chunks(len(images)):
        blend = images[some].float() * share + others[some].float() * (1 - share)
        result[some] = (blend + 0.5).clamp_(0, 255).to(torch.uint8)
    return result


def _pasted(images: Tensor, others: Tensor, share: float, centre: tuple[float, float]) -> tuple[Tensor, float]:
    """CutMix (Yun et al. 2019, arXiv 1905.04899): a box of the other image, about 1 - share of it, in its place.

    Returns:
        Images, and the share of their own that is left.
    """
    size = images.shape[-1]
    side = int(size * (1 - share) ** 0.5)
    top, left = (int(at * size) - side // 2 for at in centre)
    down, right = slice(max(0, top), min(size, top + side)), slice(max(0, left), min(size, left + side))
    result = images.clone()
    result[:, :, down, right] = others[:, :, down, right]
    return result, 1 - (down.stop - down.start) * (right.stop - right.start) / size**2
