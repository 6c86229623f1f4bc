"""Arrays on disk and what is done with them a chunk at a time: the same as the plain way in memory."""

import os
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.data import scratch
from distill.data.scratch import dense_codes, first_rows, positions_by_id, repeated

anywhere = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Files and several chunks also for few rows."""
    monkeypatch.setattr(scratch, "IN_MEMORY", 0)
    monkeypatch.setattr(scratch, "CHUNK", 5)


def hashed(values):
    spread = np.array(values, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([spread >> np.uint64(7), spread], axis=1)


@anywhere
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60))
def test_equal_keys_find_their_first_row(tmp_path, values):
    assert first_rows(hashed(values), tmp_path).tolist() == [values.index(value) for value in values]
    codes, count = dense_codes(hashed(values), tmp_path)
    known = list(dict.fromkeys(values))
    assert codes.tolist() == [known.index(value) for value in values] and count == len(known)


def test_a_key_of_most_rows_takes_no_more_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "CHUNK", 1 << 13)
    keys = scratch.scratch(tmp_path, (1 << 19, 2), np.uint64)
    tracemalloc.start()
    codes, count = dense_codes(keys, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1 and not codes.any() and peak < 4e6  # 30 MB where a key's rows are sorted together


def test_keys_that_differ_in_one_half_are_different(tmp_path):
    keys = np.array([[1, 1], [1, 2], [2, 1], [1, 1]], np.uint64)
    assert first_rows(keys, tmp_path).tolist() == [0, 1, 2, 0]


@anywhere
@given(st.lists(st.integers(-50, 50), unique=True, min_size=1, max_size=40), st.randoms())
def test_positions_are_in_order_of_id(tmp_path, ids, random):
    split = np.array([random.choice(["train", "test"]) for _ in ids])
    expected = sorted((row for row in range(len(ids)) if split[row] == "train"), key=lambda row: ids[row])
    assert positions_by_id(np.array(ids), split, "train", tmp_path).tolist() == expected


@anywhere
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_repeated_values(values):
    found, (_, most) = repeated(np.array(values)), Counter(values).most_common(1)[0]
    assert found is None if most == 1 else found[1] == most == values.count(found[0])


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    gone = tmp_path / "gone"  # a folder that is not even there: only the other one can have been used
    assert scratch.scratch(gone, 100, np.int64, fill=3).sum() == 300


def test_arrays_start_with_their_value_and_leave_no_file(tmp_path):
    array = scratch.scratch(tmp_path, (13, 2), np.int32, fill=-1)
    assert array.shape == (13, 2) and (array == -1).all() and not list(tmp_path.iterdir())
    array[3] = 7
    assert array.sum() == 14 - 24
