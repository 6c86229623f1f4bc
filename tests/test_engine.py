"""The engine: exact resumption, guards, averages, accumulation, schedules, selection, and what it writes."""

import itertools
import json
import math
import os
import signal
import time
from functools import partial

import pytest
import torch
from tiny import LABELS, around, make_loader, make_model, terms
from tiny_job import BUDGET, EPOCHS, assert_same, interrupt_at, lines, stopped_and_continued, weights, without_times

from distill import checkpoint, engine, evaluate, interrupts, results
from distill.config import TrainConfig
from distill.contracts import IGNORE, Outputs, UserError
from distill.data.batches import Batches
from distill.engine import fit
from distill.interrupts import InterruptedRunError
from distill.optimize import build_optimizer, lr_factor
from distill.step import TrainingError
from distill.trainee import Trainee
from students import ConvNet


def test_it_learns_and_writes_a_line_an_epoch(make_job):
    job = make_job(epochs=12)
    info = fit(job)
    assert info["epochs"] == 12 and info["steps"] == 60 and info["best"] > 0.8
    entries = lines(job)
    assert [entry["epoch"] for entry in entries] == list(range(1, 13))
    assert [entry["step"] for entry in entries] == list(range(5, 61, 5))
    assert entries[-1]["train/loss"] < 0.5 * entries[0]["train/loss"]
    expected = {"epoch", "step", "lr", "train/loss", "train/cross_entropy/kind", "train/cross_entropy/tone"}
    assert set(entries[0]) == expected | {"valid/kind_accuracy", "valid/tone_accuracy", "valid/accuracy"}
    assert info["best"] == max(entry["valid/accuracy"] for entry in entries)
    assert not checkpoint.exists(job.folder / "checkpoint")


def test_the_logged_loss_is_the_weighted_sum_of_the_terms(make_job):
    objective = terms(
        {"loss": "cross_entropy", "task": "kind", "weight": 0.5}, {"loss": "cross_entropy", "task": "tone", "weight": 2}
    )
    job = make_job(objective=objective)
    fit(job)
    for entry in lines(job):
        total = 0.5 * entry["train/cross_entropy/kind"] + 2 * entry["train/cross_entropy/tone"]
        assert entry["train/loss"] == pytest.approx(total, rel=1e-5)


FEATURES = terms(
    {"loss": "cross_entropy", "task": "kind"},
    {"loss": "fitnet", "taps": {"student": "encoders.image.stages:mean", "teacher": "encoders.image.stages:mean"}},
)


@pytest.mark.parametrize("step", range(1, 16))
def test_a_run_that_was_interrupted_at_any_step_gives_the_same_weights(make_job, step):
    config = {"ema": 0.9, "schedule": "onecycle", "validate_every": 2}
    whole = make_job("whole", **config)
    expected = fit(whole)
    job = make_job("stopped", **config)
    job.report = interrupt_at(step)
    with pytest.raises(InterruptedRunError, match="stopped by SIGINT; state saved in"):
        fit(job)
    assert not (job.folder / "model.safetensors").exists()
    again = make_job("stopped", **config)
    steps = []
    again.report = lambda done, total, note: steps.append(done)
    assert without_times(fit(again)) == without_times(expected)
    assert steps == list(range(step + 1, 16))
    assert_same(weights(again), weights(whole))
    assert lines(again) == lines(whole)


def test_a_projector_and_sgd_momentum_survive_an_interruption(make_job, wordpiece_file):
    teacher = engine.Tapped(make_model(wordpiece_file, seed=5).eval(), ["encoders.image.stages:mean"])

    def wide(batches):
        with torch.no_grad():
            outputs = teacher(batches["student"])
        return outputs._replace(features={name: value.repeat(1, 2) for name, value in outputs.features.items()})

    def make(name):
        loader = make_job().loader
        example = wide(next(loader.epoch(0)))
        return make_job(name, objective=FEATURES, loader=loader, teacher=wide, example=example, optimizer="sgd")

    whole, job = make("whole"), make("stopped")
    assert len(whole.objective.projectors) == 1
    before = whole.objective.projectors["1"].weight.clone()
    fit(whole)
    assert not torch.equal(before, whole.objective.projectors["1"].weight)
    job.report = interrupt_at(7)
    with pytest.raises(InterruptedRunError):
        fit(job)
    again = make("stopped")
    fit(again)
    assert_same(weights(again), weights(whole))
    assert not any(name.startswith(("objective", "projectors")) for name in weights(whole))


