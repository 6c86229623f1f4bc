"""Texts on disk: a sequence of strings, each distinct one once."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.contracts import UserError
from distill.data import texts as module
from distill.data.texts import Texts, TextWriter

STRINGS = st.lists(st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=30)
anywhere = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def on_disk(folder, strings):
    known = list(dict.fromkeys(strings))
    with TextWriter(folder / "text.arrow") as writer:
        for number, text in enumerate(known):
            assert writer.count == number
            writer.add(text)
    return Texts.open(folder / "text.arrow", np.array([known.index(text) for text in strings]))


@anywhere
@given(STRINGS)
def test_texts_are_a_sequence_of_their_strings(tmp_path, strings):
    for texts in (Texts.of(strings), on_disk(tmp_path, strings)):
        assert list(texts) == strings and len(texts) == len(strings)
        assert texts[1:3] == strings[1:3] and texts[0] == strings[0] and texts[np.int64(-1)] == strings[-1]
        assert texts.num_distinct == len(set(strings))


@anywhere
@given(STRINGS, st.data(), st.integers(1, 5))
def test_wanted_texts_come_once_and_in_order(tmp_path, strings, data, count):
    known = list(dict.fromkeys(strings))
    wanted = data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known)))
    for texts in (Texts.of(strings), on_disk(tmp_path, strings)):
        parts = list(texts.distinct(np.array(wanted), count))
        assert all(0 < len(part) <= count for part in parts)
        assert [text for part in parts for text in part] == [t for t, w in zip(known, wanted, strict=True) if w]


def test_texts_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)
    strings = [f"text {number}" for number in range(8)]
    assert list(on_disk(tmp_path, strings)) == strings


def test_a_text_that_is_not_there_is_an_index_error():
    with pytest.raises(IndexError):
        Texts.of(["a"])[1]


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "text.arrow").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a file of texts"):
        Texts.open(tmp_path / "text.arrow", np.zeros(1, np.int64))
