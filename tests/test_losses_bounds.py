"""Numbers of losses in recipes: of the right type, finite and within bounds, at both ends of a schedule."""

import math

import pytest
from tiny import terms

from distill.contracts import UserError
from distill.losses.terms import LOSSES, check_terms, settings

BIASES = {"logit_bias", "student_bias", "teacher_bias"}  # any number
PARAMS = [
    (loss, name, setting.hint) for loss in LOSSES for part in settings(LOSSES[loss]) for name, setting in part.items()
]


def refused(loss, name, value):
    """The sentence with which a parameter's value is refused."""
    with pytest.raises(UserError) as error:
        check_terms(terms({"loss": loss, "params": {name: value}}), "objective")
    said = str(error.value)
    assert said.startswith(f"objective[0].params.{name} is ") and "\n" not in said
    return said


@pytest.mark.parametrize("value", [math.nan, "20"])
@pytest.mark.parametrize(("loss", "name"), [param[:2] for param in PARAMS])
def test_no_parameter_takes_what_is_no_number_or_a_word(loss, name, value):
    refused(loss, name, value)


@pytest.mark.parametrize(("loss", "name"), [p[:2] for p in PARAMS if p[2] is not bool and p[1] not in BIASES])
def test_every_number_has_bounds(loss, name):
    refused(loss, name, [-7] if name in ("levels", "teacher_scales") else -7)


@pytest.mark.parametrize(
    ("loss", "params", "complaint"),
    [
        ("kd", {"temperature": 0}, "is 0: Input should be greater than 0"),
        ("kd", {"temperature": math.inf}, "is inf: Input should be a finite number"),
        ("kd", {"temperature": {"from": 4, "to": 0, "until": 0.5}}, "is 0.0: Input should be greater than 0"),
        ("kd", {"temperature": {"from": 0, "to": 4}}, "is 0.0: Input should be greater than 0"),
        ("kd", {"temperature": {"from": 4, "to": math.nan}}, "to: Input should be a finite number; write {from:"),
        ("cckd", {"max_p": -1}, "is -1: Input should be greater than or equal to 1"),
        ("crd", {"momentum": 7}, "is 7: Input should be less than 1"),
        ("queue_kl", {"student_temperature": 0}, "is 0: Input should be greater than 0"),
        ("mgd", {"ratio": 3}, "is 3: Input should be less than 1"),
        ("cross_entropy", {"label_smoothing": 1.5}, "is 1.5: Input should be less than or equal to 1"),
        ("at", {"p": 0.5}, "is 0.5: Input should be greater than or equal to 1"),
        ("review", {"levels": [0]}, r"is [0]: Input should be greater than or equal to 1"),
        ("clip_relational_kl", {"student_scale": "big"}, "is 'big': Input should be a valid number"),
        ("siglip", {"logit_bias": {"from": 0, "to": math.inf}}, "to: Input should be a finite number"),
        ("clip_ensemble_ce", {"teacher_scales": [20.0, 0]}, "is [20.0, 0]: Input should be greater than 0"),
    ],
)
def test_values_beyond_the_bounds_are_named(loss, params, complaint):
    ((name, value),) = params.items()
    assert complaint in refused(loss, name, value)


@pytest.mark.parametrize(
    "item",
    [
        {"loss": "kd", "task": "kind", "params": {"temperature": {"from": 4, "to": 1}}},
        {"loss": "cross_entropy", "task": "kind", "params": {"label_smoothing": 0}},
        {"loss": "siglip", "embedding": "image,text", "params": {"logit_scale": 10, "logit_bias": -10}},
        {"loss": "review", "taps": {"student": ["a"], "teacher": ["b"]}, "params": {"levels": [4, 1], "width": None}},
    ],
)
def test_values_within_the_bounds_pass(item):
    check_terms(terms(item), "objective")
