"""Where modalities can be balanced: what a plan refuses, and in which words."""

import pytest
from tiny_project import RECIPE

import students
from distill import pipeline
from distill.check import check_recipe
from distill.config import BalanceConfig
from distill.contracts import UserError
from distill.recipe import load_recipe

HEAD_TERMS = [
    f"{{loss: cross_entropy, task: {task}.{name}}}" for task in ("colour", "shape") for name in ("image", "text")
]
WITH_HEADS = [f"student.{objective}=[{', '.join(HEAD_TERMS)}]" for objective in ("baseline", "objective")]
WATCHED = [*WITH_HEADS, "student.train.balance={}"]


@pytest.fixture
def recipe_of(tmp_path):
    """A recipe with overrides, checked."""
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def make(*overrides):
        recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
        check_recipe(recipe, pipeline.ENCODERS, students.INHERITANCES)
        return recipe

    return make


def test_it_is_off_unless_asked_for(recipe_of):
    assert recipe_of().student.train.balance is None
    assert recipe_of(*WATCHED).student.train.balance == BalanceConfig(alpha=0.3, noise=True, until=1.0)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            ["student.train.balance={}"],
            r"student\.train\.balance: student\.baseline has no task .* add a .*TASK\.image",
        ),
        (["teacher.train.balance={}"], r"teacher\.train\.balance: teacher\.objective has no task .* TASK\.text"),
        (["prune.train.balance={}"], r"prune\.train\.balance: student\.objective has no task"),
        ([*WITH_HEADS[:1], "student.train.balance={}"], r"student\.train\.balance: student\.objective has no task"),
        ([*WATCHED, "student.train.shard=true"], r"student\.train\.balance: its noise .* which student\.train\.shard"),
        (["student.unimodal_heads=false", "student.train.balance={}"], r"balance: modalities are compared by heads"),
        (
            [
                "student.train.balance={}",
                "student.encoders={image: {type: convnet, widths: [8], blocks: [0]}}",
                "student.inherit={}",
                "student.objective=[{loss: cross_entropy, task: colour}]",
            ],
            r"student\.train\.balance: there is one encoder, 'image', and nothing to balance",
        ),
        (["teacher.pretrain.image={balance: {}}"], r"teacher\.pretrain\.image\.balance: an encoder learns alone there"),
        ([*WITH_HEADS, "student.train.balance={alpha: -1}"], r"alpha' is -1: Input should be greater than or equal"),
        ([*WITH_HEADS, "student.train.balance={until: 0}"], r"until' is 0: Input should be greater than 0"),
        ([*WITH_HEADS, "student.train.balance={aplha: 1}"], r"aplha'; did you mean 'alpha'\?"),
    ],
)
def test_what_cannot_be_balanced_is_refused_before_a_run(recipe_of, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe_of(*overrides)
