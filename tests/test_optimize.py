"""Optimizers and schedules: names, parameters, groups, exact resumption of each."""

import copy
import typing
from functools import partial

import pytest
import torch
from tiny_job import BUDGET, assert_same, stopped_and_continued, weights

from distill import checkpoint
from distill.config import OptimizerName, TrainConfig
from distill.contracts import UserError
from distill.engine import fit
from distill.optimize import OPTIMIZERS, MuonAndAdamW, build_optimizer, check_optimizer, lr_factor
from distill.trainee import Trainee

PARAMS = {"adam": {"betas": [0.8, 0.9], "amsgrad": True}, "rmsprop": {"momentum": 0.9, "centered": True}}
LEARNED = {"adadelta": {"lr": 1.0}, "asgd": {"lr": 0.3}, "sgd": {"lr": 0.1}, "adagrad": {"lr": 0.1}}


def config(**settings):
    return TrainConfig.model_validate(BUDGET | settings)


def test_the_schema_lists_the_optimizers():
    assert typing.get_args(OptimizerName) == tuple(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_stopped_and_continued_with_any_optimizer_gives_the_same_weights(make_job, name):
    settings = {"optimizer": name, "optimizer_params": PARAMS.get(name, {}), "lr_scale": {"fusion": 0.5}}
    whole = make_job("whole", **settings)
    before = {key: value.detach().clone() for key, value in whole.tapped.model.named_parameters()}
    fit(whole)
    moved = [key for key, value in whole.tapped.model.named_parameters() if not torch.equal(value, before[key])]
    assert set(before) - set(moved) <= {key for key in before if "missing" in key or key.startswith("embedders")}
    assert_same(weights(stopped_and_continued(make_job, 7, **settings)), weights(whole))


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad"])
def test_fused_steps_go_on_alike(make_job, name):
    """They walk memory, in which kernels of convolutions lie with the channels innermost and a file's values do not."""
    settings = {"optimizer": name, "optimizer_params": {"fused": True}}
    whole = make_job("whole", **settings)
    fit(whole)
    assert_same(weights(stopped_and_continued(make_job, 7, **settings)), weights(whole))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(make_job, name):
    assert fit(make_job(optimizer=name, epochs=12, **LEARNED.get(name, {})))["best"] > 0.7


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_packed_state_is_the_state(name):
    """Also the states that no step has touched, and tuples and None among the options."""
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Embedding(4, 3))
    optimizer = build_optimizer(layer, config(optimizer=name))
    layer[0](layer[1](torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    tensors, state = checkpoint.pack_optimizer(optimizer)
    fresh = build_optimizer(layer, config(optimizer=name))
    checkpoint.unpack_optimizer(fresh, tensors, state)
    restored = checkpoint.pack_optimizer(fresh)
    assert restored[1] == state and len(tensors) >= 2
    assert_same(restored[0], tensors)
    assert [group["lr"] for group in fresh.param_groups] == [0.02] * len(fresh.param_groups)


@pytest.mark.parametrize(
    ("name", "torchs"), [("adamw", torch.optim.AdamW), ("sgd", partial(torch.optim.SGD, momentum=0.9))]
)
def test_adamw_and_sgd_are_torchs_in_one_kernel(name, torchs):
    """Defaults are torch's but for the kernel, and so are weights after some steps."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2).double()
    twin = copy.deepcopy(layer)
    ours = build_optimizer(layer, config(optimizer=name, weight_decay=0.3))
    decay = [{"params": [twin.weight], "weight_decay": 0.3}, {"params": [twin.bias], "weight_decay": 0.0}]
    reference = torchs(decay, lr=0.02)
    assert type(ours) is type(reference) and ours.defaults == reference.defaults | {"fused": True}
    assert [group["weight_decay"] for group in ours.param_groups] == [0.3, 0.0]
    for _ in range(5):
        x = torch.randn(7, 3).double()
        for model, optimizer in ((layer, ours), (twin, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(layer.weight, twin.weight, rtol=1e-12) and torch.allclose(layer.bias, twin.bias, rtol=1e-12)


def test_the_kernel_can_be_chosen():
    assert build_optimizer(torch.nn.Linear(3, 2), config(optimizer_params={"foreach": True})).defaults["fused"] is None


def test_muon_takes_the_weights_of_linear_layers_and_adamw_the_rest(make_job):
    job = make_job()
    trainee = Trainee(job.tapped, job.objective)
    optimizer = build_optimizer(trainee, config(optimizer="muon", optimizer_params={"momentum": 0.8}))
    assert isinstance(optimizer, MuonAndAdamW)
    names = {id(parameter): name for name, parameter in trainee.named_parameters()}
    found = {
        part: {names[id(parameter)] for group in inner.param_groups for parameter in group["params"]}
        for part, inner in optimizer.parts.items()
    }
    assert "model.fusion.linear.weight" in found["muon"] and "model.heads.kind.linear.weight" in found["muon"]
    assert {"model.encoders.text.table.weight", "model.encoders.image.stages.0.0.0.weight"} <= found["adamw"]
    assert len(found["muon"]) + len(found["adamw"]) == len(names)
    assert optimizer.parts["muon"].param_groups[0]["momentum"] == 0.8
    optimizer.param_groups[0]["lr"] = 0.5
    assert [*optimizer.parts["muon"].param_groups, *optimizer.parts["adamw"].param_groups][0]["lr"] == 0.5


def test_a_state_of_another_muon_is_refused_in_a_sentence():
    both = torch.nn.Linear(3, 2)
    packed = checkpoint.pack_optimizer(build_optimizer(both, config(optimizer="muon")))
    alone = build_optimizer(torch.nn.LayerNorm(3), config(optimizer="muon"))
    with pytest.raises(UserError, match=r"does not fit this one: it has the parts \['muon', 'adamw'\], not \['adamw'"):
        checkpoint.unpack_optimizer(alone, *packed)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optimizer_params": {"lr": 1.0}}, "here.optimizer_params: adamw has no parameter 'lr'"),
        ({"optimizer_params": {"maximize": True}}, "here.optimizer_params: adamw has no parameter 'maximize'"),
        ({"optimizer_params": {"betas": [0.9, 2.0]}}, "adamw cannot be built: Invalid beta parameter at index 1: 2.0"),
        ({"optimizer_params": {"betas": 3}}, "adamw cannot be built"),
        ({"optimizer": "sgd", "optimizer_params": {"nesterov": "yes"}}, "nesterov is 'yes': Input should be a valid b"),
        ({"optimizer": "adamax", "optimizer_params": {"betas": [0.9]}}, "betas is (0.9,): "),
        ({"optimizer_params": {"betas": [0.9]}}, "adamw cannot be built: tuple index out of range"),
        ({"optimizer_params": {"type": 5}}, "adamw has no parameter 'type'; here.optimizer names the optimizer"),
        ({"optimizer_params": {"type": "sgd"}}, "adamw has no parameter 'type'; here.optimizer names the optimizer"),
        ({"optimizer": "muon", "optimizer_params": {"ns_steps": 200}}, "muon cannot make a step: Number of steps"),
        ({"optimizer": "muon", "optimizer_params": {"adjust_lr_fn": "up"}}, "muon cannot be built: Adjust learning"),
        ({"optimizer": "sgd", "momentum": 0.0, "optimizer_params": {"nesterov": True}}, "Nesterov momentum requires"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused_in_a_sentence(settings, sentence):
    with pytest.raises(UserError) as caught:
        check_optimizer(config(**settings), "here")
    assert sentence in str(caught.value) and str(caught.value).startswith("here.optimizer_params")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_passes_with_its_defaults(name):
    check_optimizer(config(optimizer=name, optimizer_params=PARAMS.get(name, {})), "here")


def test_a_step_schedule_falls_at_its_milestones():
    settings = config(schedule="step", milestones=[0.75, 0.5], gamma=0.2, warmup=0.1)
    factors = [lr_factor(step, 100, settings) for step in range(100)]
    assert factors[10:50] == [1.0] * 40 and factors[50:75] == [0.2] * 25
    assert factors[75:] == [pytest.approx(0.04)] * 25 and factors[:10] == sorted(factors[:10])


@pytest.mark.parametrize(("everything", "decays"), [(False, [0.3, 0.0]), (True, [0.3])])
def test_norms_and_biases_are_decayed_when_asked_for(everything, decays):
    made = build_optimizer(torch.nn.Linear(3, 2), config(optimizer="sgd", weight_decay=0.3, decay_vectors=everything))
    assert [group["weight_decay"] for group in made.param_groups] == decays
    assert sum(len(group["params"]) for group in made.param_groups) == 2
