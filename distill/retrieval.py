"""How well images find their texts and texts their images: numpy in, ranks and shares out.

An image that occurs in several rows is one image with several texts, each of which is right (the protocol of COCO
captions: Karpathy & Fei-Fei 2015, arXiv 1412.2306), and a text that several images share finds any of them. Unlike
there, equal texts of different rows are one text: no query can be beaten by what it looks for. Cosines are computed for
some queries at a time, so that memory does not grow with the square of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.metrics import Floats, Integers

DIRECTIONS = {"image_to_text": ("image", "text"), "text_to_image": ("text", "image")}
"""Name -> modality of the queries, and of what they look for."""
RECALLS = (1, 5, 10)
ZERO_SHOT = ", zero-shot"
"""Behind a task's name: its images are classified by the names of classes, not by a head."""
CELLS = 8_000_000
"""Cosines held at once: bounds the memory at about 50 MB for any number of rows."""
ROUNDING = 1e-6
"""Cosines in float32 that differ by less are equal."""

Embeddings = Mapping[str, Floats]
"""Modality -> [N, D], a row each."""


class Pairs(NamedTuple):
    """Which images and texts belong together; each distinct one counts once."""

    first_rows: dict[str, Integers]  # modality -> [U], the first row that each image or text occurs in
    matches: dict[str, Integers]  # modality -> [M], its side of each distinct pair, as positions in first_rows


class Found(NamedTuple):
    """What each query of one direction found."""

    rank: Integers  # [Q] of the best match, from 1
    average_precision: Floats  # [Q] over all matches


def pairs_of(codes: Mapping[str, Integers], present: Mapping[str, NDArray[np.bool_]]) -> Pairs:
    """Find the distinct images and texts of rows that have both.

    Args:
        codes: "image" and "text" -> int64 [N], equal where the image or text is.
        present: the same -> bool [N].
    """
    rows = np.flatnonzero(present["image"] & present["text"])
    first: dict[str, Integers] = {}
    numbers: dict[str, Integers] = {}
    for modality in ("image", "text"):
        _, places, numbers[modality] = np.unique(codes[modality][rows], return_index=True, return_inverse=True)
        first[modality] = rows[places]
    matches = np.unique(np.stack([numbers["image"], numbers["text"]], axis=1), axis=0)
    return Pairs(first, {"image": matches[:, 0], "text": matches[:, 1]})


def search(embeddings: Embeddings, pairs: Pairs, direction: str) -> Found:
    """Rank what the queries of a direction look for by cosine.

    Ties do not count in one's favour: what does not match, and is as near as a match, comes before it. So a model that
    gives all rows one embedding finds nothing, and neither does one whose embeddings are not finite.

    Args:
        embeddings: of the rows that ``pairs`` was made from; of any length.
        pairs: what belongs together.
        direction: one of ``DIRECTIONS``.

    Returns:
        Rank of the best match, 1 + the number of others that are at least as near; average precision, the mean over a
        query's M matches of m / rank of the m-th.
    """
    asking, sought = DIRECTIONS[direction]
    queries, gallery = (_unit(embeddings[side][pairs.first_rows[side]]) for side in (asking, sought))
    order = np.argsort(pairs.matches[asking], kind="stable")
    owner, match = pairs.matches[asking][order], pairs.matches[sought][order]
    ranks, precisions = np.zeros(len(queries), np.int64), np.zeros(len(queries))
    step = max(1, CELLS // len(gallery))
    for start in range(0, len(queries), step):
        stop = min(len(queries), start + step)
        own = slice(*np.searchsorted(owner, [start, stop]))
        ranks[start:stop], precisions[start:stop] = _ranked(
            queries[start:stop] @ gallery.T, owner[own] - start, match[own]
        )
    return Found(ranks, precisions)


def _ranked(cosines: Floats, owner: Integers, match: Integers) -> tuple[Integers, Floats]:
    """Ranks and average precisions of some queries: cosines [q, G], their matches as pairs, which are overwritten."""
    near = cosines[owner, match]
    cosines[owner, match] = -np.inf  # from here on these are the others
    order = np.lexsort((-near, owner))
    owner, near = owner[order], near[order]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)  # of a match among those of its query
    counts = np.bincount(owner, minlength=len(cosines))
    ranks, total = np.zeros(len(cosines), np.int64), np.zeros(len(cosines))
    for number in range(int(place.max(initial=-1)) + 1):
        mine = place == number
        rows, limit = owner[mine], near[mine] - ROUNDING
        others = cosines if len(rows) == len(cosines) else cosines[rows]
        before = (~(others < limit[:, None])).sum(axis=1)  # what cannot be compared is before, too
        total[rows] += (number + 1) / (before + number + 1)
        if number == 0:
            ranks[rows] = before + 1
    return ranks, total / counts


def scores(embeddings: Embeddings, pairs: Pairs) -> dict[str, dict[str, float]]:
    """Return for each direction ``recall@1``, ``recall@5`` and ``recall@10``, in [0, 1]."""
    ranks = {direction: search(embeddings, pairs, direction).rank for direction in DIRECTIONS}
    return {name: {f"recall@{k}": float(np.mean(rank <= k)) for k in RECALLS} for name, rank in ranks.items()}


def zero_shot_logits(images: Floats, prompts: Floats, num_templates: int, scale: float) -> NDArray[np.float32]:
    """Classify images by prompts (Radford et al. 2021, arXiv 2103.00020).

    A class is the mean of its prompts' embeddings, each of length 1, brought to length 1 again.

    Args:
        images: [N, D], of any length.
        prompts: [C * T, D], the T templates of the first class, then those of the next.
        num_templates: T.
        scale: what cosines are multiplied with.

    Returns:
        [N, C].
    """
    each = _unit(prompts).reshape(-1, num_templates, prompts.shape[1])
    return np.float32(scale) * (_unit(images) @ _unit(each.mean(axis=1)).T)


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    wide = np.asarray(vectors, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a broken model's numbers; they find nothing
        return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.float32(1e-12))
