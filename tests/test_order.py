"""The order of an epoch: each row once, from (seed, epoch) alone, and from any position on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data import scratch
from distill.data.order import Drawn, GroupedOrder, TwoLevelOrder, shuffled

SHAPES = {"rows": st.integers(1, 300), "block": st.integers(1, 40), "window": st.integers(1, 8)}


def make(rows, block, window, seed=3, epoch=1):
    return TwoLevelOrder(np.arange(rows) * 2 + 5, seed, epoch, block=block, window=window)


@settings(deadline=None)
@given(**SHAPES)
def test_each_row_comes_once(rows, block, window):
    order = make(rows, block, window)
    assert len(order) == rows and sorted(order[:].tolist()) == (np.arange(rows) * 2 + 5).tolist()


@settings(deadline=None)
@given(**SHAPES, start=st.integers(0, 300), count=st.integers(0, 100))
def test_any_part_is_the_part_of_the_whole(rows, block, window, start, count):
    whole = make(rows, block, window)[:]
    assert make(rows, block, window)[start : start + count].tolist() == whole[start : start + count].tolist()


@settings(deadline=None)
@given(**SHAPES, batch=st.integers(1, 64), ranks=st.integers(1, 5))
def test_slices_of_the_ranks_are_the_order(rows, block, window, batch, ranks):
    orders, read = [make(rows, block, window) for _ in range(ranks)], []
    for start in range(0, rows, batch):
        size = min(batch, rows - start)
        for rank, order in enumerate(orders):
            first, last = (size * at // ranks for at in (rank, rank + 1))
            read.extend(order[start + first : start + last].tolist())
    assert read == make(rows, block, window)[:].tolist()


def test_seed_and_epoch_decide():
    orders = [make(500, 10, 4, seed, epoch)[:].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4 and make(500, 10, 4, 0, 0)[:].tolist() == orders[0]


def test_rows_are_read_near_each_other_but_in_no_order():
    order = (make(1000, 10, 5)[:] - 5) // 2
    blocks = [len(set((order[start : start + 50] // 10).tolist())) for start in range(0, 1000, 50)]
    assert blocks == [5] * 20  # a window holds whole blocks
    assert len(set(np.diff(order[:50]).tolist())) > 10
    assert (np.diff([order[start : start + 50].min() for start in range(0, 1000, 50)]) < 0).any()


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_one_level_is_the_plain_permutation(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(scratch, "IN_MEMORY", in_memory)
    monkeypatch.setattr(scratch, "CHUNK", 7)
    positions = np.arange(100) * 3
    expected = np.random.default_rng((4, 2)).permutation(positions)
    assert np.array_equal(shuffled(positions, 4, 2, tmp_path), expected)
    assert positions[1] == 3 and not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 90),
    batch=st.integers(1, 12),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
    start=st.integers(0, 9),
)
def test_grouped_batches_are_those_of_their_windows_sorted(rows, batch, window, epoch, start):
    order = np.random.default_rng(1).permutation(rows) * 7
    lengths = np.random.default_rng(2).integers(1, 9, 7 * rows + 1)
    grouped = GroupedOrder(order, lengths.__getitem__, batch, 3, epoch, window=window)
    whole = grouped[:]
    assert len(grouped) == rows and whole.dtype == order.dtype
    for first in range(0, rows, window * batch):
        here, wanted = whole[first : first + window * batch], order[first : first + window * batch]
        assert sorted(here.tolist()) == sorted(wanted.tolist())
        sized = [sorted(lengths[here[at : at + batch]].tolist()) for at in range(0, len(here), batch)]
        assert sorted(sized[: len(here) // batch]) == sized_batches(np.sort(lengths[wanted]), batch)
    again = GroupedOrder(order, lengths.__getitem__, batch, 3, epoch, window=window)
    assert again[start * batch :].tolist() == whole[start * batch :].tolist()  # without the parts before


def sized_batches(lengths, batch):
    return sorted(lengths[at : at + batch].tolist() for at in range(0, len(lengths) // batch * batch, batch))


def test_each_window_is_shuffled_in_its_own_way():
    whole = make(240, block=60, window=1)[:].reshape(4, 60)
    within = {tuple(np.argsort(rows).tolist()) for rows in whole}
    assert len(within) == 4


GROUPS = np.random.default_rng(5).permutation(np.repeat([0, 1, 2], [200, 50, 6]))


def drawn(power, folder, groups=GROUPS):
    counts = np.bincount(groups)
    return Drawn(np.arange(len(groups)) * 3, groups, np.maximum(1, counts) ** -float(power), folder)


@pytest.mark.parametrize("chunk", [7, 1 << 13])
@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_groups_are_drawn_by_their_weight(tmp_path, monkeypatch, power, chunk):
    monkeypatch.setattr(scratch, "CHUNK", chunk)
    rows = drawn(power, tmp_path)
    draws = np.concatenate([rows.order(1, epoch)[:] for epoch in range(100)])
    assert len(rows) == len(GROUPS) and draws.dtype == np.int64
    seen = np.bincount(GROUPS[draws // 3]) / len(draws)
    wanted = np.bincount(GROUPS) ** (1.0 - power)
    assert seen == pytest.approx(wanted / wanted.sum(), abs=0.01)
    rare = np.bincount(draws // 3)[GROUPS == 2]
    assert (abs(rare - rare.mean()) < 5 * np.sqrt(rare.mean())).all()  # rows of a group are drawn alike
    assert set(draws) == set(range(0, 3 * len(GROUPS), 3))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(sum),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 2**20),
    start=st.integers(0, 130),
    count=st.integers(0, 50),
)
def test_any_part_of_draws_is_the_part_of_the_whole(tmp_path_factory, sizes, seed, epoch, start, count):
    rows = drawn(1, tmp_path_factory.getbasetemp(), np.repeat(np.arange(len(sizes)), sizes))
    order = rows.order(seed, epoch)
    whole = order[:]
    assert len(whole) == len(order) == sum(sizes) and set(whole // 3) <= set(range(sum(sizes)))
    assert order[start : start + count].tolist() == whole[start : start + count].tolist()
    assert rows.order(seed, epoch)[:].tolist() == whole.tolist()


def test_draws_differ_from_epoch_to_epoch(tmp_path):
    rows = drawn(1, tmp_path)
    orders = {tuple(rows.order(seed, epoch)[:].tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
