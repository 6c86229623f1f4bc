"""The average of the student's own weights as a teacher: what it says, in trainings that stop, and in a recipe."""

import json

import pytest
import torch
from tiny import make_batch, make_model, make_objective, terms
from tiny_job import assert_same, interrupt_at, lines, weights
from tiny_project import distill, make_project, refusal

from distill import pipeline
from distill.averaging import Average, MeanTeacher, as_mean_teacher
from distill.contracts import UserError
from distill.engine import fit
from distill.interrupts import InterruptedRunError
from distill.multimodal import evaluating
from distill.recipe import load_recipe
from distill.tapped import Tapped
from distill.trainee import Trainee

TAP = "encoders.image.stages:mean"
TERMS = [
    {"loss": "cross_entropy", "task": "kind"},
    {"loss": "kd", "task": "kind", "teacher": "ema", "weight": {"from": 0.0, "to": 1.0, "until": 0.5}},
    {"loss": "mse_logits", "task": "tone", "teacher": "ema"},
    {"loss": "cosine", "embedding": "fused", "teacher": "ema"},
    {"loss": "fitnet", "taps": {"student": TAP, "teacher": TAP}, "teacher": "ema"},
]


@pytest.fixture
def trained(wordpiece_file):
    """A model some steps away from its average, in training mode."""
    batch = make_batch()
    model = make_model(wordpiece_file, dropout=0.5, modality_dropout=0.5)
    tapped, made = make_objective(model, terms(TERMS[0]), batch)
    trainee = Trainee(tapped, made).train()
    average = Average(trainee, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        model(batch)  # moves the statistics of BatchNorm
    average.update(10)
    return trainee, tapped, average, batch


def test_it_says_what_the_averaged_weights_say_and_leaves_the_student_alone(trained):
    trainee, tapped, average, batch = trained
    before = {name: value.clone() for name, value in trainee.state_dict().items()}
    random = torch.get_rng_state()
    said = MeanTeacher(tapped, average)(batch)
    assert torch.equal(torch.get_rng_state(), random) and trainee.model.training
    assert_same(trainee.state_dict(), before)
    with average.applied(trainee), evaluating(trainee.model):
        expected = as_mean_teacher(tapped(batch))
    with evaluating(trainee.model):
        own = tapped(batch)
    assert set(said.logits) == {f"{name}@ema" for name in own.logits}
    torch.testing.assert_close(said.logits, expected.logits, rtol=0, atol=0)
    assert not torch.allclose(said.logits["kind@ema"], own.logits["kind"])
    assert not any(value.requires_grad for part in said for value in part.values())


def make(make_job, name, wordpiece_file, **settings):
    """A job whose objective reads the average, of a student that has its example outputs for a teacher's."""
    torch.manual_seed(0)
    model = make_model(wordpiece_file, dropout=0.2, modality_dropout=0.2)
    with evaluating(model):
        example = as_mean_teacher(Tapped(model, [TAP])(make_job().loader.at(0, 0)["student"]))
    return make_job(name, objective=terms(*TERMS), model=model, example=example, **settings)


@pytest.mark.parametrize(("step", "settings"), [(1, {}), (7, {"accumulate": 3}), (11, {"not_finite": "rollback"})])
def test_a_run_that_was_stopped_gives_what_an_unbroken_one_does(make_job, wordpiece_file, step, settings):
    settings = {"ema": 0.8, **settings}
    whole, stopped = (make(make_job, name, wordpiece_file, **settings) for name in ("whole", "stopped"))
    fit(whole)
    stopped.report = interrupt_at(step)
    with pytest.raises(InterruptedRunError):
        fit(stopped)
    again = make(make_job, "stopped", wordpiece_file, **settings)
    fit(again)
    assert_same(weights(again), weights(whole))
    assert lines(again) == lines(whole)
    assert all(entry["train/mse_logits/tone@ema"] > 0 for entry in lines(whole))
    assert lines(whole)[-1]["train/weight/kd/kind@ema"] == 1.0


def test_a_job_without_an_average_is_refused(make_job, wordpiece_file):
    with pytest.raises(UserError, match=r"reads the teacher 'ema', which needs train\.ema"):
        fit(make(make_job, "none", wordpiece_file))


OBJECTIVE = [
    {"loss": "cross_entropy", "task": "colour"},
    {"loss": "mse_logits", "task": "colour", "teacher": "ema"},
    {"loss": "kd", "task": "shape", "teacher": ["teacher", "ema"], "mix": "confidence"},
    {"loss": "fitnet", "taps": {"student": TAP, "teacher": TAP}, "teacher": "ema"},
]
AVERAGED = ["student.train.ema=0.9", "prune.train.ema=0.9", "trackers=[]"]


def test_a_recipe_in_which_unlabelled_rows_and_texts_learn_from_the_average(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)
    more = [f"student.objective={json.dumps(OBJECTIVE)}", "data.labelled={rows: 30}", "transfer.texts=30"]
    done = pipeline.run(load_recipe("recipe.yaml", [*AVERAGED, *more]), until="pruned", quiet=True)
    assert done["student"].info["steps"] == 2 * 5  # all rows, labelled or not
    for stage in ("student", "pruned"):
        last = json.loads((done[stage].path / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("mse_logits/colour@ema", "kd/shape@teacher+ema", f"fitnet/{TAP}@ema"):
            assert last[f"train/{name}"] > 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (AVERAGED[1:], "student.objective[1]: teacher 'ema' is the average that student.train.ema keeps; set that"),
        (AVERAGED[:1], "teacher 'ema' is the average that prune.train.ema keeps"),
        ([*AVERAGED, "student.train.shard=true"], "needs weights that are not split; set student.train.shard to false"),
        ([*AVERAGED, "student.objective.3.taps.teacher=fusion"], "the student with other weights; give both sides"),
        ([*AVERAGED, "student.objective.1.task=colour.sound"], "no task 'colour.sound'"),
        ([*AVERAGED, "teachers={ema: {run: runs/x}}"], "'ema' cannot name a teacher"),
        ([*AVERAGED, "student.baseline.0={loss: kd, task: colour, teacher: ema}"], "student.baseline: a term reads a"),
    ],
)
def test_what_is_missing_is_told(tmp_path, monkeypatch, overrides, sentence):
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)
    found = refusal(distill("validate", "recipe.yaml", f"student.objective={json.dumps(OBJECTIVE)}", *overrides))
    assert sentence in found
