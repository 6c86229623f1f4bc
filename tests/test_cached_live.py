"""A cached teacher and a live one give the same student (the augmentation replays, so both say the same of a view)."""

from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import TASKS, make_loader, make_model, make_objective, terms
from tiny_project import make_project
from torch import nn

from distill import engine, evaluate, pipeline
from distill.cache import TeacherCache, flatten, unflatten
from distill.config import TrainConfig
from distill.contracts import Outputs
from distill.engine import Job, fit
from distill.recipe import load_recipe
from distill.tapped import Tapped
from distill.trainee import Trainee

TAP = "encoders.image.stages:mean"
OBJECTIVE = terms(
    {"loss": "cross_entropy", "task": "kind"},
    {"loss": "kd", "task": "kind", "params": {"temperature": 2.0}},
    {"loss": "kd", "task": "tone.text"},
    {"loss": "cosine", "embedding": "fused"},
    {"loss": "fitnet", "taps": {"student": TAP, "teacher": TAP}, "weight": 0.1},
)
KEY = {"teacher": "aa", "data": "bb", "seed": 0}
VIEWS = [0, 1, 2]
READS = ("student", "teacher")


@pytest.fixture(scope="module")
def teacher(wordpiece_file):
    """A random, wider teacher in eval mode, with the tap that the objective reads."""
    model = make_model(wordpiece_file, fusion="cross_attention", dim=16, seed=9).eval().requires_grad_(False)
    return Tapped(model, [TAP])


def live(teacher, batches) -> Outputs:
    with torch.no_grad():
        return teacher(batches["teacher"])


def fill(folder, loader, outputs_of, dtype):
    """Store what ``outputs_of(ids, view)`` says for every training row and view."""
    ids = loader.data.ids[loader.row_positions]
    TeacherCache.fill(folder, rows=ids, views=VIEWS, produce=outputs_of, key=KEY, dtype=dtype, batch_size=32)
    return TeacherCache.open(folder, KEY)


@pytest.fixture
def loader(prepared, wordpiece_file):
    return make_loader(prepared, wordpiece_file, READS)


@pytest.fixture
def train(prepared, wordpiece_file, loader, tmp_path):
    """Train the same student on a teacher; returns its weights, and the loss of each step."""

    def run(name, answer, epochs=3, **config):
        first = loader.at(0, 0)
        model = make_model(wordpiece_file, dropout=0.2, modality_dropout=0.1)
        tapped, objective = make_objective(model, OBJECTIVE, first["student"], answer(first))
        inner, losses = objective.forward, []

        def forward(*args):
            total, values = inner(*args)
            losses.append({"loss": total.item(), **{term: value.item() for term, value in values.items()}})
            return total, values

        objective.forward = forward
        valid = make_loader(prepared, wordpiece_file, split="valid", shuffle=False, augment=None)
        batches = evaluate.clean_batches(valid, "student")
        validate = partial(evaluate.validation_scores, batches=batches, tasks=TASKS)
        folder = tmp_path / name
        folder.mkdir()
        settings = TrainConfig.model_validate({"epochs": epochs, "lr": 0.01, "ema": 0.9} | config)
        fit(Job(tapped, objective, loader, "student", settings, folder, 0, validate, answer))
        return load_file(folder / "model.safetensors"), losses

    return run


def test_a_float32_cache_of_the_same_teacher_batches_gives_identical_weights(teacher, loader, train, tmp_path):
    said: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def noted(batches):
        outputs = live(teacher, batches)
        for row, view, *values in zip(
            batches["teacher"].ids.tolist(), batches["teacher"].views.tolist(), *flatten(outputs).values(), strict=True
        ):
            said[row, view] = dict(zip(flatten(outputs), values, strict=True))
        return outputs

    from_live, live_losses = train("live", noted)

    def again(ids: np.ndarray, view: int) -> Outputs:
        rows = [said[row, view] for row in ids.tolist()]
        return unflatten({name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    cache = fill(tmp_path / "cache", loader, again, "float32")
    from_cache, cache_losses = train("cached", lambda batches: cache(batches["student"]))
    assert live_losses == cache_losses
    assert [name for name, value in from_live.items() if not torch.equal(value, from_cache[name])] == []


def test_a_float16_cache_filled_in_other_batches_stays_within_a_thousandth(teacher, loader, train, tmp_path):
    ids = loader.data.ids[loader.row_positions]

    def produce(wanted: np.ndarray, view: int) -> Outputs:
        rows = loader.row_positions[np.searchsorted(ids, wanted)]
        return live(teacher, loader.batch(rows, torch.full((len(rows),), view)))

    cache = fill(tmp_path / "cache", loader, produce, "float16")
    assert cache.check(produce) > 0.9999
    for epoch in VIEWS:
        for batches in loader.epoch(epoch):
            stored = flatten(cache(batches["student"]))
            for name, value in flatten(live(teacher, batches)).items():
                torch.testing.assert_close(stored[name], value, rtol=1e-3, atol=1e-3, msg=name)
    from_live, live_losses = train("live", partial(live, teacher), epochs=20, lr=3e-4)
    from_cache, cache_losses = train("cached", lambda batches: cache(batches["student"]), epochs=20, lr=3e-4)
    assert len(live_losses) == 100
    for step, (one, other) in enumerate(zip(live_losses, cache_losses, strict=True)):
        for name, value in one.items():
            assert abs(other[name] - value) < 1e-3, (step, name)
    assert any(not torch.equal(value, from_cache[name]) for name, value in from_live.items())  # two runs, not one


def test_another_view_than_the_students_is_noticed(teacher, loader, train, tmp_path):
    """The comparison above can fail: a teacher that sees another augmentation gives another student."""
    other_view = make_loader(loader.data, next(iter(loader._specs.values())).tokenizer, ("teacher",), seed=1)

    def elsewhere(batches):
        batch = batches["student"]
        rows = np.searchsorted(loader.data.ids, batch.ids.numpy())
        return live(teacher, other_view.batch(rows, batch.views))

    _, same = train("live", partial(live, teacher))
    _, shifted = train("elsewhere", elsewhere)
    assert max(abs(one["loss"] - other["loss"]) for one, other in zip(same, shifted, strict=True)) > 1e-3


@pytest.mark.parametrize("stage", ["student", "pruned"])
def test_the_pipeline_begins_with_the_same_weights(started, stage):
    """Projectors of the objective are drawn anew in each stage, and are no part of the models that are compared."""
    cached, live = (weights[stage] for weights in started)
    assert any(name.startswith("objective.") for name in cached)
    assert [name for name, value in cached.items() if not torch.equal(value, live[name])] == []


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Stage -> the weights that training begins with, of a run with a cache and of one with a live teacher."""
    recipe_file = make_project(tmp_path_factory.mktemp("project"))
    runs = []

    def noted(job):
        trainee = Trainee(job.tapped, job.objective)
        kept = trainee if job.folder.name == "student" else nn.ModuleDict({"objective": job.objective})
        runs[-1][job.folder.name] = {name: value.clone() for name, value in kept.state_dict().items()}
        return fit(job)

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(recipe_file.parent)
        patched.setattr(engine, "fit", noted)
        for overrides in ([], ["cache.enabled=false"]):
            runs.append({})
            recipe = load_recipe(recipe_file, ["student.inherit={}", *overrides])
            pipeline.run(recipe, until="pruned", quiet=True)
    return runs