def test_a_checkpoint_that_is_due_is_saved_and_a_killed_run_goes_on_from_it(make_job):
    whole = make_job("whole")
    fit(whole)
    job = make_job("killed", checkpoint_minutes=1e-9)

    def die(done, total, note):
        if done == 9:
            raise MemoryError

    job.report = die
    with pytest.raises(MemoryError):
        fit(job)
    assert checkpoint.load(job.folder / "checkpoint")[1]["state"]["step"] == 8
    again = make_job("killed")
    fit(again)
    assert_same(weights(again), weights(whole))


def test_no_checkpoint_is_written_before_it_is_due(make_job, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", lambda *args: pytest.fail("saved too early"))
    fit(make_job(checkpoint_minutes=5))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_its_exit_code_and_gives_the_handlers_back(make_job, signum, code):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    job = make_job()
    job.report = interrupt_at(2, signum)
    with pytest.raises(InterruptedRunError) as caught:
        fit(job)
    assert caught.value.exit_code == code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_echo_of_a_signal_is_no_second_one(make_job):
    """A job system that signals launcher and workers signals workers twice."""
    whole, job = make_job("whole"), make_job("stopped")
    fit(whole)

    def twice(done, total, note):
        if done == 7:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)

    job.report = twice
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM; state saved in"):
        fit(job)
    again = make_job("stopped")
    fit(again)
    assert_same(weights(again), weights(whole))


def test_a_second_signal_takes_its_usual_effect(make_job, monkeypatch):
    monkeypatch.setattr(interrupts, "ECHO_SECONDS", 0.0)
    job = make_job()

    def twice(done, total, note):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # two signals at once would be one
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    job.report = twice
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(job)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_during_the_last_validation_is_not_lost(make_job):
    whole = make_job("whole")
    fit(whole)
    job = make_job("stopped")
    calls = []

    def validate(model):
        calls.append(0)
        if len(calls) == EPOCHS:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole.validate(model)

    job.validate = validate
    with pytest.raises(InterruptedRunError):
        fit(job)
    again = make_job("stopped")
    again.report = lambda done, total, note: pytest.fail("all steps were done")
    fit(again)
    assert_same(weights(again), weights(whole))


def test_a_second_fit_of_a_finished_folder_starts_over_and_gives_the_same(make_job):
    first = make_job()
    fit(first)
    kept = weights(first)
    second = make_job()
    info = fit(second)
    assert info["steps"] == 15 and len(lines(second)) == EPOCHS
    assert_same(weights(second), kept)


def test_batches_made_ahead_give_the_weights_of_batches_made_in_turn(make_job, prepared, wordpiece_file):
    class InTurn(Batches):
        workers = 0

        def __init__(self, loader):
            self.loader = loader

        def __len__(self):
            return len(self.loader)

        def at(self, epoch, number):
            rows = self.loader.order(epoch)[number * 16 : (number + 1) * 16]
            return self.loader.batch(rows, torch.full((len(rows),), self.loader.view(epoch)))

    ahead = make_job("ahead")
    in_turn = make_job("in_turn", loader=InTurn(make_loader(prepared, wordpiece_file)))
    fit(ahead)
    fit(in_turn)
    assert_same(weights(in_turn), weights(ahead))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_teacher_that_is_asked_ahead_teaches_the_same(make_job, prepared, wordpiece_file, workers):
    def look_up(batches):
        asked.append(batches["student"].ids.tolist())
        score = (batches["student"].ids[:, None] % torch.arange(2, 5)).float()
        return Outputs({"kind": score}, {}, {})

    example, runs = Outputs({"kind": torch.zeros(1, 3)}, {}, {}), {}
    for ahead in (False, True):
        asked: list[list[int]] = []
        options = {"loader": make_loader(prepared, wordpiece_file, workers=workers), "example": example}
        job = make_job(f"ahead{ahead}", objective=KD, teacher=look_up, epochs=2, **options)
        job.stored, at_step = (lambda steps: list(map(look_up, steps))) if ahead else None, []
        job.report = lambda done, total, note: at_step.append((done, len(asked)))  # noqa: B023 (called in this turn)
        fit(job)
        runs[ahead] = weights(job), sorted(asked)
        assert any(number > done for done, number in at_step) == ahead
    assert runs[True][1] == runs[False][1]
    assert_same(runs[True][0], runs[False][0])


