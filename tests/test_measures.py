"""Measures of labels and numbers, against scikit-learn and torchmetrics, and under resampling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multilabel_auroc, multilabel_average_precision, multilabel_f1_score
from torchmetrics.functional.regression import r2_score

from distill import measures
from distill.targets import CLASSIFICATION, MULTILABEL, REGRESSION


def labels(seed, rows=40, columns=3, ties=False):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, columns)).astype(np.float32)
    targets = (generator.random((rows, columns)) < 0.3).astype(np.float32)
    targets[0], targets[1] = 1, 0
    return (np.round(logits) if ties else logits), targets


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_labels_are_measured_as_torchmetrics_does(seed, ties):
    logits, targets = labels(seed, ties=ties)
    given_, expected = torch.from_numpy(logits).sigmoid(), torch.from_numpy(targets).long()
    precision = multilabel_average_precision(given_, expected, num_labels=3, average="none").numpy()
    area = multilabel_auroc(given_, expected, num_labels=3, average="none").numpy()
    f1 = multilabel_f1_score(given_, expected, num_labels=3, average="macro").item()
    assert measures.average_precision(logits, targets)[0] == pytest.approx(precision, abs=1e-6)
    assert measures.auroc(logits, targets)[0] == pytest.approx(area, abs=1e-6)
    assert measures.score(MULTILABEL, logits, targets)[0] == pytest.approx(precision.mean(), abs=1e-6)
    assert measures.label_f1(logits, targets)["macro_f1"] == pytest.approx(f1, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_measured_as_torchmetrics_does(seed):
    generator = np.random.default_rng(seed)
    values, targets = generator.normal(size=(2, 30, 2)).astype(np.float32)
    expected = r2_score(torch.from_numpy(values), torch.from_numpy(targets), multioutput="uniform_average").item()
    assert measures.score(REGRESSION, values, targets)[0] == pytest.approx(expected, abs=1e-5)
    assert measures.mean_absolute_error(values, targets)[0] == pytest.approx(np.abs(values - targets).mean(0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([CLASSIFICATION, MULTILABEL, REGRESSION]))
def test_a_weight_of_k_is_k_copies_of_a_row(seed, kind):
    generator = np.random.default_rng(seed)
    outputs = np.round(generator.normal(size=(12, 3)), 1).astype(np.float32)
    targets = {
        CLASSIFICATION: generator.integers(0, 3, 12),
        MULTILABEL: (generator.random((12, 3)) < 0.5).astype(np.float32),
        REGRESSION: generator.normal(size=(12, 3)).astype(np.float32),
    }[kind]
    if kind != CLASSIFICATION:
        targets[generator.random(targets.shape) < 0.2] = np.nan
    copies = generator.integers(0, 4, 12)
    rows = np.repeat(np.arange(12), copies)
    weighted = measures.score(kind, outputs, targets, np.stack([copies, np.ones(12)]).astype(np.float64))
    assert weighted[0] == pytest.approx(measures.score(kind, outputs[rows], targets[rows])[0], nan_ok=True, abs=1e-9)
    assert weighted[1] == pytest.approx(measures.score(kind, outputs, targets)[0], nan_ok=True, abs=1e-9)


def test_unknown_labels_and_numbers_take_no_part():
    logits, targets = labels(0)
    targets[5:9, 1] = np.nan
    rows = np.setdiff1d(np.arange(len(targets)), np.arange(5, 9))
    assert measures.auroc(logits, targets)[0, 1] == measures.auroc(logits[rows], targets[rows])[0, 1]
    assert (
        measures.average_precision(logits, targets)[0, 1]
        == measures.average_precision(logits[rows], targets[rows])[0, 1]
    )
    assert measures.r2(logits[:, 1:2], targets[:, 1:2]) == measures.r2(logits[rows, 1:2], targets[rows, 1:2])


def test_what_cannot_be_measured_is_nan_and_leaves_the_mean_to_the_others():
    logits, targets = labels(1)
    targets[:, 2] = 0
    each = measures.average_precision(logits, targets)[0]
    assert np.isnan(each[2])
    assert measures.mean_average_precision(logits, targets)[0] == pytest.approx(each[:2].mean())
    assert np.isnan(measures.auroc(logits, targets)[0, 2])
    assert np.isnan(measures.r2(logits, np.ones_like(logits)))[0]
    assert np.isnan(measures.mean_average_precision(logits, np.full_like(targets, np.nan)))[0]


def test_agreement_of_a_model_with_itself_and_with_its_opposite():
    logits, _ = labels(2)
    for kind in (CLASSIFICATION, MULTILABEL, REGRESSION):
        assert measures.agreement(kind, logits, logits).tolist() == [1]
    assert measures.agreement(MULTILABEL, -logits, logits).tolist() == [0]
    assert measures.agreement(REGRESSION, logits + 0.1, logits)[0] > 0.9
    assert measures.agreement(REGRESSION, -logits, logits)[0] < 0


@pytest.mark.parametrize(("rows", "value"), [(20_000, 0.7), (5_000, 3.3), (50, 0.3)])
def test_one_number_everywhere_has_no_r2_and_agrees_only_with_itself(rows, value):
    targets = np.full((rows, 1), value, np.float32)
    weights = np.random.default_rng(0).integers(0, 3, (4, rows)).astype(np.float64)
    assert (
        np.isnan(measures.r2(targets + 0.1, targets)).all()
        and np.isnan(measures.r2(targets + 0.1, targets, weights)).all()
    )
    assert measures.agreement(REGRESSION, targets + 100, targets).tolist() == [0]
    assert measures.agreement(REGRESSION, targets + 0.001, targets).tolist() == [1]
    mixed = np.concatenate([targets, np.arange(rows)[:, None].astype(np.float32)], axis=1)
    assert measures.agreement(REGRESSION, mixed + np.array([100, 0]), mixed)[0] == pytest.approx(0.5)
    assert measures.agreement(REGRESSION, np.full_like(targets, np.nan), targets).tolist() == [0]
