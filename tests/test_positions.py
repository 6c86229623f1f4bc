"""Positions of ids: as a search finds them, for ids that lie close or far apart, and in little memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.positions import WIDEST, Positions

LIMIT = 2**62


def check(ids, asked):
    position, known = Positions(ids).find(asked)
    assert known.tolist() == np.isin(asked, ids).tolist()
    assert position[known].tolist() == np.searchsorted(ids, asked[known]).tolist()


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=300),
    st.integers(-1000, 1000),
    st.lists(st.integers(-1100, 3000), max_size=50),
    st.sampled_from([np.int32, np.int64]),
)
def test_positions_are_those_of_a_search(gaps, first, others, dtype):
    ids = np.cumsum([first, *gaps]).astype(dtype)
    check(ids, np.array([*ids.tolist(), *others], np.int64))


@pytest.mark.parametrize("step", [1, 3, WIDEST - 1, WIDEST + 1, 2**40])
def test_dense_and_sparse_ids(step):
    ids = np.arange(-500, 1500) * step
    check(ids, np.concatenate([ids, ids + 1, ids - 1, [ids[-1] + 10**9, ids[0] - 10**9]]))


@pytest.mark.parametrize("asked", [LIMIT, -LIMIT, 2**31, -(2**31) - 1])
def test_ids_that_the_stored_type_cannot_hold_are_unknown(asked):
    for ids in (np.array([0, 2**31 - 1], np.int32), np.arange(10, dtype=np.int32)):
        assert not Positions(ids).find(np.array([asked]))[1].any()


def test_a_million_ids_take_a_quarter_of_a_megabyte():
    positions = Positions(np.arange(1_000_000) * 5 // 4)
    held = sum(array.nbytes for array in vars(positions).values() if isinstance(array, np.ndarray)) - 8_000_000
    assert 0 < held < 300_000
