"""Losses that learn or store something, in trainings: stopped and continued, in micro-batches, and as a recipe."""

import json
from pathlib import Path

import pytest
import torch
from ranks_job import make_model as in_float64
from safetensors.torch import load_file
from tiny import make_batch, make_model, make_objective, only_ids, terms
from tiny_job import assert_same, interrupt_at, weights
from tiny_project import make_project

from distill import pipeline
from distill.averaging import join_teachers
from distill.config import TrainConfig
from distill.contracts import Outputs, UserError
from distill.engine import fit
from distill.interrupts import InterruptedRunError
from distill.optimize import build_optimizer
from distill.ranks import Ranks, accelerator_for
from distill.recipe import load_recipe
from distill.step import MOST_OVERFLOWN, Stepper, TrainingError
from distill.tapped import Tapped
from distill.trainee import Trainee

MAP = "encoders.image.stages.1.0"  # before a ReLU
OF_STAGES = ["encoders.image.stages.0", "encoders.image.stages.1"]
TRAINED = [
    {"loss": "cross_entropy", "task": "kind"},
    {"loss": "vid", "taps": {"student": MAP, "teacher": MAP}, "weight": 0.1},
    {"loss": "mgd", "taps": {"student": MAP, "teacher": MAP}, "weight": 1e-3},
    {"loss": "ofd", "taps": {"student": MAP, "teacher": MAP}, "weight": 1e-3},
    {"loss": "fsp", "taps": {"student": OF_STAGES, "teacher": OF_STAGES}, "weight": 0.1},
    {"loss": "review", "taps": {"student": OF_STAGES, "teacher": OF_STAGES}, "weight": {"from": 1.0, "to": 0.0}},
    {"loss": "ctkd", "task": "kind", "params": {"strength": {"from": 0, "to": 1, "until": 0.5, "schedule": "cosine"}}},
    {"loss": "clip_afd", "embedding": "image,text", "weight": 0.1},
    {"loss": "crd", "embedding": "fused", "weight": 0.01, "params": {"dim": 4, "negatives": 8}},
    {"loss": "queue_kl", "embedding": "fused", "params": {"size": 30}},
    {"loss": "kd", "task": "kind", "teacher": ["teacher", "other"], "mix": "learned"},
]
PATHS = [MAP, *OF_STAGES]


@pytest.mark.parametrize(
    ("step", "settings"), [(1, {}), (7, {"ema": 0.9, "not_finite": "skip"}), (13, {"accumulate": 3})]
)
def test_a_run_with_parts_that_was_stopped_gives_what_an_unbroken_one_does(make_job, wordpiece_file, step, settings):
    asked, other = Tapped(make_model(wordpiece_file, seed=5).eval(), PATHS), make_model(wordpiece_file, seed=6).eval()

    def teacher(batches):
        with torch.no_grad():
            said = {f"{name}@other": value for name, value in other(batches["student"]).logits.items()}
            return join_teachers(asked(batches["student"]), Outputs(said, {}, {}))

    def make(name):
        loader = make_job().loader
        torch.manual_seed(3)
        return make_job(
            name,
            objective=terms(*TRAINED),
            loader=loader,
            teacher=teacher,
            example=teacher(loader.at(0, 0)),
            **settings,
        )

    whole, job = make("whole"), make("stopped")
    fresh = {name: value.clone() for name, value in whole.objective.state_dict().items()}
    fit(whole)
    job.report = interrupt_at(step)
    with pytest.raises(InterruptedRunError):
        fit(job)
    saved = load_file(job.folder / "checkpoint" / "trainee.safetensors")
    assert saved["objective.parts.8.student_bank"].shape == (80, 4)
    assert saved["objective.parts.9.count"].item() == 16 * step
    averaged = load_file(job.folder / "checkpoint" / "average.safetensors")
    assert bool(averaged) == ("ema" in settings) and all(name.startswith("model.") for name in averaged)
    again = make("stopped")
    fit(again)
    assert_same(weights(again), weights(whole))
    left = whole.objective.state_dict()
    assert_same(again.objective.state_dict(), left)
    assert [name for name, value in left.items() if torch.equal(value, fresh[name])] == [
        "parts.3.margins",
        "parts.8.constant",
    ]
    assert not any(name.startswith(("objective", "parts")) for name in weights(whole))


