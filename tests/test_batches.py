"""Batches made ahead: in order, a few at a time or by threads, and no more of them than that."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data import batches
from distill.data.batches import AT_ONCE, PREFETCH, ahead, made_and_finished


@given(start=st.integers(0, 30), count=st.integers(0, 30), workers=st.sampled_from([0, 1, 3]))
def test_all_come_in_order_whoever_makes_them(start: int, count: int, workers: int) -> None:
    numbers = range(start, start + count)
    assert list(ahead(str, numbers, workers)) == [str(number) for number in numbers]


def test_without_workers_a_few_are_made_when_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches.time, "perf_counter", lambda: 0.0)
    made: list[int] = []
    found = ahead(made.append, range(3 * AT_ONCE), 0)
    assert made == []
    for taken in range(1, 2 * AT_ONCE):
        next(found)
        assert len(made) == (AT_ONCE if taken <= AT_ONCE else 2 * AT_ONCE)


def test_what_takes_long_to_make_is_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))  # seconds
    monkeypatch.setattr(batches.time, "perf_counter", lambda: float(next(now)))
    made: list[int] = []
    for taken, _ in enumerate(ahead(made.append, range(10), 0), 1):
        assert len(made) == taken


def test_threads_are_ahead_by_as_much_as_they_may() -> None:
    made, workers = [], 2
    found = ahead(made.append, range(100), workers)
    for taken in range(1, 51):
        next(found)
        deadline = time.monotonic() + 30
        while len(made) < taken + PREFETCH * workers and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(made) == taken + PREFETCH * workers
    found.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_while_making_one_is_raised_behind_those_before_it(workers: int) -> None:
    found = ahead(lambda number: 1 / (3 - number), range(10), workers)
    assert [next(found) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_the_second_step_takes_several_at_once_without_workers() -> None:
    taken: list[list[int]] = []

    def finish(made: list[int]) -> list[str]:
        assert made
        taken.append(made)
        return [str(number) for number in made]

    for workers, most in ((0, AT_ONCE), (2, 1)):
        for numbers in (range(2 * AT_ONCE), range(2 * AT_ONCE + 1)):
            taken.clear()
            found = list(made_and_finished(lambda number: number, finish, numbers, workers))
            assert found == list(map(str, numbers))
            assert max(map(len, taken)) <= most and sum(map(len, taken)) == len(numbers)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_the_second_step_is_raised_behind_those_before_it(workers: int) -> None:
    found = made_and_finished(float, lambda made: [1 / (3 - number) for number in made], range(10), workers)
    assert [next(found) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