@pytest.mark.parametrize("workers", [0, 3])
def test_a_run_stopped_within_an_epoch_goes_on_alike_with_any_workers(make_job, prepared, wordpiece_file, workers):
    whole = make_job("whole")
    fit(whole)
    job = make_job("stopped", loader=make_loader(prepared, wordpiece_file, workers=workers))
    job.report = interrupt_at(7)
    with pytest.raises(InterruptedRunError):
        fit(job)
    again = make_job("stopped", loader=make_loader(prepared, wordpiece_file, workers=3 - workers))
    fit(again)
    assert_same(weights(again), weights(whole))


KD = [*LABELS, *terms({"loss": "kd", "task": "kind"})]
CONTRAST = [*LABELS, *terms({"loss": "clip_infonce", "embedding": "image,text", "weight": 0.5})]


@pytest.mark.fault
def test_a_contrastive_run_is_the_same_in_parts_and_where_the_memory_does_not_suffice(make_job, wordpiece_file, caplog):
    runs = {}
    for name, accumulate in (("whole", 1), ("parts", 4), ("split", 1)):
        job = make_job(
            name,
            model=plain_model(wordpiece_file),
            objective=CONTRAST,
            accumulate=accumulate,
            optimizer="sgd",
            clip_norm=None,
        )
        if name == "split":
            inner = job.tapped.model.forward

            def forward(batch, inner=inner):
                if torch.is_grad_enabled() and len(batch.ids) > 5:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return inner(batch)

            job.tapped.model.forward = forward
        fit(job)
        runs[name] = job
    assert "now read in 4 parts" in caplog.text
    assert_same(weights(runs["split"]), weights(runs["parts"]))
    for name, value in weights(runs["whole"]).items():
        torch.testing.assert_close(weights(runs["parts"])[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for first, second in zip(lines(runs["whole"]), lines(runs["parts"]), strict=True):
        assert second == pytest.approx(first, rel=1e-5)


def test_a_contrastive_run_in_parts_with_dropout_can_be_stopped(make_job):
    settings = {"objective": CONTRAST, "accumulate": 3}
    whole = make_job("whole", **settings)
    fit(whole)
    assert_same(weights(stopped_and_continued(make_job, 8, **settings)), weights(whole))


def test_channels_last_changes_where_values_lie_and_not_what_they_are(make_job, wordpiece_file):
    runs = {}
    for chosen in (False, True):
        model = make_model(wordpiece_file)
        model.encoders["image"].stages.to(memory_format=torch.contiguous_format)  # "convnet" asks for it itself
        job = make_job(f"run{chosen}", model=model, optimizer="sgd", channels_last=chosen)
        fit(job)
        runs[chosen] = job
        kernel = model.encoders["image"].stages[1][0][0].weight
        assert kernel.is_contiguous(memory_format=torch.channels_last) is chosen
    assert weights(runs[True]).keys() == weights(runs[False]).keys()
    for name, value in weights(runs[False]).items():
        torch.testing.assert_close(weights(runs[True])[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for first, second in zip(lines(runs[False]), lines(runs[True]), strict=True):
        assert second["train/loss"] == pytest.approx(first["train/loss"], abs=1e-5)


def test_channels_last_reaches_the_images(make_job):
    job = make_job(channels_last=True, epochs=1)
    trained = []

    def look(module, args):
        if module.training:
            trained.append(args[0]["image"])

    job.tapped.model.encoders["image"].register_forward_pre_hook(look)
    fit(job)
    found = [images.is_contiguous(memory_format=torch.channels_last) for images in trained if len(images) == 16]
    assert len(found) == 4 and all(found)


def test_one_row_left_over_trains_with_the_averages_of_batch_norm(make_job, prepared, wordpiece_file):
    (rows,) = prepared.rows("train").shape
    loader = make_loader(prepared, wordpiece_file, batch_size=rows - 1)
    deep = ConvNet(widths=[4, 4, 4, 8], blocks=[0, 0, 0, 0])  # its last map has one position
    job = make_job(model=around({"image": deep}), loader=loader, epochs=2)
    before = deep.stages[3][0][1].running_mean.clone()
    assert fit(job)["steps"] == 4 and all(math.isfinite(entry["train/loss"]) for entry in lines(job))
    assert not torch.equal(before, deep.stages[3][0][1].running_mean)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own, which it does not print
@pytest.mark.parametrize("kind", ["taps", "contrast in parts"])
def test_a_compiled_model_gives_the_losses_of_an_eager_one(make_job, wordpiece_file, kind):
    options = {"contrast in parts": {"accumulate": 3, "objective": CONTRAST}}.get(kind, {})
    if kind == "taps":
        asked = engine.Tapped(make_model(wordpiece_file, seed=5).eval(), ["encoders.image.stages:mean"])
        teacher = torch.no_grad()(lambda batches: asked(batches["student"]))
        example = teacher(next(make_job().loader.epoch(0)))
        options = {"objective": FEATURES, "teacher": teacher, "example": example}
    runs = {}
    for chosen in (False, True):
        model = make_model(wordpiece_file)
        job = make_job(f"run{chosen}", model=model, compile=chosen, optimizer="sgd", epochs=1, **options)
        names = list(model.state_dict())
        fit(job)
        assert set(weights(job)) == set(names) and list(model.state_dict()) == names
        runs[chosen] = job
    for first, second in zip(lines(runs[False]), lines(runs[True]), strict=True):
        assert second["train/loss"] == pytest.approx(first["train/loss"], abs=1e-5)
    for name, value in weights(runs[False]).items():
        torch.testing.assert_close(weights(runs[True])[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_model_that_cannot_be_compiled_is_refused_in_a_sentence(make_job, monkeypatch):
    def backend(graph, examples):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(UserError, match=r"train\.compile: torch cannot compile .*no C\+\+ compiler.*; set it to false"):
        fit(make_job(compile=True))


def test_another_seed_gives_other_weights(make_job):
    one, other = make_job("one"), make_job("other", seed=1)
    fit(one)
    fit(other)
    assert not torch.equal(weights(one)["necks.text.linear.weight"], weights(other)["necks.text.linear.weight"])


class Poisoned:
    """A loss that is not finite, or whose gradient is not, from behind one call to another."""

    def __init__(self, job, at, poison, last=10**9):
        self.calls, self.at, self.poison, self.last, self.inner = 0, at, poison, last, job.objective.forward
        job.objective.forward = self

    def __call__(self, student, teacher, batch, shares=None, ranks=None):
        total, values = self.inner(student, teacher, batch, shares, ranks)
        self.calls += 1
        if not self.at < self.calls <= self.last:
            return total, values
        zero = student.logits["kind"].sum() * 0
        return total + (zero.sqrt() if self.poison == "gradient" else zero + torch.nan), values


@pytest.mark.fault
@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": None}, {"accumulate": 2}])
def test_a_value_that_is_not_finite_stops_with_the_weights_unchanged_and_the_rows_listed(make_job, poison, options):
    job = make_job(**options)
    per_step = options.get("accumulate", 1)
    Poisoned(job, 7 * per_step, poison)
    seen = {}

    def report(done, total, note):
        seen.update({name: value.detach().clone() for name, value in job.tapped.model.named_parameters()})
        seen["step"] = done

    job.report = report
    with pytest.raises(TrainingError, match=rf"the {poison} is not finite .* weights are unchanged, .*not_finite.json"):
        fit(job)
    assert seen.pop("step") == 7
    assert_same({n: p.detach() for n, p in job.tapped.model.named_parameters()}, seen)
    listed = json.loads((job.folder / "not_finite.json").read_text())
    rows = list(job.loader.epoch(1))[2]["student"].ids.tolist()
    assert listed["ids"] == rows
    assert not (job.folder / "model.safetensors").exists()


@pytest.mark.fault
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_step_is_left_out_and_training_goes_on(make_job, policy, caplog):
    """Weights, averages and BatchNorm's statistics are those of before; rollback takes those of the last checkpoint."""
    job = make_job(not_finite=policy, ema=0.9, checkpoint_minutes=60.0)
    Poisoned(job, 7, "loss", last=8)
    states = []

    def report(done, total, note):
        states.append({name: value.detach().clone() for name, value in job.tapped.model.state_dict().items()})

    job.report = report
    first = {name: value.clone() for name, value in job.tapped.model.state_dict().items()}
    info = fit(job)
    assert info["steps"] == 15 and len(states) == 15
    assert_same(states[7], states[6] if policy == "skip" else first)
    assert any(not torch.equal(states[8][name], states[7][name]) for name in states[8])
    assert all(bool(torch.isfinite(value).all()) for value in weights(job).values())
    listed = json.loads((job.folder / "not_finite.json").read_text())
    assert listed["ids"] == list(job.loader.epoch(1))[2]["student"].ids.tolist()
    assert "this step is left out" in caplog.text
    assert math.isfinite(lines(job)[1]["train/loss"])


@pytest.mark.fault
def test_ten_bad_steps_in_a_row_stop_the_run(make_job):
    job = make_job(not_finite="skip")
    Poisoned(job, 2, "gradient")
    with pytest.raises(TrainingError, match="for the 10th step in a row"):
        fit(job)


@pytest.mark.fault
def test_a_teacher_that_is_not_finite_is_named(make_job):
    objective = terms({"loss": "cross_entropy", "task": "kind"}, {"loss": "mse_logits", "task": "tone"})

    def teacher(batches):
        return Outputs({"tone": torch.full((len(batches["student"].ids), 2), torch.nan)}, {}, {})

    job = make_job(objective=objective, teacher=teacher, example=Outputs({"tone": torch.zeros(1, 2)}, {}, {}))
    with pytest.raises(TrainingError, match="the teacher's 'tone' is not finite"):
        fit(job)


class Memory:
    """Memory for so many rows, from one step on."""

    def __init__(self, job, at, rows):
        self.calls, self.at, self.rows, self.inner = 0, at, rows, job.objective.forward
        job.objective.forward = self

    def __call__(self, student, teacher, batch, shares=None, ranks=None):
        self.calls += 1
        if self.calls >= self.at and len(batch.ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(student, teacher, batch, shares, ranks)


@pytest.mark.fault
@pytest.mark.parametrize("step", [1, 2])
def test_without_memory_the_effective_batch_stays(make_job, wordpiece_file, step, caplog):
    options = {"optimizer": "sgd", "clip_norm": None}
    whole = make_job("whole", model=plain_model(wordpiece_file), **options)
    fit(whole)
    job = make_job("split", model=plain_model(wordpiece_file), **options)
    Memory(job, step, 5)  # of 16 rows: a half is too much, a quarter is not
    fit(job)
    assert "now read in 4 parts; the effective batch stays, but BatchNorm" in caplog.text
    assert "train.accumulate" not in caplog.text
    for one, other in zip(lines(whole), lines(job), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(job)[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.fault
def test_too_little_memory_for_one_row_ends_in_a_sentence(make_job):
    job = make_job()
    Memory(job, 1, 0)
    with pytest.raises(TrainingError, match=r"out of memory with one row at a time .*; use a smaller model"):
        fit(job)


@pytest.mark.fault
def test_what_a_cpu_says_without_memory_is_understood(make_job):
    job = make_job()
    error = RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    job.objective.forward = lambda *args: (_ for _ in ()).throw(error)
    with pytest.raises(TrainingError, match="out of memory with one row at a time"):
        fit(job)


def test_max_minutes_ends_the_run_with_a_validated_model(make_job):
    info = fit(make_job(max_minutes=1e-9))
    assert info["steps"] == 1 and info["epochs"] == 1 and info["best"] > 0


def test_a_run_out_of_minutes_that_is_stopped_in_its_last_validation_trains_no_more(make_job):
    whole = make_job("whole", max_minutes=1e-9)
    fit(whole)
    job = make_job("stopped", max_minutes=1e-9)

    def validate(model):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole.validate(model)

    job.validate = validate
    with pytest.raises(InterruptedRunError):
        fit(job)
    again = make_job("stopped", max_minutes=1e-9)
    assert fit(again)["steps"] == 1
    assert_same(weights(again), weights(whole))


def plain_model(wordpiece_file):
    """No BatchNorm in training mode and no dropout: then micro-batches must not matter."""
    model = make_model(wordpiece_file)
    model.encoders["image"].train = lambda mode=True: torch.nn.Module.train(model.encoders["image"], False)
    return model


@pytest.mark.parametrize("count", [2, 3])
def test_accumulation_gives_the_weights_of_the_full_batch(make_job, wordpiece_file, count):
    """Rows that lack a label or a modality are spread unevenly over the micro-batches, as in life."""
    objective = [
        *LABELS,
        *terms({"loss": "cross_entropy", "task": "kind.text"}, {"loss": "cross_entropy", "task": "tone.image"}),
    ]
    runs = {}
    for accumulate in (1, count):
        job = make_job(
            f"by{accumulate}",
            model=plain_model(wordpiece_file),
            objective=objective,
            accumulate=accumulate,
            optimizer="sgd",
            clip_norm=None,
        )
        fit(job)
        runs[accumulate] = job
    one, other = weights(runs[1]), weights(runs[count])
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for first, second in zip(lines(runs[1]), lines(runs[count]), strict=True):
        assert second == pytest.approx(first, rel=1e-4)


def test_accumulation_with_more_micro_batches_than_rows(make_job):
    assert fit(make_job(batch_size=16, accumulate=100, epochs=1))["steps"] == 5


def test_the_average_is_what_is_evaluated_and_kept(make_job):
    job = make_job(ema=0.9, epochs=1)
    history = []

    def report(done, total, note):
        history.append({name: value.clone() for name, value in job.tapped.model.state_dict().items()})

    job.report = report
    start = {name: value.clone() for name, value in job.tapped.model.state_dict().items()}
    scored = {}
    inner = job.validate

    def validate(model):
        scored.update({name: value.clone() for name, value in model.state_dict().items()})
        return inner(model)

    job.validate = validate
    fit(job)
    name, expected = "necks.text.linear.weight", start["necks.text.linear.weight"]
    for step, state in enumerate(history):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * state[name]
    torch.testing.assert_close(weights(job)[name], expected)
    assert_same(weights(job), scored)
    assert not torch.equal(expected, history[-1][name])


def test_training_goes_on_from_the_raw_weights_not_from_the_average(make_job):
    """A vanishing share of the average must not change where training goes."""
    raw, averaged = make_job("raw", epochs=2), make_job("averaged", epochs=2, ema=0.99)
    traces = {}
    for name, job in (("raw", raw), ("averaged", averaged)):
        trace = traces.setdefault(name, [])
        weight = job.tapped.model.necks["text"].linear.weight
        job.report = lambda done, total, note, trace=trace, weight=weight: trace.append(weight.detach().clone())
        fit(job)
    assert all(torch.equal(one, other) for one, other in zip(traces["raw"], traces["averaged"], strict=True))


def test_the_best_weights_are_kept_not_the_last(make_job):
    job = make_job(epochs=4)
    scores = iter([0.1, 0.9, 0.3, 0.2])
    states = []

    def validate(model):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"valid/accuracy": next(scores)}

    job.validate = validate
    info = fit(job)
    assert (info["best"], info["best_epoch"], info["epochs"]) == (0.9, 2, 4)
    assert_same(weights(job), states[1])
    assert_same(dict(job.tapped.model.state_dict()), states[1])


def test_patience_stops_and_keeps_the_best(make_job):
    job = make_job(epochs=9, patience=2)
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.95])
    job.validate = lambda model: {"valid/accuracy": next(scores)}
    info = fit(job)
    assert info["epochs"] == 4 and info["best_epoch"] == 2


def test_patience_waits_for_a_validation_and_counts_epochs(make_job):
    """Of ten epochs, every third is validated: the third, which is best, the sixth, and then five have passed."""
    job = make_job(epochs=20, patience=5, validate_every=3, keep="last")
    scores = iter([0.9, 0.3, 0.2, 0.1])
    states = []

    def validate(model):
        states.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        return {"valid/accuracy": next(scores)}

    job.validate = validate
    info = fit(job)
    assert (info["epochs"], info["best_epoch"], info["kept_epoch"], len(states)) == (9, 3, 9, 3)
    assert_same(weights(job), states[-1])


@pytest.mark.parametrize("score", [0.5, math.nan])
def test_a_score_that_stays_where_it_is_runs_out_of_patience(make_job, score):
    job = make_job(epochs=9, patience=2)
    job.validate = lambda model: {"valid/accuracy": score}
    info = fit(job)
    assert info["epochs"] == (2 if math.isnan(score) else 3) == info["kept_epoch"]
    assert lines(job)[0]["valid/accuracy"] == (None if math.isnan(score) else score)
    assert ("valid/accuracy" in results._curve(job.folder / "metrics.jsonl")[0]) is not math.isnan(score)


def test_validation_every_other_epoch_and_at_the_end(make_job):
    job = make_job(epochs=5, validate_every=2)
    fit(job)
    assert ["valid/accuracy" in entry for entry in lines(job)] == [False, True, False, True, True]


@pytest.mark.parametrize(("max_steps", "epochs"), [(7, 2), (5, 1), (1, 1), (100, 3)])
def test_max_steps_ends_the_run_with_a_validated_model(make_job, max_steps, epochs):
    job = make_job(max_steps=max_steps)
    info = fit(job)
    assert info["steps"] == min(max_steps, 15) and len(lines(job)) == info["epochs"] == epochs
    assert "valid/accuracy" in lines(job)[-1] and info["best_epoch"] > 0


def test_a_run_ended_by_max_steps_resumes_too(make_job):
    whole = make_job("whole", max_steps=7)
    fit(whole)
    for step in (6, 7):
        job = make_job(f"stopped{step}", max_steps=7)
        job.report = interrupt_at(step)
        with pytest.raises(InterruptedRunError):
            fit(job)
        again = make_job(f"stopped{step}", max_steps=7)
        assert fit(again)["steps"] == 7
        assert_same(weights(again), weights(whole))


def test_clipping_bounds_the_step(make_job):
    lengths = {}
    for clip in (None, 1e-3):
        job = make_job(f"clip{clip}", optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=clip)
        job.config = job.config.model_copy(update={"max_steps": 1, "schedule": "constant", "warmup": 0.0})
        before = {name: value.detach().clone() for name, value in job.tapped.model.named_parameters()}
        fit(job)
        moved = [(value - before[name]).norm() for name, value in job.tapped.model.named_parameters()]
        lengths[clip] = torch.stack(moved).norm().item()
    assert lengths[1e-3] == pytest.approx(1e-3, rel=1e-3) and lengths[None] > 1e-2


def test_the_learning_rate_of_each_epoch_is_logged(make_job):
    job = make_job(schedule="cosine", warmup=0.2)
    fit(job)
    config = job.config
    assert [entry["lr"] for entry in lines(job)] == [
        pytest.approx(config.lr * lr_factor(step, 15, config)) for step in (4, 9, 14)
    ]


def factors(total=100, **config):
    settings = TrainConfig.model_validate(BUDGET | config)
    return [lr_factor(step, total, settings) for step in range(total)]


def test_schedules():
    constant = factors(schedule="constant", warmup=0.1)
    assert constant[10:] == [1.0] * 90 and constant[0] > 0
    assert all(b > a for a, b in itertools.pairwise(constant[:11]))
    cosine = factors(schedule="cosine", warmup=0.1)
    assert cosine[10] == 1.0 and cosine[55] == pytest.approx(0.5) and cosine[-1] < 1e-3
    assert all(b < a for a, b in itertools.pairwise(cosine[10:]))
    onecycle = factors(schedule="onecycle")
    assert max(range(100), key=onecycle.__getitem__) == 30 and onecycle[0] < 0.01 and onecycle[-1] < 1e-3
    assert factors(schedule="cosine", warmup=0.0)[0] == 1.0
    for schedule in ("constant", "cosine", "onecycle"):
        assert all(0 < factor <= 1 for factor in factors(3, schedule=schedule))
        assert 0 < factors(1, schedule=schedule)[0] <= 1


def test_lr_scale_zero_freezes_and_others_scale(make_job, wordpiece_file):
    job = make_job(lr_scale={"encoders.text": 0.0, "heads": 0.1, "heads.kind": 10.0}, epochs=1)
    before = {name: value.detach().clone() for name, value in job.tapped.model.named_parameters()}
    fit(job)
    after = dict(job.tapped.model.named_parameters())
    assert torch.equal(after["encoders.text.table.weight"], before["encoders.text.table.weight"])
    assert not after["encoders.text.table.weight"].requires_grad
    assert not torch.equal(after["encoders.image.stages.0.0.0.weight"], before["encoders.image.stages.0.0.0.weight"])
    moved = {
        task: (after[f"heads.{task}.linear.weight"] - before[f"heads.{task}.linear.weight"])
        for task in ("kind", "tone")
    }
    assert moved["kind"].abs().mean() > 20 * moved["tone"].abs().mean()


def test_optimizer_groups(make_job):
    job = make_job()
    trainee = Trainee(job.tapped, job.objective)
    for parameter in trainee.model.encoders["text"].parameters():
        parameter.requires_grad_(False)
    config = TrainConfig.model_validate(BUDGET | {"weight_decay": 0.3, "lr_scale": {"fusion": 0.5}})
    optimizer = build_optimizer(trainee, config)
    names = {id(parameter): name for name, parameter in trainee.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert found["model.fusion.linear.weight"] == (0.01, 0.3) and found["model.fusion.linear.bias"] == (0.01, 0.0)
    assert found["model.necks.text.norm.weight"] == (0.02, 0.0)
    assert "model.encoders.text.table.weight" not in found
    assert len(found) == sum(parameter.requires_grad for parameter in trainee.parameters())
    sgd = build_optimizer(trainee, config.model_copy(update={"optimizer": "sgd", "momentum": 0.7}))
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["momentum"] == 0.7


def test_sgd_learns(make_job):
    job = make_job(optimizer="sgd", lr=0.1, epochs=12)
    assert fit(job)["best"] > 0.7


def test_stages_of_one_process_may_differ_in_precision(make_job):
    single = make_job("single", epochs=4)
    fit(single)
    half = make_job("half", precision="bf16", epochs=4)
    fit(half)
    fit(make_job("again"))
    name = "necks.text.linear.weight"
    assert weights(half)[name].dtype == torch.float32
    assert not torch.equal(weights(half)[name], weights(single)[name])
    assert lines(half)[-1]["train/loss"] == pytest.approx(lines(single)[-1]["train/loss"], rel=0.2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works there")
def test_a_precision_that_the_device_lacks_is_refused_in_a_sentence(make_job):
    with pytest.raises(UserError, match=r"train\.precision: 'fp16' needs a GPU, this is cpu; use 'no' or 'bf16'"):
        fit(make_job(precision="fp16"))


def test_what_a_launcher_asks_for_and_a_recipe_decides_is_told(make_job, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    fit(make_job("told", epochs=1))
    assert "the launcher asks for bf16; the recipe's train.precision, no, is what counts" in caplog.text
    assert "train.shard splits weights" in caplog.text
    caplog.clear()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    fit(make_job("agreed", epochs=1, precision="bf16"))
    assert "launcher" not in caplog.text
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"DeepSpeed is not supported; .*train\.shard"):
        fit(make_job("refused"))


def test_batch_norm_in_parts_is_worth_a_warning(make_job, wordpiece_file, caplog):
    fit(make_job("parts", accumulate=2, epochs=1))
    assert "train.accumulate: BatchNorm sees each of the 2 parts alone" in caplog.text


def test_a_checkpoint_of_another_architecture_is_refused_in_a_sentence(make_job, wordpiece_file):
    job = make_job()
    job.report = interrupt_at(2)
    with pytest.raises(InterruptedRunError):
        fit(job)
    with pytest.raises(UserError, match="the checkpoint is of another model; delete it"):
        fit(make_job(model=make_model(wordpiece_file, dim=10)))


def test_validation_rows_without_any_label_are_refused_in_a_sentence(make_job, prepared, wordpiece_file):
    job = make_job()
    valid = make_loader(prepared, wordpiece_file, split="valid", shuffle=False, augment=None)
    bare = [
        batch["student"]._replace(
            targets={task: torch.full_like(labels, IGNORE) for task, labels in batch["student"].targets.items()}
        )
        for batch in valid.epoch(0)
    ]
    job.validate = partial(evaluate.validation_scores, batches=lambda: iter(bare), tasks=prepared.tasks)
    with pytest.raises(UserError, match="no validation row has a label"):
        fit(job)


def test_a_best_score_is_finite_json(make_job):
    info = fit(make_job(epochs=1))
    assert math.isfinite(info["best"]) and json.loads(json.dumps(info)) == info