def test_learned_weights_of_teachers_may_move_faster(make_job):
    job = make_job()
    example = Outputs({f"kind{name}": torch.randn(16, 3) for name in ("", "@other")}, {}, {})
    made = make_job(objective=terms(TRAINED[0], TRAINED[-1]), model=job.tapped.model, example=example)
    trainee = Trainee(made.tapped, made.objective)
    optimizer = build_optimizer(trainee, TrainConfig(lr=0.01, lr_scale={"objective.parts.1": 10}))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in trainee.named_parameters()}
    assert found.pop("objective.parts.1.scores") == pytest.approx(0.1) and set(found.values()) == {0.01}


IN_PARTS = [
    {"loss": "cross_entropy", "task": "kind"},
    {"loss": "crd", "embedding": "text", "params": {"dim": 4, "negatives": 9}},
    {"loss": "queue_kl", "embedding": "image", "params": {"size": 30, "teacher_temperature": 0.1}},
    {"loss": "ctkd", "task": "tone"},
]
AFD = {"loss": "clip_afd", "embedding": "image,text"}


@pytest.mark.parametrize("items", [IN_PARTS, [*IN_PARTS, AFD]], ids=["apart", "through-the-gradient-cache"])
def test_micro_batches_give_the_steps_of_the_whole_batch(tmp_path, items):
    batches = [make_batch(24, seed=seed)._replace(ids=torch.arange(24) + 20 * seed) for seed in range(3)]
    model = in_float64(10, 1).eval().requires_grad_(False)

    def trained(accumulate):
        example = model(batches[0])
        tapped, made = make_objective(
            in_float64(8, 0), terms(*items), batches[0], example, rows=only_ids(torch.arange(80))
        )
        config = TrainConfig(accumulate=accumulate, lr=0.1, optimizer="sgd")
        trainee = Trainee(tapped, made.double()).train()
        stepper = Stepper(accelerator_for("no"), Ranks(), trainee, build_optimizer(trainee, config), config, tmp_path)
        values = []
        for step, batch in enumerate(batches):
            made.advance(step, 3)
            values.append(stepper({"student": batch}, "student", lambda given: model(given["student"]))[1])
        return trainee.state_dict(), values

    torch.manual_seed(0)
    whole, values = trained(1)
    torch.manual_seed(0)
    parts, of_parts = trained(5)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-9, msg=name)
    for one, other in zip(values, of_parts, strict=True):
        assert other == pytest.approx(one, rel=1e-6, abs=1e-12)
    assert whole["objective.parts.2.count"].item() == 72


def test_a_step_that_overflows_in_halves_stores_nothing(tmp_path, wordpiece_file):
    teacher, batch = make_model(wordpiece_file, seed=5).eval().requires_grad_(False), make_batch(24)
    tapped, made = make_objective(
        make_model(wordpiece_file), terms(*IN_PARTS[:3]), batch, teacher(batch), rows=only_ids(torch.arange(80))
    )
    config = TrainConfig(optimizer="sgd", optimizer_params={"fused": False})  # which leaves the check to the scaler
    trainee = Trainee(tapped, made).train()
    stepper = Stepper(accelerator_for("no"), Ranks(), trainee, build_optimizer(trainee, config), config, tmp_path)
    before = {name: value.clone() for name, value in made.state_dict().items() if "bank" in name or "count" in name}
    assert len(before) == 3
    for scale, stored in ((3e38, False), (1.0, True)):
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        assert stepper({"student": batch}, "student", lambda given: teacher(given["student"]))[1]
        for name, value in before.items():
            assert torch.equal(made.state_dict()[name], value) is not stored, name


def test_gradients_that_no_scale_brings_into_the_range_of_halves_end_the_training(tmp_path, wordpiece_file):
    batch = make_batch(24)
    tapped, made = make_objective(make_model(wordpiece_file), terms(*IN_PARTS[:1]), batch, None)
    config = TrainConfig(optimizer="sgd", optimizer_params={"fused": False})
    trainee = Trainee(tapped, made).train()
    stepper = Stepper(accelerator_for("no"), Ranks(), trainee, build_optimizer(trainee, config), config, tmp_path)
    before = {name: value.clone() for name, value in trainee.named_parameters()}

    def step(scale):
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return stepper({"student": batch}, "student", None)

    for scale in [
        *[torch.inf] * (MOST_OVERFLOWN - 1),
        1.0,
        *[torch.inf] * (MOST_OVERFLOWN - 1),
    ]:  # now and then is no harm
        assert step(scale)[1]
        if scale == 1.0:
            assert not all(torch.equal(value, before[name]) for name, value in trainee.named_parameters())
            before = {name: value.clone() for name, value in trainee.named_parameters()}
    with pytest.raises(
        TrainingError, match=r"beyond what fp16 holds for the 40th step in a row.*train\.precision to bf16"
    ):
        step(torch.inf)
    assert all(torch.equal(value, before[name]) for name, value in trainee.named_parameters())


