"""How good a classifier is, how close to its teacher, and how sure we are: numpy in, numbers out.

Rows whose target is :data:`~distill.contracts.IGNORE` are left out of every measure that takes targets; a measure
over no rows is NaN. Intervals resample *groups* of rows (an emoji's five vendor drawings, a patient's images): rows of
a group resemble each other, so resampling single rows would claim more certainty than the data gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.contracts import IGNORE

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

NUM_BINS = 15
"""Equal-width confidence bins of the calibration error, the number used by Guo et al. (2017)."""

CHUNK_WEIGHTS = 4_000_000
"""Resampling weights held at once: bounds the memory of a bootstrap at about 100 MB for any data size."""


class Reliability(NamedTuple):
    """The points of a reliability diagram, one a confidence bin; NaN in an empty bin."""

    confidence: Floats  # [bins] mean top-1 probability
    accuracy: Floats  # [bins] share of right predictions
    num_rows: Integers  # [bins]


class PairedDifference(NamedTuple):
    """A paired comparison of two models on the same rows."""

    difference: float  # mean(a) - mean(b)
    ci95: tuple[float, float]
    p_value: float  # two-sided, of "no difference"

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form, with keys ``difference``, ``ci95`` and ``p_value``."""
        return {"difference": self.difference, "ci95": list(self.ci95), "p_value": self.p_value}


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities float64 [N, C] of logits [N, C]."""
    wide = np.asarray(logits, dtype=np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def accuracy(logits: Floats, targets: Integers) -> float:
    """Return the share of labelled rows whose largest logit is the target's; logits [N, C], targets [N]."""
    predictions, known = _labelled_predictions(logits, targets)
    return _mean(predictions == known)


def per_class_recall(logits: Floats, targets: Integers) -> Floats:
    """Return for each class the share of its rows that were predicted as it: float64 [C], NaN without rows."""
    predictions, known = _labelled_predictions(logits, targets)
    num_classes = logits.shape[1]
    rows = np.bincount(known, minlength=num_classes)
    right = np.bincount(known[predictions == known], minlength=num_classes)
    return _divide(right, rows)


def macro_f1(logits: Floats, targets: Integers) -> float:
    """Return the unweighted mean of the F1 of every class that occurs in the targets.

    A class that is predicted but never a target has no term of its own (its rows still cost the class they belong
    to), so all models of one test set are averaged over the same classes. This is scikit-learn's
    ``f1_score(average="macro", labels=unique(targets))``; torchmetrics and scikit-learn's default would also count
    such a class, with an F1 of 0.
    """
    predictions, known = _labelled_predictions(logits, targets)
    num_classes = logits.shape[1]
    rows = np.bincount(known, minlength=num_classes)
    named = np.bincount(predictions, minlength=num_classes)
    right = np.bincount(known[predictions == known], minlength=num_classes)
    return _mean((2 * right / np.maximum(rows + named, 1))[rows > 0])


