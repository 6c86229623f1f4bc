"""How well outputs hit their targets, for each kind of task, over weighted rows: so that a bootstrap may resample them.

Every measure takes weights [R, N] of R resamples (None: one of equal weights) and returns one number a resample. It is
NaN where a resample has nothing to measure. Classes are measured in :mod:`distill.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.contracts import IGNORE
from distill.metrics import Floats
from distill.targets import CAPTIONING, CLASSIFICATION, MULTILABEL, REGRESSION, known

Weights = Floats | None
ALIKE = 0.01  # deviations within which a number is the same

NAMES = {CLASSIFICATION: "accuracy", MULTILABEL: "map", REGRESSION: "r2", CAPTIONING: "cider"}
"""Kind of task -> the measure by which its models are compared, as reports name it."""
LEARNT = NAMES | {CAPTIONING: "token_accuracy"}
"""The same of the validation rows in training: of captions how many tokens are right behind true ones."""
SHOWN = {"accuracy": "accuracy", "map": "mAP", "r2": "R²", "cider": "CIDEr-D"}
"""The same, as people read it."""


def score(kind: str, outputs: Floats, targets: NDArray[Any], weights: Weights = None) -> Floats:
    """Return the measure of :data:`NAMES`, [R]; 1 is perfect. Captions are measured in :mod:`distill.captions`.

    Args:
        kind: of the task.
        outputs: logits [N, C] or [N, K], or standardised numbers [N, K].
        targets: as :class:`~distill.targets.Task` says.
        weights: [R, N].
    """
    return SCORES[kind](outputs, targets, weights)


def score_of(kind: str, said: NDArray[Any], targets: NDArray[Any]) -> float:
    """Return the measure of all rows as one number, of classes and tokens from those that were named, [N, ...]."""
    if kind in (CLASSIFICATION, CAPTIONING):
        return _plain_mean((said == targets)[targets != IGNORE])
    return float(score(kind, said, targets)[0])


def accuracy(logits: Floats, targets: NDArray[Any], weights: Weights = None) -> Floats:
    """Return the share of labelled rows whose largest logit is the target's, [R]."""
    labelled = known(targets)
    rows = _weights(weights, targets)[:, labelled]
    return _divide(rows @ (logits[labelled].argmax(1) == targets[labelled]), rows.sum(1))


def average_precision(logits: Floats, targets: Floats, weights: Weights = None) -> Floats:
    """Return each label's average precision, [R, K]: Σ (recall gained) · precision, over thresholds from high to low.

    Equal logits are one threshold. A label that no row has is NaN.
    """
    return _by_label(logits, targets, weights, _average_precision)


def auroc(logits: Floats, targets: Floats, weights: Weights = None) -> Floats:
    """Return each label's area under the ROC curve, [R, K]: how often a row with it gets a larger logit than one
    without, ties counting half. A label that all rows have, or none, is NaN.
    """
    return _by_label(logits, targets, weights, _auroc)


def mean_average_precision(logits: Floats, targets: Floats, weights: Weights = None) -> Floats:
    """Return the mean of :func:`average_precision` over the labels that some row has, [R] (macro mAP)."""
    return _mean(average_precision(logits, targets, weights))


def r2(values: Floats, targets: Floats, weights: Weights = None) -> Floats:
    """Return the coefficient of determination, the mean over columns, [R]: 1 - Σ (y - f)² / Σ (y - mean y)²."""
    return _mean(_r2(values, targets, _weights(weights, targets)))


def _r2(values: Floats, targets: Floats, rows: Floats) -> Floats:
    """Of each column, [R, K]; NaN where its targets are one number, within rounding."""
    there = known_entries(targets)
    wide = np.where(there, targets, 0.0).astype(np.float64)
    centre = wide.sum(0) / np.maximum(1, there.sum(0))
    filled = np.where(there, wide - centre, 0.0)  # else the sums of squares cancel
    total = rows @ there.astype(np.float64)
    spread = rows @ filled**2 - total * np.nan_to_num(_divide(rows @ filled, total)) ** 2
    error = rows @ np.where(there, (wide - values) ** 2, 0.0)
    rounding = 1e-12 * total * (centre**2 + (filled**2).max(axis=0, initial=0.0))
    return 1 - np.divide(error, spread, out=np.full(spread.shape, np.nan), where=spread > np.maximum(rounding, 1e-12))


def mean_absolute_error(values: Floats, targets: Floats, weights: Weights = None) -> Floats:
    """Return the mean absolute error of each column, [R, K], in the columns' units."""
    rows, there = _weights(weights, targets), known_entries(targets)
    error = np.where(there, np.abs(np.where(there, targets, 0.0) - values), 0.0)
    return _divide(rows @ error, rows @ there.astype(np.float64))


