"""What a fair division promises."""

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.contracts import AND
from distill.shapley import contributions, shapley_values

NAMES = ("image", "text", "audio", "video")


def subsets(names):
    return [frozenset(chosen) for chosen in chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))]


def test_glove_game():
    """Image is worth nothing without text or audio, which replace each other: 2/3, 1/6, 1/6."""
    worth = {each: float("image" in each and len(each) > 1) for each in subsets(NAMES[:3])}
    values = shapley_values(worth, NAMES[:3])
    assert values == pytest.approx({"image": 2 / 3, "text": 1 / 6, "audio": 1 / 6})


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_values_add_up_and_a_useless_player_gets_nothing(count, seed):
    names, generator = NAMES[:count], np.random.default_rng(seed)
    useful = dict(zip(subsets(names[1:]), generator.normal(size=(2 ** (count - 1), 5)), strict=True))
    worth = {each: useful[each - {names[0]}] for each in subsets(names)}
    values = shapley_values(worth, names)
    total = sum(values.values())
    assert np.allclose(total, worth[frozenset(names)] - worth[frozenset()])
    assert np.allclose(values[names[0]], 0)


def test_a_subset_without_worth_is_an_error():
    with pytest.raises(KeyError):
        shapley_values({frozenset(): 0.0}, ["image"])


@given(st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_contributions_are_those_of_named_subsets(count, seed):
    names, generator = NAMES[:count], np.random.default_rng(seed)
    worth = {each: generator.normal() for each in subsets(names)}
    parts = {AND.join(sorted(each, key=names.index)): value for each, value in worth.items() if 0 < len(each) < count}
    whole, nothing = worth[frozenset(names)], worth[frozenset()]
    found = contributions(whole, parts, nothing)
    expected = shapley_values(worth, names)
    assert found.keys() == expected.keys() and all(np.allclose(found[name], expected[name]) for name in names)
    assert sum(found.values()) == pytest.approx(whole - nothing)
    if count > 2:
        parts.popitem()
        assert contributions(whole, parts, nothing) is None


def test_one_modality_has_nothing_to_share():
    assert contributions(0.9, {}, 0.1) is None