def reliability(logits: Floats, targets: Integers, num_bins: int = NUM_BINS) -> Reliability:
    """Return confidence, accuracy and row count for equal-width bins ``(low, high]`` of the top-1 probability."""
    predictions, known = _labelled_predictions(logits, targets)
    top = np.exp(log_softmax(logits[targets != IGNORE])).max(axis=1, initial=0.0)
    bins = np.clip(np.ceil(top * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    confidence = np.bincount(bins, weights=top, minlength=num_bins)
    right = np.bincount(bins, weights=predictions == known, minlength=num_bins)
    return Reliability(_divide(confidence, count), _divide(right, count), count)


def ece(logits: Floats, targets: Integers, num_bins: int = NUM_BINS) -> float:
    """Return the expected calibration error of the top-1 probability (Guo et al., 2017, arXiv 1706.04599)."""
    curve = reliability(logits, targets, num_bins)
    if not curve.num_rows.sum():
        return float("nan")
    gaps = np.nan_to_num(np.abs(curve.accuracy - curve.confidence))
    return float(np.average(gaps, weights=curve.num_rows))


def agreement(logits: Floats, reference: Floats) -> float:
    """Return the share of rows on which two models name the same class; both [N, C]."""
    return _mean(logits.argmax(axis=1) == reference.argmax(axis=1))


def kl_divergence(logits: Floats, reference: Floats) -> float:
    """Return the mean over rows of KL(reference || model) in nats, at temperature 1; both [N, C]."""
    expected, given = log_softmax(reference), log_softmax(logits)
    return _mean((np.exp(expected) * (expected - given)).sum(axis=1))


def confusion_matrix(logits: Floats, targets: Integers) -> Integers:
    """Return row counts int64 [C, C]: target class down, predicted class across."""
    predictions, known = _labelled_predictions(logits, targets)
    num_classes = logits.shape[1]
    flat = np.bincount(known * num_classes + predictions, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def cluster_bootstrap(values: Floats, groups: Integers, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of ``values`` [N], resampling whole groups [N]."""
    return interval95(resampled_means(np.asarray(values)[:, None], groups, resamples, seed)[:, 0])


def paired_cluster_bootstrap(
    a: Floats, b: Floats, groups: Integers, resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Compare two models' row values (say, 1 where right) on the same rows: mean(a) - mean(b), all three [N]."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    replicates = resampled_means(difference[:, None], groups, resamples, seed)[:, 0]
    return PairedDifference(_mean(difference), interval95(replicates), two_sided_p(replicates))


def resampled_means(values: Floats, groups: Integers, resamples: int = 2000, seed: int = 0) -> Floats:
    """Return the column means of each bootstrap replicate: values [N, K] and groups [N] give [resamples, K].

    A replicate draws as many groups as there are, with replacement, and takes all their rows (the cluster bootstrap:
    Davison and Hinkley, 1997, section 3.8). Every column sees the same draws, so differences of columns are paired.
    """
    _, codes = np.unique(groups, return_inverse=True)
    if not values.size:
        return np.full((resamples, values.shape[1]), np.nan)
    num_groups = int(codes.max()) + 1
    sums = np.stack([np.bincount(codes, column, num_groups) for column in values.T.astype(np.float64)], axis=1)
    counts = np.bincount(codes, minlength=num_groups).astype(np.float64)
    return np.concatenate([(w @ sums) / (w @ counts)[:, None] for w in _draws(num_groups, resamples, seed)])


def resampled_weights(groups: Integers, resamples: int = 2000, seed: int = 0) -> Iterator[Floats]:
    """Yield, some replicates at a time, how often each drew each row, [r, N]; the draws of :func:`resampled_means`."""
    _, codes = np.unique(groups, return_inverse=True)
    if len(codes):
        for weights in _draws(int(codes.max()) + 1, resamples, seed, len(codes)):
            yield weights[:, codes]


def interval95(replicates: Floats) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of bootstrap replicates [R]."""
    low, high = np.quantile(replicates, (0.025, 0.975))
    return float(low), float(high)


def two_sided_p(replicates: Floats) -> float:
    """Return twice the smaller tail beyond zero of replicates [R] of a difference, at most 1.

    It is the p-value that belongs to the percentile interval: below 0.05 about when the interval leaves out zero.
    One is added to count and total, so the smallest value is 2 / (R + 1), never 0.
    """
    if np.isnan(replicates).any():
        return float("nan")
    tail = min(int((replicates <= 0).sum()), int((replicates >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(replicates) + 1))


def _draws(num_groups: int, resamples: int, seed: int, width: int = 0) -> Iterator[Floats]:
    """Yield, in chunks [r, num_groups] small enough for ``width`` columns, how often each replicate drew each group."""
    generator = np.random.default_rng(seed)
    chunk = max(1, min(resamples, CHUNK_WEIGHTS // max(num_groups, width)))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(num_groups, size=(rows, num_groups))
        drawn += np.arange(rows)[:, None] * num_groups
        yield np.bincount(drawn.ravel(), minlength=rows * num_groups).reshape(rows, -1).astype(np.float64)


def _labelled_predictions(logits: Floats, targets: Integers) -> tuple[Integers, Integers]:
    labelled = targets != IGNORE
    return logits[labelled].argmax(axis=1), targets[labelled]


def _mean(values: NDArray[Any]) -> float:
    return float(np.mean(values)) if values.size else float("nan")


def _divide(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
