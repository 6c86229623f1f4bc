"""Terms on tokens: masks, projectors, and taps that are no tokens of one text."""

import pytest
import torch
import torch.nn.functional as F
from test_objective import ROWS, value, without
from tiny import make_batch, terms

from distill import losses
from distill.contracts import Outputs, UserError
from distill.losses.objective import Objective
from distill.losses.tokens import scores_of

TOKENS = {"student": "encoders.text.layer", "teacher": "encoders.text.layer"}
PATCHES = {"student": "encoders.image.layer", "teacher": "encoders.image.layer"}


def tokens(seed, width=8, length=5):
    generator = torch.Generator().manual_seed(seed)
    values = {side: torch.randn(ROWS, length, width, generator=generator) for side in ("text", "image")}
    scores = torch.randn(ROWS, 2, length, length, generator=generator)
    features = {f"encoders.{side}.layer": value for side, value in values.items()} | {"encoders.text.scores": scores}
    return Outputs({}, {}, features)


@pytest.mark.parametrize(
    ("item", "options"),
    [
        ({"loss": "token_mse", "taps": TOKENS}, {}),
        ({"loss": "minilm_relations", "taps": TOKENS, "params": {"heads": 2}}, {"heads": 2}),
        ({"loss": "attention_transfer", "taps": dict.fromkeys(TOKENS, "encoders.text.scores")}, {}),
    ],
    ids=lambda item: item.get("loss", ""),
)
def test_padding_and_rows_without_a_text_take_no_part_in_losses_on_tokens(item, options):
    whole = make_batch(ROWS)
    lacking = without(whole, "text", 2)
    kept = [0, 1, 3, 4, 5]
    student, teacher = tokens(0), tokens(1)
    name = item["taps"]["student"]
    arguments = [o.features[name][kept] for o in (student, teacher)]
    expected = getattr(losses, item["loss"])(*arguments, whole.inputs["text_mask"][kept], **options)
    torch.testing.assert_close(value(item, lacking, student, teacher), expected)
    everything = getattr(losses, item["loss"])(*arguments, **options)
    assert abs(everything - expected) > 1e-4


def test_texts_may_end_before_the_batch():
    """As where rows without a text stand behind those of the data."""
    whole = without(make_batch(ROWS), "text", 4, 5)
    short = whole._replace(inputs={name: rows[:4] for name, rows in whole.inputs.items()})
    item = {"loss": "token_mse", "taps": TOKENS}
    assert value(item, short, tokens(0), tokens(1)) == value(item, whole, tokens(0), tokens(1))


@pytest.mark.parametrize("sides", [("student",), ("teacher",), ("student", "teacher")], ids=str)
def test_attentions_behind_their_softmax_are_no_scores_to_take_another_of(sides):
    """What most models let tap."""
    name, whole = "encoders.text.scores", make_batch(ROWS)
    mask = whole.inputs["text_mask"]
    given = {"student": tokens(0), "teacher": tokens(1)}
    item = {"loss": "attention_transfer", "taps": dict.fromkeys(given, name)}
    expected = value(item, whole, **given)

    def behind(said):
        hidden = ~mask[:, None, None, :]
        return said._replace(features={name: said.features[name].masked_fill(hidden, -torch.inf).softmax(-1)})

    tapped = {side: behind(said) if side in sides else said for side, said in given.items()}
    torch.testing.assert_close(value(item, whole, **tapped), expected)


def test_the_gradient_through_a_softmax_is_that_of_the_scores():
    scores = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    direct = torch.autograd.grad(losses.attention_transfer(scores, teacher), scores)
    through = torch.autograd.grad(losses.attention_transfer(scores_of(scores.softmax(-1)), teacher), scores)
    torch.testing.assert_close(through, direct)


def test_tokens_of_images_have_no_mask_and_widths_get_a_projector():
    student, teacher = tokens(0), tokens(1, width=12)
    objective = Objective(terms({"loss": "token_mse", "taps": PATCHES}), student, teacher)
    own = objective.projectors["0"](student.features["encoders.image.layer"])
    expected = F.mse_loss(own, teacher.features["encoders.image.layer"])
    torch.testing.assert_close(objective(student, teacher, make_batch(ROWS))[0], expected)


@pytest.mark.parametrize(
    ("item", "teacher", "message"),
    [
        (
            {"loss": "token_mse", "taps": TOKENS},
            tokens(1, length=6),
            r"as many tokens, \[B, L, D\], got \[5, 8\] and \[6, 8\]",
        ),
        ({"loss": "attention_transfer", "taps": TOKENS}, tokens(1), "as many heads and tokens"),
    ],
)
def test_taps_that_are_no_tokens_of_one_text_are_refused(item, teacher, message):
    with pytest.raises(UserError, match=message):
        Objective(terms(item), tokens(0), teacher)


def test_a_batch_of_other_tokens_is_refused():
    with pytest.raises(
        UserError, match=r"7 tokens of the student's text meet \[5, 5\] in the taps; both models need the same"
    ):
        value({"loss": "token_mse", "taps": TOKENS}, make_batch(ROWS, 7), tokens(0), tokens(1))
