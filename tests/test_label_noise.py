"""Labels that a teacher doubts: found by confident learning, told in words, written for all rows."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.contracts import IGNORE
from distill.label_noise import COLUMNS, Doubts, doubts, named, probabilities, told, write_doubts
from distill.targets import CLASSIFICATION, MULTILABEL, Task

CLASSES = Task(CLASSIFICATION, ("cat", "dog", "eel"))
LABELS = Task(MULTILABEL, ("red", "big"))


def asked(seed: int, rows: int = 200, wrong: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels of which some are wrong, a good teacher's probabilities, and the ids of the wrong ones."""
    random = np.random.default_rng(seed)
    true = random.integers(3, size=rows)
    logits = random.normal(size=(rows, 3))
    logits[np.arange(rows), true] += 6
    mistaken = random.random(rows) < wrong
    labels = np.where(mistaken, (true + random.integers(1, 3, size=rows)) % 3, true)
    ids = 100 + np.arange(rows)
    return ids, labels, probabilities(CLASSIFICATION, logits), ids[mistaken]


def test_wrong_labels_are_found():
    ids, labels, chances, wrong = asked(0)
    found = doubts(CLASSIFICATION, lambda: [(ids, labels, chances)])
    named_ids = {doubt.id for doubt in found.found}
    assert found.judged == len(ids)
    assert len(named_ids & set(wrong)) >= 0.9 * len(wrong) and len(named_ids - set(wrong)) <= 3
    strengths = [doubt.probability_answer - doubt.probability_given for doubt in found.found]
    assert strengths == sorted(strengths, reverse=True)


def test_a_class_is_likely_from_its_mean_on():
    """Row 3 leans to class 1 by 0.6, which is below that class's mean of 0.9: no candidate; with 0.95 it is one."""
    ids, labels = np.arange(4), np.array([0, 1, 1, 0])
    chances = np.array([[0.9, 0.1], [0.1, 0.9], [0.1, 0.9], [0.4, 0.6]])
    assert doubts(CLASSIFICATION, lambda: [(ids, labels, chances)]).found == []
    chances[3] = (0.05, 0.95)
    (doubt,) = doubts(CLASSIFICATION, lambda: [(ids, labels, chances)]).found
    assert doubt == (3, 0, 0, 1, 0.05, 0.95)


def test_rows_without_a_label_and_classes_without_rows_do_not_matter():
    chances = np.array([[0.1, 0.9, 0.0], [0.2, 0.7, 0.1], [0.0, 0.1, 0.9]])
    found = doubts(CLASSIFICATION, lambda: [(np.arange(3), np.array([1, IGNORE, 1]), chances)])
    assert found == Doubts([], 2)  # no row is labelled with class 2, so nobody knows when it is likely
    assert doubts(CLASSIFICATION, list) == Doubts([], 0)


def test_each_of_several_labels_is_judged():
    chances = np.array([[0.9, 0.1], [0.8, 0.2], [0.05, 0.1], [0.95, 0.9], [0.1, 0.8]])
    targets = np.array([[1, 0], [1, np.nan], [0, 0], [0, 1], [0, 1]], np.float32)
    found = doubts(MULTILABEL, lambda: [(np.arange(5), targets, chances)])
    assert found.judged == 9
    (doubt,) = found.found
    assert (doubt.id, doubt.label, doubt.given, doubt.answer) == (3, 0, 0, 1)
    assert named(LABELS, 0, 0) == "not red" and named(LABELS, 0, 1) == "red" and named(CLASSES, 0, 2) == "eel"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 60), max_size=4))
def test_parts_change_nothing(seed, cuts):
    ids, labels, chances, _ = asked(seed, rows=60, wrong=0.2)
    edges = [0, *sorted(cuts), 60]
    parts = [(ids[a:b], labels[a:b], chances[a:b]) for a, b in pairwise(edges)]
    whole = doubts(CLASSIFICATION, lambda: [(ids, labels, chances)])
    apart = doubts(CLASSIFICATION, lambda: parts)
    assert [doubt[:4] for doubt in whole.found] == [doubt[:4] for doubt in apart.found]
    assert whole.judged == apart.judged == 60


def test_probabilities_of_labels_do_not_overflow():
    found = probabilities(MULTILABEL, np.array([[-2000.0, 0.0, 2000.0]], np.float32))
    assert found.tolist() == [[0.0, 0.5, 1.0]]


def test_doubts_are_told_and_written(tmp_path: Path):
    ids, labels, chances, _ = asked(1)
    half = len(ids) // 2
    splits = {
        split: doubts(CLASSIFICATION, lambda part=part: [(ids[part], labels[part], chances[part])])
        for split, part in {"train": slice(half), "test": slice(half, None)}.items()
    }
    content = told(CLASSES, splits, 4)
    assert content["splits"]["train"] == {"judged": half, "doubted": len(splits["train"].found)}
    assert len(content["strongest"]) == 4
    gaps = [each["probability_answer"] - each["probability_given"] for each in content["strongest"]]
    both = [d.probability_answer - d.probability_given for each in splits.values() for d in each.found]
    assert gaps == sorted(both, reverse=True)[:4]
    write_doubts(tmp_path / "doubts.csv", {"animal": CLASSES}, {"animal": splits})
    with open(tmp_path / "doubts.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS and len(lines) == len(both)
    first = splits["train"].found[0]
    assert lines[0]["id"] == str(first.id) and lines[0]["given"] == CLASSES.names[first.given]
    assert float(lines[0]["probability_answer"]) == pytest.approx(first.probability_answer, abs=1e-4)
