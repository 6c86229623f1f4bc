"""How near written captions are to true ones: in words, numpy out, one number a row where a measure is one of rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.metrics import Integers
from distill.targets import Task

ORDERS = (1, 2, 3, 4)  # words of an n-gram
SIGMA = 6.0  # of the penalty for another length, in words

NGrams = Counter[tuple[str, ...]]


def cider(written: Sequence[str], true: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return each row's CIDEr-D divided by 10, in [0, 1] (Vedantam et al. 2015, arXiv 1411.5726).

    For n = 1 to 4 the cosine of tf-idf vectors of n-grams, in which a written n-gram counts at most as often as the
    true one has it, times ``exp(-(difference of lengths)² / 2·6²)``; the mean over n, and over the row's true captions.
    The idf is of rows: an n-gram is in a row that has it in any true caption. Words are taken as they stand. An n that
    neither caption has enough words for counts 0, as in the authors' code: so a perfect caption of one word gets 0.25.
    A set of one row, or of rows with equal captions, has an idf of 0, and all get 0.

    Args:
        written: N captions.
        true: the true ones of each row, at least one.
    """
    rows = [(_ngrams(ours), [_ngrams(each) for each in theirs]) for ours, theirs in zip(written, true, strict=True)]
    seen: Counter[tuple[str, ...]] = Counter()
    for _, theirs in rows:
        seen.update({ngram for each in theirs for order in each for ngram in order})
    whole = math.log(max(1, len(rows)))
    return np.array(
        [sum(_similar(ours, each, seen, whole) for each in theirs) / len(theirs) for ours, theirs in rows], np.float64
    )


def exact(written: Sequence[str], true: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
    """Return which captions are one of the row's true ones, word by word, bool [N]."""
    return np.array([ours in theirs for ours, theirs in zip(written, true, strict=True)], bool)


def bleu(written: Sequence[str], true: Sequence[Sequence[str]], order: int) -> float:
    """Return BLEU of n-grams up to an order over all rows and their true captions (Papineni et al. 2002),
    torchmetrics'.
    """
    from torchmetrics.functional.text import bleu_score

    if not len(true):
        return float("nan")
    return float(bleu_score(list(written), true, n_gram=order))


def references(task: Task, ids: NDArray[Any], shown: Integers | None = None) -> list[list[str]]:
    """Return the true captions of each row: its own, and those of the rows that show the same.

    Args:
        task: of captions.
        ids: int64 [N, L].
        shown: int64 [N], equal where rows show the same; None where all differ.
    """
    own = texts(task, ids)
    if shown is None:
        return [[caption] for caption in own]
    found: dict[int, list[str]] = {}
    for number, caption in zip(shown.tolist(), own, strict=True):
        found.setdefault(number, []).append(caption)
    return [found[number] for number in shown.tolist()]


def _ngrams(caption: str) -> list[NGrams]:
    words = caption.split()
    return [Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1)) for n in ORDERS]


def _similar(ours: list[NGrams], theirs: list[NGrams], seen: NGrams, rows: float) -> float:
    lengths = [sum(each[0].values()) for each in (ours, theirs)]
    penalty = math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * SIGMA**2))
    values = []
    for own, other in zip(ours, theirs, strict=True):
        a, b = (_weighted(each, seen, rows) for each in (own, other))
        dot = sum(min(a[ngram], weight) * weight for ngram, weight in b.items() if ngram in a)
        norms = math.sqrt(sum(w * w for w in a.values()) * sum(w * w for w in b.values()))
        values.append(penalty * dot / norms if norms else 0.0)
    return sum(values) / len(ORDERS)


def _weighted(ngrams: NGrams, seen: NGrams, rows: float) -> dict[tuple[str, ...], float]:
    return {ngram: count * (rows - math.log(max(1, seen[ngram]))) for ngram, count in ngrams.items()}


def texts(task: Task, ids: NDArray[Any]) -> list[str]:
    """Return the captions of token ids [N, L] as their task spells them."""
    return [task.text(row) for row in ids]