def test_banks_hold_the_rows_that_their_term_reads():
    present = {"image": torch.arange(80) % 2 == 0, "text": torch.arange(80) % 3 == 0}
    rows = only_ids(torch.arange(80))._replace(present=present)
    batch = make_batch(24)
    items = [{"loss": "crd", "embedding": name, "params": {"dim": 4}} for name in ("image", "text", "fused")]
    _, made = make_objective(in_float64(8, 0), terms(*items), batch, in_float64(10, 1).eval()(batch), rows=rows)
    assert [part.row_ids.tolist() for part in made.parts.values()] == [
        list(range(0, 80, 2)),
        list(range(0, 80, 3)),
        list(range(80)),
    ]


RUN = [
    {"loss": "cross_entropy", "task": "colour"},
    *TRAINED[1:6],
    {"loss": "ctkd", "task": "colour", "params": {"strength": {"from": 0, "to": 1}}},
    {"loss": "crd", "embedding": "fused", "params": {"dim": 4, "negatives": 16}},
    {"loss": "crd", "taps": {"student": f"{OF_STAGES[1]}:mean", "teacher": f"{OF_STAGES[1]}:mean"}, "weight": 0.1},
    {"loss": "queue_kl", "embedding": "fused", "params": {"size": 64}},
    {"loss": "srrl", "task": "colour", "taps": {"student": "fusion", "teacher": "fusion"}},
    {"loss": "srrl", "task": "shape.image", "taps": {"student": "necks.image", "teacher": "necks.image"}},
]


def test_a_recipe_with_parts_runs_and_leaves_them_behind(tmp_path, monkeypatch):
    """From the cache and with a transfer set, whose rows have entries in the banks too; then pruned."""
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)
    overrides = [f"student.objective={json.dumps(RUN)}", "transfer.texts=30", "trackers=[]"]
    with pytest.raises(UserError, match=r"srrl reads one classifier, and the teacher has 2 members"):
        pipeline.check(load_recipe("recipe.yaml", overrides))
    recipe = load_recipe("recipe.yaml", [*overrides, "teacher.members=1"])
    pipeline.run(recipe, until="pruned", quiet=True)
    for stage in ("student", "pruned"):
        folder = Path("runs/tiny") / stage
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = {name for name in lines[0] if name.startswith("train/")}
        assert {
            "train/vid/" + MAP,
            "train/crd/fused",
            "train/queue_kl/fused",
            f"train/review/{','.join(OF_STAGES)}",
        } <= logged
        assert all(value == value for value in lines[-1].values())
    names = load_file("runs/tiny/student/model.safetensors").keys()
    assert names == load_file("runs/tiny/inherit/model.safetensors").keys()


TOKENS = {"loss": "token_mse", "taps": {"student": "token_necks.text", "teacher": "token_necks.text"}}
READER = "student.encoders.text={type: pretrained_text, weights: 'path:bert', max_length: %d}"


def test_tokens_are_compared_live_where_both_cut_texts_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)
    objective = [{"loss": "cross_entropy", "task": "colour"}, TOKENS]
    overrides = [
        f"student.objective={json.dumps(objective)}",
        "student.inherit={}",
        "student.fusion={type: cross_attention, dim: 8, heads: 2, depth: 1}",
        "cache.enabled=false",
        "trackers=[]",
    ]
    pipeline.run(load_recipe("recipe.yaml", [*overrides, READER % 12]), until="student", quiet=True)
    first, last = [json.loads(line) for line in Path("runs/tiny/student/metrics.jsonl").read_text().splitlines()]
    assert last["train/token_mse/token_necks.text"] < first["train/token_mse/token_necks.text"]
    with pytest.raises(
        UserError, match="token_mse compares token by token, and student and teacher cut texts in other"
    ):
        pipeline.run(load_recipe("recipe.yaml", [*overrides, READER % 10, "name=other"]), until="student", quiet=True)
    assert not Path("runs/other/teacher").exists()  # known before a teacher is fitted
    with pytest.raises(UserError, match=r"from the data's rows to those of the transfer set; set transfer\.texts to 0"):
        pipeline.check(load_recipe("recipe.yaml", [*overrides, READER % 12, "transfer.texts=30"]))
