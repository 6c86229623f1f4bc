"""A convolutional student that learns the tokens of a vision transformer: live, cached, compiled, in parts."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import around, make_batch, make_model, make_objective, terms, write_clip
from tiny_job import assert_same, lines, stopped_and_continued, weights
from tiny_project import make_project

from distill import pipeline
from distill.contracts import UserError
from distill.engine import fit
from distill.ranks import Ranks
from distill.recipe import load_recipe
from distill.sharding import Shards
from distill.tapped import Tapped
from distill.trainee import Trainee
from teachers import PretrainedText, PretrainedVision

MAP, TOKENS = "encoders.image.stages.0", "encoders.image"
OBJECTIVE = [
    {"loss": "cross_entropy", "task": "kind"},
    {"loss": "token_mse", "taps": {"student": MAP, "teacher": TOKENS}},
    {"loss": "fitnet", "taps": {"student": "encoders.image.stages.1", "teacher": TOKENS}},
    {"loss": "at", "taps": {"student": MAP, "teacher": TOKENS}},
    {"loss": "cosine", "taps": {"student": MAP, "teacher": f"{TOKENS}:mean"}},
]


def transformers(folder):
    torch.manual_seed(5)
    weights = f"path:{folder}"
    return around({"image": PretrainedVision(weights=weights), "text": PretrainedText(weights=weights)}).eval()


@pytest.fixture(scope="module")
def asked(clip_folder):
    """A vision transformer beside a text tower, with a tap on its tokens: four patches behind a class token."""
    return Tapped(transformers(clip_folder), [TOKENS, f"{TOKENS}:mean"])


@pytest.fixture
def learning(make_job, asked):
    """A job with a live teacher; the same arguments give the same job."""

    def make(name="run", **settings):
        def teacher(batches):
            with torch.no_grad():
                return asked(batches["student"])

        loader = make_job().loader
        torch.manual_seed(3)
        example = teacher(loader.at(0, 0))
        return make_job(name, objective=terms(*OBJECTIVE), loader=loader, teacher=teacher, example=example, **settings)

    return make


def test_the_student_learns_tokens_and_a_stopped_run_goes_on(learning):
    whole = learning("whole")
    assert whole.objective.projectors.keys() == {"1", "2", "4"}
    before = {name: value.clone() for name, value in whole.objective.state_dict().items()}
    fit(whole)
    first, *_, last = lines(whole)
    for name in (f"token_mse/{MAP}", f"cosine/{MAP}"):
        assert last[f"train/{name}"] < first[f"train/{name}"]
    assert not any(torch.equal(value, before[name]) for name, value in whole.objective.state_dict().items())
    again = stopped_and_continued(learning, 7)
    assert_same(weights(again), weights(whole))
    assert_same(again.objective.state_dict(), whole.objective.state_dict())
    assert not any(name.startswith(("objective", "projectors")) for name in weights(whole))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own, which it does not print
def test_a_compiled_student_learns_the_same(learning, wordpiece_file):
    runs = []
    for chosen in (False, True):
        model = make_model(wordpiece_file)  # without dropout, which compiled code draws in another way
        runs.append(learning(f"compiled-{chosen}", model=model, compile=chosen, optimizer="sgd", epochs=1))
        fit(runs[-1])
    for one, other in zip(*map(lines, runs), strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], abs=1e-5)


def test_projectors_in_parts_have_the_gradients_of_whole_ones(wordpiece_file, asked):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for shard in (False, True):
            torch.manual_seed(0)
            made = make_objective(make_model(wordpiece_file), terms(*OBJECTIVE), make_batch(), asked(make_batch()))
            trainee = Trainee(*made).train()
            if shard:
                trainee.shards = Shards(trainee.model, trainee.objective, [MAP, "encoders.image.stages.1"], Ranks())
            trainee(make_batch(), asked(make_batch()))[0].backward()
            if trainee.shards:
                trainee.shards.settle_gradients()
            gradients = {name: p.grad for name, p in trainee.objective.named_parameters()}
            found.append({name: g.full_tensor() if shard else g for name, g in gradients.items()})
    finally:
        dist.destroy_process_group()
    assert found[0].keys() == found[1].keys() and len(found[0]) == 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


TOKEN_TERMS = [
    {"loss": "cross_entropy", "task": "colour"},
    {"loss": "token_mse", "taps": {"student": "encoders.image.stages", "teacher": TOKENS}},
    {"loss": "cwd", "taps": {"student": "encoders.image.stages", "teacher": TOKENS}, "weight": 0.1},
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_project(tmp_path)
    write_clip(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    return [
        f"student.objective={json.dumps(TOKEN_TERMS)}",
        "teacher.encoders.image={type: pretrained_vision, weights: 'path:clip'}",
        "teacher.train.epochs=1",
        "trackers=[]",
    ]


def test_a_frozen_transformer_teaches_its_tokens_from_the_cache_as_live(project):
    first = {}
    for cached in ("true", "false"):
        recipe = load_recipe("recipe.yaml", [*project, f"cache.enabled={cached}"])
        pipeline.run(recipe, until="student", quiet=True)
        folder = Path("runs/tiny/student")
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert logged[-1]["train/token_mse/encoders.image.stages"] < logged[0]["train/token_mse/encoders.image.stages"]
        first[cached] = logged[0]["train/loss"]
    assert first["true"] == pytest.approx(first["false"], rel=1e-3)
    assert load_file(folder / "model.safetensors").keys() == load_file("runs/tiny/inherit/model.safetensors").keys()


def test_a_tap_inside_a_frozen_tower_is_refused_before_anything_runs(project):
    inside = {**TOKEN_TERMS[1], "taps": {"student": "encoders.image.stages", "teacher": "encoders.image.tower"}}
    overrides = [*project, f"student.objective={json.dumps([TOKEN_TERMS[0], inside])}"]
    with pytest.raises(
        UserError, match=r"objective\[1\]: the tap 'encoders.image.tower' lies in a frozen tower.*tap 'encoders.image'"
    ):
        pipeline.check(load_recipe("recipe.yaml", overrides))
    pipeline.check(load_recipe("recipe.yaml", [*overrides, "teacher.encoders.image.freeze=false"]))


def test_a_tap_that_gives_no_tensor_is_refused(clip_folder):
    tapped = Tapped(transformers(clip_folder), ["encoders.image.tower"])
    with pytest.raises(
        UserError, match=r"tap 'encoders.image.tower': this module gives a .* and no tensor; tap a part"
    ):
        tapped(make_batch())
