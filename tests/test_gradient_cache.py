"""Gradients of a batch in parts are those of the whole, also where a loss compares rows with each other."""

import pytest
import torch
from ranks_job import make_model as in_float64
from tiny import make_batch, make_model, make_objective, terms
from torch import nn

from distill.batch_parts import take
from distill.config import TrainConfig
from distill.contracts import Outputs
from distill.gradient_cache import backward_in_parts
from distill.optimize import build_optimizer
from distill.ranks import Ranks, accelerator_for
from distill.step import Stepper
from distill.tapped import Tapped
from distill.trainee import Trainee

CONTRAST = [
    {"loss": "cross_entropy", "task": "kind"},
    {"loss": "cross_entropy", "task": "tone.image", "weight": 0.5},
    {"loss": "clip_infonce", "embedding": "image,text"},
]
LAYER = "encoders.image.layer"
TAUGHT = [*CONTRAST, {"loss": "kd", "task": "kind"}, {"loss": "fitnet", "taps": {"student": LAYER, "teacher": LAYER}}]


@pytest.fixture
def step_of(tmp_path):
    """What makes the steps of a model, in float64 where the model is."""

    def make(model, objective, batch, teacher=None, **config):
        tapped, made = make_objective(model, terms(*objective), batch, teacher)
        settings = TrainConfig.model_validate(config)
        trainee = Trainee(tapped, made.to(next(model.parameters()).dtype), compiled=settings.compile).train()
        optimizer = build_optimizer(trainee, settings)
        return Stepper(accelerator_for(settings.precision), Ranks(), trainee, optimizer, settings, tmp_path)

    return make


def gradients(stepper, batch, teacher=None):
    """The gradients of each parameter, and each logged value, from a fixed seed on."""
    torch.manual_seed(0)
    rows, values = stepper._gradients(batch, teacher)
    assert rows == len(batch.ids)
    named = stepper.trainee.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}, values


def batch_of(rows):
    """Random rows, of which some lack a modality or a label."""
    batch = make_batch(rows)
    for row, name in ((3, "image"), (8, "text"), (9, "text")):
        batch.present[name][row] = False
    batch.targets["kind"][5] = -100
    return batch


def test_what_a_loss_draws_is_not_drawn_again():
    """Masks of a loss are others in the next step, though the second forward repeats the draws of the first."""
    model, batch = nn.Linear(1, 3), make_batch(4)
    rows = [torch.tensor([0, 2]), torch.tensor([1, 3])]
    drawn, seen = [], []

    def forward(part):
        seen.append(torch.rand(1).item())
        return Outputs({"kind": model(part.ids[:, None].float())}, {}, {})

    def loss_backward(outputs):
        drawn.append(torch.rand(1).item())
        loss = outputs.logits["kind"].sum()
        loss.backward()
        return loss, {}

    for _ in range(3):
        backward_in_parts([take(batch, some) for some in rows], rows, forward, loss_backward, [])
    assert len({*drawn, *seen}) == 3 + 6  # each part's own number twice
    assert seen[:2] == seen[2:4] and seen[4:6] == seen[6:8]


def assert_alike(one, other):
    assert one[0].keys() == other[0].keys() and len(one[0]) > 10
    for name, value in one[0].items():
        torch.testing.assert_close(other[0][name], value, rtol=1e-6, atol=1e-12, msg=name)
    assert other[1] == pytest.approx(one[1], rel=1e-6)


@pytest.mark.parametrize("accumulate", [2, 3, 4, 64, 100])
def test_parts_of_a_contrastive_batch_give_its_gradients(step_of, accumulate):
    batch = batch_of(64)
    one = gradients(step_of(in_float64(8, 0), CONTRAST, batch), batch)
    parts = gradients(step_of(in_float64(8, 0), CONTRAST, batch, accumulate=accumulate), batch)
    assert_alike(one, parts)


