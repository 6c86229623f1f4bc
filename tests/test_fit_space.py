"""The spaces of a search: what follows from a recipe, what is refused, and the recipes that choices make."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill import pipeline
from distill.contracts import UserError
from distill.fit.search import SHARE
from distill.fit.space import (
    HEADS,
    PRECISION,
    RATIO,
    candidate,
    check_space,
    default_space,
    read_space,
    smaller,
    with_epochs,
)
from distill.recipe import changed, load_recipe

TARGET = "onnxruntime"
QUICK = "quickstart"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(QUICK)


def made_by(recipe):
    work = pipeline.workspace(recipe, {})
    return lambda values: candidate(recipe, values, work.encoders, work.inheritances)


def valid(recipe):
    def fits(values):
        try:
            pipeline.check(made_by(recipe)(values))
        except UserError:
            return False
        return True

    return fits


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dim", 192, [192, 144, 96, 48]),
        ("dim", 8, [8]),
        ("widths", [16, 32, 64], [[16, 32, 64], [8, 16, 32], [8, 8, 16]]),
        ("blocks", [0, 1, 2], [[0, 1, 2], [0, 1, 1], [0, 0, 1], [0, 0, 0]]),
        ("depth", 4, [4, 3, 2, 1]),
        ("layers", 1, [1]),
        ("dim", None, []),
        ("dim", 0.5, []),
    ],
)
def test_sizes_go_down_to_a_quarter(name, value, expected):
    found = smaller(name, value)
    if name == "widths":
        assert found[0] == expected[0] and found[-1] == [8, 8, 16] and expected[1] in found
    else:
        assert found == expected


@given(st.sampled_from(["dim", "hidden", "depth"]), st.integers(1, 600))
def test_smaller_sizes_are_smaller_and_never_nothing(name, value):
    found = smaller(name, value)
    assert found[0] == value and min(found) >= 1
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)


def test_the_default_space_follows_from_the_student(recipe):
    encoders = pipeline.workspace(recipe, {}).encoders
    space = {knob.path: knob for knob in default_space(recipe, TARGET, encoders, valid(recipe), tables=False)}
    assert list(space) == [
        "student.encoders.image.widths",
        "student.encoders.image.blocks",
        "student.encoders.text.dim",
        "student.fusion.dim",
        HEADS,
        RATIO,
        PRECISION,
    ]
    assert space["student.encoders.image.widths"].choices[0] == [16, 32, 64, 128]
    ratio = space[RATIO]
    assert ratio.choices[ratio.own] == 0.5 and ratio.choices[-1] == 0.8
    assert 0.0 not in ratio.choices  # nothing would be pruned, which the schema refuses
    assert space[PRECISION].choices == ("onnx-fp32", "onnx-int8")
    tables = default_space(recipe, TARGET, encoders, valid(recipe), tables=True)
    assert "student.encoders.text.vocab_size" in [knob.path for knob in tables]


def test_a_candidate_gives_up_what_no_longer_fits(recipe):
    make = made_by(recipe)
    same = make({RATIO: 0.7, PRECISION: "onnx-int8"})
    assert same.prune.ratio == 0.7 and set(same.student.inherit) == {"image", "text"}
    assert same.export.bundles == ["onnx-fp32", "onnx-int8"]
    narrow = make({"student.encoders.image.widths": [8, 16, 32, 64], PRECISION: "onnx-fp32"})
    assert set(narrow.student.inherit) == {"text"} and narrow.export.bundles == ["onnx-fp32"]
    pipeline.check(narrow)


def test_what_is_searched_changes_no_stage(recipe):
    other = changed(recipe, {"fit": {"space": {RATIO: [0.5, 0.6]}}}, "test")
    keys = [[item.key for item in pipeline.plan(one)] for one in (recipe, other)]
    assert keys[0] == keys[1]


def test_a_share_of_the_epochs_is_at_least_one(recipe):
    short = with_epochs(recipe, SHARE, student=True)
    assert (short.student.train.epochs, short.prune.train.epochs) == (3, 1)
    assert with_epochs(recipe, SHARE, student=False).student.train.epochs == recipe.student.train.epochs
    long = with_epochs(recipe, 2.0, student=True)
    assert (long.student.train.epochs, long.prune.train.epochs) == (
        2 * recipe.student.train.epochs,
        2 * recipe.prune.train.epochs,
    )
    stepped = changed(recipe, {"prune.steps": 2, "student.train.max_steps": 10}, "test")
    short = with_epochs(stepped, SHARE, student=True)
    assert (short.prune.train.epochs, short.student.train.max_steps) == (2, 4)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"student.encoders.image.width": [8]}, "convnet has no parameter 'width'; did you mean 'widths'"),
        ({"prune.ratoi": [0.5]}, "unknown key 'prune.ratoi'; did you mean 'ratio'"),
        (
            {"student.encoder.image.dim": [8]},
            "leads nowhere, as there is no 'encoder' with keys; did you mean 'encoders'",
        ),
        ({"teacher.members": [1]}, "'teacher.members' cannot be searched"),
        ({"prune.ratio": [0.5, 1.5]}, "fit.space.prune.ratio: 1.5 does not fit"),
        ({"prune.ratio": []}, "give one value or more, each once"),
        ({"prune.ratio": [0.5, 0.5]}, "give one value or more, each once"),
        ({"prune.ratio": {"low": 0.1, "high": 0.5}}, "a range has low, high and step, not low, high"),
        ({"prune.ratio": {"low": 0.5, "high": 0.1, "step": 0.1}}, "no value lies between 0.5 and 0.1"),
        ({PRECISION: ["onnx-int7"]}, "no bundle 'onnx-int7' runs on onnxruntime; did you mean 'onnx-int"),
        ({PRECISION: ["onnx-int8-qat"]}, "a search does not train for int8, as 'onnx-int8-qat' needs; name onnx-int8"),
        ({"export.bundles": [["onnx-fp32"]]}, "'export.bundles' cannot be searched, as precision says"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(recipe, space, said):
    given = changed(recipe, {"fit": {"space": space}}, "test")

    def make(values):
        made = made_by(recipe)(values)
        pipeline.check(made)

    with pytest.raises(UserError) as refused:
        check_space(read_space(given, TARGET), make)
    assert said in str(refused.value)


def test_ranges_are_whole_where_they_are_given_whole(recipe):
    space = {RATIO: {"low": 0.0, "high": 0.8, "step": 0.2}, "student.fusion.dim": {"low": 64, "high": 192, "step": 64}}
    ratio, dim, precision = read_space(changed(recipe, {"fit": {"space": space}}, "test"), TARGET)
    assert ratio.choices == (0.0, 0.2, 0.4, 0.6, 0.8) and dim.choices == (64, 128, 192)
    assert all(type(value) is int for value in dim.choices)
    assert precision.choices == ("onnx-fp32", "onnx-int8")


def test_what_is_trained_for_int8_is_no_candidate(recipe):
    own = changed(recipe, {"export.bundles": ["onnx-fp32", "onnx-int8-qat"]}, "test")
    encoders = pipeline.workspace(own, {}).encoders
    (precision,) = [
        knob
        for knob in default_space(own, TARGET, encoders, lambda values: True, tables=False)
        if knob.path == PRECISION
    ]
    assert precision.choices == ("onnx-fp32", "onnx-int8")
    named = changed(own, {"fit": {"space": {RATIO: [0.5]}}}, "test")
    assert read_space(named, TARGET)[-1].choices == ("onnx-fp32",)
    pipeline.check(made_by(own)({PRECISION: "onnx-int8-qat"}))  # what best.yaml is where the own bundle is the best
