"""Metrics against known values, other libraries, and properties that must hold for any predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import metrics
from distill.contracts import IGNORE


def random_case(seed: int, num_rows: int = 300, num_classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(num_classes, size=num_rows)
    logits = rng.normal(size=(num_rows, num_classes)).astype(np.float32) * 2
    logits[np.arange(num_rows), targets] += 1.5
    return logits, targets


values_and_groups = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 1), min_size=n, max_size=n), st.lists(st.integers(0, 9), min_size=n, max_size=n)
    )
)


def test_known_values():
    logits = np.log(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]]))
    targets = np.array([0, 1, 1, 1])
    assert metrics.accuracy(logits, targets) == 0.75
    assert metrics.per_class_recall(logits, targets).tolist() == pytest.approx([1.0, 2 / 3])
    assert metrics.macro_f1(logits, targets) == pytest.approx((2 / 3 + 4 / 5) / 2)
    # every row alone in its bin: the gaps are 0.1, 0.6, 0.2 and 0.3
    assert metrics.ece(logits, targets) == pytest.approx(1.2 / 4)
    assert metrics.confusion_matrix(logits, targets).tolist() == [[1, 0], [1, 2]]


def test_kl_known_value_and_direction():
    uniform, sure = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert metrics.kl_divergence(uniform, reference=sure) == pytest.approx(expected)
    assert metrics.kl_divergence(sure, reference=sure) == pytest.approx(0.0, abs=1e-12)


def test_unlabelled_rows_are_left_out():
    logits, targets = random_case(0)
    more_logits = np.concatenate([logits, np.zeros((5, 7), np.float32)])
    more_targets = np.concatenate([targets, np.full(5, IGNORE)])
    for measure in (metrics.accuracy, metrics.macro_f1, metrics.ece):
        assert measure(more_logits, more_targets) == measure(logits, targets)
    assert metrics.confusion_matrix(more_logits, more_targets).sum() == len(targets)


def test_no_labelled_row_gives_nan():
    logits, targets = np.zeros((3, 4)), np.full(3, IGNORE)
    for measure in (metrics.accuracy, metrics.macro_f1, metrics.ece):
        assert math.isnan(measure(logits, targets))
    assert np.isnan(metrics.per_class_recall(logits, targets)).all()
    empty = np.zeros(0)
    assert all(math.isnan(bound) for bound in metrics.cluster_bootstrap(empty, empty.astype(int)))
    assert math.isnan(metrics.paired_cluster_bootstrap(empty, empty, empty.astype(int)).p_value)


@pytest.mark.parametrize("seed", range(3))
def test_f1_is_that_of_scikit_learn(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, targets = random_case(seed)
    targets[targets == 3] = 2  # class 3 is predicted but never a target
    expected = sklearn.f1_score(targets, logits.argmax(1), average="macro", labels=np.unique(targets))
    assert metrics.macro_f1(logits, targets) == pytest.approx(expected)
    assert (metrics.confusion_matrix(logits, targets) == sklearn.confusion_matrix(targets, logits.argmax(1))).all()


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_is_that_of_torchmetrics(seed):
    torch = pytest.importorskip("torch")
    calibration = pytest.importorskip("torchmetrics.functional.classification")
    logits, targets = random_case(seed)
    expected = calibration.multiclass_calibration_error(
        torch.from_numpy(logits).double().softmax(1), torch.from_numpy(targets), num_classes=7, n_bins=15
    )
    assert metrics.ece(logits, targets) == pytest.approx(float(expected), abs=1e-6)


def test_reliability_adds_up_to_accuracy():
    logits, targets = random_case(1)
    curve = metrics.reliability(logits, targets)
    filled = curve.num_rows > 0
    assert curve.num_rows.sum() == len(targets)
    right = (curve.accuracy[filled] * curve.num_rows[filled]).sum()
    assert right / len(targets) == pytest.approx(metrics.accuracy(logits, targets))
    edges = np.arange(16) / 15
    assert (curve.confidence[filled] > edges[:-1][filled]).all()
    assert (curve.confidence[filled] <= edges[1:][filled] + 1e-12).all()


def test_certain_and_right_is_calibrated():
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0]])
    assert metrics.ece(logits, np.array([0, 1])) == 0.0
    assert metrics.ece(logits, np.array([1, 0])) == 1.0


@settings(max_examples=60, deadline=None)
@given(values_and_groups)
def test_interval_holds_the_mean(case):
    values, groups = (np.array(part) for part in case)
    low, high = metrics.cluster_bootstrap(values, groups, resamples=300)
    assert low - 1e-12 <= values.mean() <= high + 1e-12
    assert values.min() - 1e-12 <= low <= high <= values.max() + 1e-12


@settings(max_examples=30, deadline=None)
@given(values_and_groups)
def test_identical_models_do_not_differ(case):
    values, groups = (np.array(part) for part in case)
    result = metrics.paired_cluster_bootstrap(values, values, groups, resamples=200)
    assert result.as_dict() == {"difference": 0.0, "ci95": [0.0, 0.0], "p_value": 1.0}


@settings(max_examples=30, deadline=None)
@given(values_and_groups, st.integers(0, 5))
def test_swapping_the_models_flips_the_sign(case, seed):
    values, groups = (np.array(part) for part in case)
    other = np.roll(values, 1)
    one = metrics.paired_cluster_bootstrap(values, other, groups, 200, seed)
    two = metrics.paired_cluster_bootstrap(other, values, groups, 200, seed)
    assert one.difference == -two.difference
    assert one.ci95 == pytest.approx((-two.ci95[1], -two.ci95[0]))
    assert one.p_value == two.p_value


def test_group_labels_do_not_matter():
    rng = np.random.default_rng(0)
    values, groups = rng.random(100), rng.integers(20, size=100)
    assert metrics.cluster_bootstrap(values, groups) == metrics.cluster_bootstrap(values, groups * 1000 - 7)


def test_groups_of_one_row_are_the_ordinary_bootstrap():
    values = (np.random.default_rng(0).random(1000) < 0.8).astype(float)
    low, high = metrics.cluster_bootstrap(values, np.arange(1000), resamples=4000)
    half = 1.96 * math.sqrt(values.mean() * (1 - values.mean()) / 1000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)


def test_duplicated_rows_add_no_certainty():
    values = (np.random.default_rng(0).random(200) < 0.7).astype(float)
    alone = metrics.cluster_bootstrap(values, np.arange(200))
    copies = metrics.cluster_bootstrap(np.repeat(values, 5), np.repeat(np.arange(200), 5))
    naive = metrics.cluster_bootstrap(np.repeat(values, 5), np.arange(1000))
    assert copies == pytest.approx(alone)
    assert np.ptp(naive) < 0.6 * np.ptp(copies)


def test_p_value_agrees_with_the_interval():
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.05, 0.1, 0.3):
        a = (rng.random(400) < 0.6 + shift).astype(float)
        b = (rng.random(400) < 0.6).astype(float)
        result = metrics.paired_cluster_bootstrap(a, b, np.repeat(np.arange(100), 4))
        excludes_zero = result.ci95[0] > 0 or result.ci95[1] < 0
        assert (result.p_value < 0.05) == excludes_zero
    assert result.p_value == pytest.approx(2 / 2001)


def test_chunks_do_not_change_the_size_or_the_mean(monkeypatch):
    rng = np.random.default_rng(0)
    values, groups = rng.random((50, 3)), np.arange(50)
    whole = metrics.resampled_means(values, groups, resamples=700)
    monkeypatch.setattr(metrics, "CHUNK_WEIGHTS", 1000)
    chunked = metrics.resampled_means(values, groups, resamples=700)
    assert np.array_equal(whole, chunked)