def test_the_contrastive_loss_of_parts_alone_is_another(step_of):
    """What the cache is for."""
    batch = batch_of(64)
    _, values = gradients(step_of(in_float64(8, 0), CONTRAST, batch), batch)
    stepper = step_of(in_float64(8, 0), CONTRAST, batch)
    alone = [gradients(stepper, take(batch, torch.arange(first, 64, 4)))[1] for first in range(4)]
    assert sum(part["clip_infonce/image,text"] for part in alone) / 4 < 0.9 * values["clip_infonce/image,text"]


def test_projectors_and_a_teacher_take_part(step_of):
    batch = batch_of(64)
    with torch.no_grad():
        teacher = Tapped(in_float64(10, 1).eval(), [LAYER])(batch)
    one = gradients(step_of(in_float64(8, 0), TAUGHT, batch, teacher), batch, teacher)
    parts = gradients(step_of(in_float64(8, 0), TAUGHT, batch, teacher, accumulate=4), batch, teacher)
    assert "objective.projectors.4.weight" in one[0]
    assert_alike(one, parts)


class Noted(nn.Module):
    """A dropout whose results are kept."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(nn.functional.dropout(x, 0.5, self.training))
        return self.seen[-1]


def test_both_forwards_of_a_part_draw_the_same_dropout(step_of):
    """The gradients are those of a batch whose parts had these draws."""
    batch = batch_of(32)
    model = in_float64(8, 0)
    model.modality_dropout = 0.5
    noted = model.necks["text"].dropout = Noted()
    stepper = step_of(model, CONTRAST, batch, accumulate=4)
    noted.seen.clear()
    found = gradients(stepper, batch)
    drawn = torch.rand(3)
    first, second = noted.seen[:4], noted.seen[4:]
    assert len(second) == 4 and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(first[0] == 0, first[1] == 0)

    torch.manual_seed(0)
    rows = [torch.arange(number, 32, 4) for number in range(4)]
    outputs = [stepper.trainee.answer(take(batch, some)) for some in rows]
    order = torch.cat(rows).argsort()
    joined = [{name: torch.cat([part[kind][name] for part in outputs])[order] for name in outputs[0][kind]}
              for kind in range(3)]  # fmt: skip
    stepper.optimizer.zero_grad()
    loss, _ = stepper.trainee.loss(type(outputs[0])(*joined), None, batch, None, None)
    loss.backward()
    assert torch.equal(torch.rand(3), drawn)  # the generator stands where one forward leaves it
    expected = {name: p.grad for name, p in stepper.trainee.named_parameters() if p.grad is not None}
    assert_alike((expected, {"loss": loss.item()}), (found[0], {"loss": found[1]["loss"]}))


def test_batch_norm_counts_each_part_once(step_of, wordpiece_file):
    batch = batch_of(32)
    models = {accumulate: make_model(wordpiece_file) for accumulate in (1, 4)}
    for accumulate, model in models.items():
        stepper = step_of(model, CONTRAST, batch, accumulate=accumulate)
        gradients(stepper, batch)
    counts = {n: int(model.encoders["image"].stages[0][0][1].num_batches_tracked) for n, model in models.items()}
    assert counts == {1: 1, 4: 4}
    reference = make_model(wordpiece_file).train()
    for first in range(4):
        reference(take(batch, torch.arange(first, 32, 4)))
    for name, buffer in reference.named_buffers():
        assert torch.equal(dict(models[4].named_buffers())[name], buffer), name


def test_bfloat16_works_and_is_near(step_of, wordpiece_file):
    batch = batch_of(32)
    one, parts = (
        gradients(
            step_of(make_model(wordpiece_file), CONTRAST, batch, accumulate=accumulate, precision=precision), batch
        )
        for accumulate, precision in ((4, "no"), (4, "bf16"))
    )
    assert parts[1] == pytest.approx(one[1], rel=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in parts[0].values())
