"""Word vectors of a file as an inheritance: which rows they fill, what is refused, and that the table trains on."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_project import make_project
from tokenizers import Tokenizer

from distill import pipeline
from distill.check import check_recipe
from distill.config import Part
from distill.contracts import UserError
from distill.inheritance import stays
from distill.recipe import load_recipe
from students import INHERITANCES, StaticEmbeddings, TextCNN, word_vectors
from students.vectors import read_vectors
from students.vocabulary import word_beginnings

WORDS = [word for word in tiny.WORDS if len(word) > 1]
INHERIT = "student.inherit.text={type: word_vectors, file: vectors.txt"


def student(wordpiece_file: Path, dim: int = 3) -> Any:
    size = Tokenizer.from_file(str(wordpiece_file)).get_vocab_size()
    return StaticEmbeddings(tokenizer_file=wordpiece_file, vocab_size=size, dim=dim)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


LINES = "red 1 2 3\n##s 4 5 6\n[PAD] 7 7 7\nzebra 7 8 9\na -1.5 2e-1 .25\nred 9 9 9\n"


@pytest.mark.parametrize("header", ["", "6 3\n"])
@pytest.mark.parametrize("ends", ["\n", " \n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_known_words_are_written_and_no_others(
    wordpiece_file: Path, tmp_path: Path, header: str, ends: str, packed: bool, caplog: Any
) -> None:
    path = write(tmp_path / "vectors.txt", (header + LINES).replace("\n", ends))
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    encoder = student(wordpiece_file)
    before, ids = encoder.table.weight.detach().clone(), Tokenizer.from_file(str(wordpiece_file)).get_vocab()
    with caplog.at_level(logging.INFO):
        word_vectors(student=encoder, file=str(path))
    before[ids["red"]], before[ids["a"]] = torch.tensor([1.0, 2, 3]), torch.tensor([-1.5, 0.2, 0.25])
    assert torch.equal(encoder.table.weight, before) and encoder.table.weight.requires_grad
    count = len(word_beginnings(wordpiece_file))
    assert f"vectors of 2 of the student's {count} words" in caplog.text
    assert count == len(ids) - len(tiny.SPECIAL) - 26  # letters that continue a word


def test_a_table_may_be_kept_and_any_encoder_has_one(wordpiece_file: Path, tmp_path: Path) -> None:
    encoder = TextCNN(tokenizer_file=wordpiece_file, vocab_size=80, dim=3)
    word_vectors(student=encoder, file=str(write(tmp_path / "v.txt", LINES)), freeze=True)
    assert not encoder.table.weight.requires_grad and encoder.convolutions[0].weight.requires_grad


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(WORDS), st.text("xyzé\u00a0\u0085", min_size=1, max_size=4)),
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
        min_size=1,
        max_size=8,
    )
)
def test_what_a_file_says_is_what_is_read(tmp_path_factory: Any, vectors: dict[str, list[float]]) -> None:
    lines = "".join(f"{word} {' '.join(map(repr, numbers))}\n" for word, numbers in vectors.items())
    path = write(tmp_path_factory.mktemp("vectors") / "v.txt", lines)
    found = read_vectors(path, WORDS, 4)
    assert found.keys() == vectors.keys() & set(WORDS)
    for word, numbers in found.items():
        assert numbers.dtype == np.float32 and numbers.tolist() == vectors[word]


def test_words_with_spaces_and_broken_letters_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_bytes(b"red 1 2\n. . . 1 2\nat name@domain.com 3 4\ncaf\xe9 5 6\ncat 7 8\n")
    assert {word: numbers.tolist() for word, numbers in read_vectors(path, WORDS, 2).items()} == {
        "red": [1, 2],
        "cat": [7, 8],
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("red 1 2 3\ncat 1 2\n", "line 2 has 2 values, expected 3; mend or remove it"),
        ("3 3\nred 1 2 3\nblue 1 2 3\nxyz 1 2 3 4\n", "line 4 has 4 values, expected 3"),
        ("red 1 2 3\n\n", "line 2 has 0 values, expected 3"),
        ("red 1 2 3\ncat 1 x 3\n", "line 2 has 'x' where a number is expected"),
        ("red 1 2 3\ncat 1 nan 3\n", "line 2 has 'nan' where a number is expected"),
        ("red 1 1e999 3\n", "line 1 has '1e999' where a number is expected"),
        ("red 1 2\n", "its vectors have 2 numbers, and the encoder's table is 3 wide; set the encoder's dim to 2"),
        ("400000 300\nred 1 2 3\n", "its vectors have 300 numbers, and the encoder's table is 3 wide"),
        ("3 3\nred 1 2 3\n", "it announces 3 words and has 1; get the whole file"),
        ("just words\n", "its first line is no word with numbers"),
        ("", "none of its words is one of the"),
        ("Red 1 2 3\n", "none of its words is one of the .* in the student's vocabulary"),
    ],
)
def test_a_broken_file_is_refused(wordpiece_file: Path, tmp_path: Path, text: str, sentence: str) -> None:
    encoder = student(wordpiece_file)
    before = encoder.table.weight.detach().clone()
    path = write(tmp_path / "v.txt", text)
    with pytest.raises(UserError, match=f"{path}: {sentence}"):
        word_vectors(student=encoder, file=str(path))
    assert torch.equal(encoder.table.weight, before)


def test_what_is_no_file_is_refused(wordpiece_file: Path, tmp_path: Path) -> None:
    whole = gzip.compress(LINES.encode())
    (tmp_path / "cut.gz").write_bytes(whole[:-9])
    (tmp_path / "bad.gz").write_bytes(whole[:12] + b"\xff\xff\xff" + whole[15:])
    for name in ("absent.txt", "", "cut.gz", "bad.gz"):
        with pytest.raises(UserError, match=r"not readable as word vectors: .*; give a GloVe or word2vec text file"):
            word_vectors(student=student(wordpiece_file), file=str(tmp_path / name))


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("token_embeddings", {}, True),
        ("token_embeddings", {"freeze": False}, False),
        ("word_vectors", {"file": "v.txt"}, False),
        ("word_vectors", {"file": "v.txt", "freeze": True}, True),
        ("encoder_weights", {}, False),
    ],
)
def test_what_is_kept_is_the_inheritances_own_choice(kind: str, params: dict[str, Any], expected: bool) -> None:
    assert stays(INHERITANCES[kind], Part.model_validate({"type": kind, **params})) is expected


@pytest.fixture(scope="module")
def project(tmp_path_factory: Any) -> Path:
    """A project with word vectors for two words of its captions."""
    folder = tmp_path_factory.mktemp("vectors")
    make_project(folder)
    numbers = np.arange(16).reshape(2, 8) / 10
    lines = [f"{word} {' '.join(map(str, row))}\n" for word, row in zip(("red", "cat"), numbers, strict=True)]
    write(folder / "vectors.txt", "".join(lines))
    return folder


def test_a_run_starts_with_the_vectors_and_trains_them_unless_they_are_frozen(project: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(project)
    text = "student.encoders.text={type: recurrent_text, vocab_size: 64, dim: 8, max_length: 12, hidden: 4}"
    for freeze in (False, True):
        recipe = load_recipe("recipe.yaml", [text, f"{INHERIT}, freeze: true}}" if freeze else f"{INHERIT}}}"])
        work = pipeline.workspace(recipe, pipeline.run(recipe, until="student", quiet=True))
        row = Tokenizer.from_file("runs/tiny/inherit/tokenizer.json").token_to_id("cat")
        begun = work.blank("student")
        pipeline.stages.load_weights(begun, work.path("inherit") / "model.safetensors")
        before, after = (model.encoders["text"].table.weight[row] for model in (begun, work.model("student")))
        torch.testing.assert_close(before.detach(), torch.arange(8, 16) / 10)
        assert torch.equal(before, after) == freeze


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["student.inherit.image={type: word_vectors, file: vectors.txt}"],
            r"student.inherit.image: word_vectors fills",
        ),
        (
            [INHERIT.replace("vectors.txt", "absent.txt") + "}"],
            r"student.inherit.text.file: there is no file 'absent.txt'",
        ),
        (["student.inherit.text={type: word_vectors}"], "word_vectors needs the parameter 'file'"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(
    project: Path, monkeypatch: Any, overrides: list[str], sentence: str
) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=sentence):
        check_recipe(load_recipe("recipe.yaml", overrides), pipeline.ENCODERS, INHERITANCES)


def test_another_content_of_the_file_is_another_inheritance(project: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(project)
    copies = [write(tmp_path / name, text) for name, text in (("a.txt", LINES), ("b.txt", LINES), ("c.txt", "red 1 2"))]
    stage = next(stage for stage in pipeline.STAGES if stage.name == "inherit")
    parts = [
        stage.config(load_recipe("recipe.yaml", [INHERIT.replace("vectors.txt", str(path)) + "}"])) for path in copies
    ]
    assert parts[0] == parts[1] != parts[2]