def label_f1(logits: Floats, targets: Floats) -> dict[str, float]:
    """Return ``macro_f1``, ``micro_f1``, ``precision`` and ``recall`` (macro) of labels with a probability above 0.5.

    A label that no row has and none gets counts in no mean.
    """
    there = known_entries(targets)
    said, true = (logits > 0) & there, (targets == 1) & there
    hits, claims, cases = ((said & true).sum(0), said.sum(0), true.sum(0))
    seen = claims + cases > 0

    def share(part: NDArray[Any], whole: NDArray[Any]) -> Any:
        return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)

    means = {
        "macro_f1": share(2 * hits, claims + cases),
        "precision": share(hits, claims),
        "recall": share(hits, cases),
    }
    found = {name: float(values[seen].mean()) if seen.any() else float("nan") for name, values in means.items()}
    whole = claims.sum() + cases.sum()
    return {**found, "micro_f1": float(2 * hits.sum() / whole) if whole else float("nan")}


def agreement(kind: str, outputs: Floats, reference: Floats, weights: Weights = None) -> Floats:
    """Return how alike two models answer, [R]; 1 if all is the same.

    The share of rows on which they name the same class or write the same caption, the share of labels that both give
    or both withhold, or R² of the numbers against the reference's; of a column in which the reference says one number
    everywhere, 1 if the other says it too and else 0.
    """
    rows = _weights(weights, reference)
    if kind == CLASSIFICATION:
        return _divide(rows @ (outputs.argmax(1) == reference.argmax(1)), rows.sum(1))
    if kind == CAPTIONING:
        return _divide(rows @ (outputs == reference).all(1), rows.sum(1))
    if kind == MULTILABEL:
        return _divide(rows @ ((outputs > 0) == (reference > 0)).mean(1), rows.sum(1))
    if not np.isfinite(outputs).all() or np.array_equal(outputs, reference):
        return np.full(len(rows), float(np.isfinite(outputs).all()))
    found = _r2(outputs, reference, rows)
    near = np.abs(outputs.astype(np.float64) - reference).max(axis=0, initial=0.0) <= ALIKE
    return np.where(np.isnan(found), near, found).mean(axis=1)


def known_entries(targets: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which of several targets a row are known, bool [N, K]."""
    return np.asarray(~np.isnan(targets))


def _weights(weights: Weights, targets: NDArray[Any]) -> Floats:
    return np.ones((1, len(targets))) if weights is None else weights


def _by_label(
    logits: Floats, targets: Floats, weights: Weights, measure: Callable[[Floats, Floats, NDArray[np.intp]], Floats]
) -> Floats:
    """A measure of each label's rows in order of falling logit; it is told the place of the last row of equal logit."""
    rows, columns = _weights(weights, targets), []
    for column, truth in zip(logits.T, targets.T, strict=True):
        order = np.argsort(-column, kind="stable")
        order = order[~np.isnan(truth[order])]
        falling = -column[order]
        last = np.searchsorted(falling, falling, side="right") - 1
        columns.append(measure(rows[:, order], truth[order].astype(np.float64), last))
    return np.stack(columns, axis=1)


def _average_precision(rows: Floats, truth: Floats, last: NDArray[np.intp]) -> Floats:
    hits = rows * truth
    precision = _divide(np.cumsum(hits, axis=1)[:, last], np.cumsum(rows, axis=1)[:, last])
    return _divide((hits * np.nan_to_num(precision)).sum(1), hits.sum(1))


def _auroc(rows: Floats, truth: Floats, last: NDArray[np.intp]) -> Floats:
    hits, misses = rows * truth, rows * (1 - truth)
    passed = np.cumsum(misses, axis=1)
    first = np.searchsorted(last, last, side="left")
    before = np.where(first > 0, passed[:, np.maximum(first - 1, 0)], 0.0)
    below = passed[:, -1:] - (before + passed[:, last]) / 2 if passed.shape[1] else passed
    return _divide((hits * below).sum(1), hits.sum(1) * misses.sum(1))


def _mean(values: Floats) -> Floats:
    """Of each row over what is no NaN; NaN where nothing is."""
    there = ~np.isnan(values)
    return _divide(np.where(there, values, 0.0).sum(1), there.sum(1))


def _divide(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """NaN where there is nothing to divide by; what rounding leaves of nothing counts as nothing."""
    there = whole > 1e-12
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=there)


def _plain_mean(values: NDArray[Any]) -> float:
    return float(np.mean(values)) if values.size else float("nan")


SCORES: dict[str, Callable[[Floats, NDArray[Any], Weights], Floats]] = {
    CLASSIFICATION: accuracy,
    MULTILABEL: mean_average_precision,
    REGRESSION: r2,
}
