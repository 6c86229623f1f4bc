"""Texts in one buffer: a sequence of strings, and the distinct ones in order of first appearance."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.texts import Texts, distinct_texts

STRINGS = st.lists(st.text(max_size=4), min_size=1, max_size=30)


def texts_of(strings, chunks=1):
    parts = [part.tolist() for part in np.array_split(np.array(strings, dtype=object), chunks)]
    return Texts(pa.chunked_array([pa.array(part, pa.string()) for part in parts]))


@settings(deadline=None)
@given(STRINGS, st.integers(1, 3))
def test_texts_are_a_sequence_of_their_strings(strings, chunks):
    texts = texts_of(strings, chunks)
    assert list(texts) == strings and len(texts) == len(strings)
    assert texts[1:3] == strings[1:3] and texts[0] == strings[0] and texts[np.int64(-1)] == strings[-1]
    assert list(texts.take(np.array([len(strings) - 1, 0]))) == [strings[-1], strings[0]]


@settings(deadline=None)
@given(STRINGS, st.data())
def test_distinct_texts_come_in_order_of_first_appearance(strings, data):
    rows = np.array(data.draw(st.lists(st.integers(0, len(strings) - 1), max_size=30)), dtype=np.int64)
    asked = [strings[row] for row in rows]
    for texts in (strings, texts_of(strings)):
        distinct, number = distinct_texts(texts, rows)
        assert list(distinct) == list(dict.fromkeys(asked))
        assert [distinct[code] for code in number] == asked and number.dtype == np.int32


def test_a_text_that_is_not_there_is_an_index_error():
    with pytest.raises(IndexError):
        texts_of(["a"])[1]
