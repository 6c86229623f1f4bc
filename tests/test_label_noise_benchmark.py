"""The benchmark of doubted labels: what is exchanged, and how doubts are counted against it."""

from __future__ import annotations

import pytest

from benchmarks.label_noise import exchange, markdown, measure, parse
from distill.label_noise import Doubt, Doubts


def test_labels_are_exchanged_for_others():
    labels = ["cat", "dog", "eel"] * 200
    changed, wrong = exchange(labels, 0.1, 3)
    assert [a != b for a, b in zip(labels, changed, strict=True)] == wrong.tolist()
    assert 0.05 < wrong.mean() < 0.15 and set(changed) == set(labels)
    assert exchange(labels, 0.1, 3)[0] == changed != exchange(labels, 0.1, 4)[0]


def test_doubts_are_counted_against_the_wrong_labels():
    found = Doubts([Doubt(row, 0, 0, 1, 0.1, 0.9) for row in (1, 2, 3, 9)], 50)
    each = measure(found, set(range(10)), {1, 3, 5, 40})
    assert (each["labels"], each["wrong"], each["doubted"]) == (50, 3, 4)
    assert (each["found"], each["precision"], each["strongest"]) == pytest.approx((2 / 3, 0.5, 2 / 3))
    text = markdown({"test": each}, parse(["--share", "0.1"]), "a command")
    assert "| test | 50 | 3 | 4 | 66.7" in text and "probability 0.1" in text


def test_a_share_is_between_0_and_1(capsys):
    with pytest.raises(SystemExit):
        parse(["--share", "1"])
    assert "--share 1: expected a number between 0 and 1" in capsys.readouterr().err
