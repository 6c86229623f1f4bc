"""Models in parts, in a process group of one: real towers, every optimizer, and what is refused."""

import json
import logging
from functools import partial

import pytest
import torch
import torch.distributed as dist
from tiny import around, make_batch, make_model, make_objective, terms
from tiny_job import weights
from torch import nn
from torch.distributed.tensor import DTensor

from distill import checkpoint
from distill.averaging import load_state
from distill.config import TrainConfig
from distill.contracts import UserError
from distill.engine import fit
from distill.optimize import OPTIMIZERS, build_optimizer
from distill.ranks import Ranks
from distill.sharding import WHOLE_MATRICES, Shards, check_sharding, find_units, whole
from distill.tapped import Tapped
from distill.trainee import Trainee
from students import ConvNet
from teachers import PretrainedText, PretrainedVision, TimmEncoder

TERMS = [{"loss": "cross_entropy", "task": "kind"}, {"loss": "clip_infonce", "embedding": "image,text"}]


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def towers(folder, vision, seed=0):
    torch.manual_seed(seed)
    encoders = {"image": vision(), "text": PretrainedText(weights=f"path:{folder}", freeze=False)}
    return around(encoders, fusion="cross_attention")


def trainee_of(model, shard):
    trainee = Trainee(*make_objective(model, terms(*TERMS), make_batch()))
    if shard:
        trainee.shards = Shards(trainee.model, trainee.objective, [], Ranks())
    return trainee.train()


def backward(trainee, *, bf16=False):
    with torch.autocast("cpu", torch.bfloat16, bf16):
        loss, _ = trainee(make_batch(), None)
    loss.backward()
    if trainee.shards:
        trainee.shards.settle_gradients()


@pytest.mark.parametrize(
    ("vision", "bf16"), [("clip", False), ("clip", True), ("resnet18", False), ("test_vit", False), ("convnet", False)]
)
def test_towers_in_parts_have_the_same_gradients(alone, clip_folder, vision, bf16):
    make = {
        "clip": partial(PretrainedVision, weights=f"path:{clip_folder}", freeze=False),
        "convnet": partial(ConvNet, widths=[4, 8], blocks=[0, 1]),
    }.get(vision) or partial(TimmEncoder, name=vision, pretrained=False, freeze=False)
    one, other = (trainee_of(towers(clip_folder, make), shard) for shard in (False, True))
    backward(one, bf16=bf16)
    backward(other, bf16=bf16)
    found = whole({name: p.grad for name, p in other.named_parameters() if p.grad is not None})
    expected = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 20
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.contiguous(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(WHOLE_MATRICES)))
def test_optimizers_make_the_same_steps_of_parts_and_go_on_from_either(alone, wordpiece_file, name):
    config = TrainConfig.model_validate({"optimizer": name, "lr": 0.01, "lr_scale": {"fusion": 0.5, "heads": 0}})
    runs = []
    for shard in (False, True):
        trainee = trainee_of(make_model(wordpiece_file), shard)
        optimizer = build_optimizer(trainee, config)
        for _ in range(3):
            optimizer.zero_grad()
            backward(trainee)
            optimizer.step()
        runs.append((trainee, optimizer))
    packed = []
    for trainee, optimizer in runs:
        tensors, rest = checkpoint.pack_optimizer(optimizer)
        packed.append((whole(trainee.state_dict()), whole(tensors), rest))
    for one, other in zip(packed[0][:2], packed[1][:2], strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)
    fused, plain = (json.dumps(rest).replace('["fused", true]', '["fused", null]') for _, _, rest in packed)
    assert fused == plain  # parts have no such kernel

    (trainee, optimizer), (state, tensors, rest) = runs[1], packed[0]
    load_state(trainee, state)
    checkpoint.unpack_optimizer(optimizer, {key: value.clone() for key, value in tensors.items()}, rest)
    for moved, steps in runs:
        steps.zero_grad()
        backward(moved)
        steps.step()
    found, expected = (whole(trainee.state_dict()) for trainee, _ in reversed(runs))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_units_are_encoders_and_large_layers_without_taps(clip_folder):
    model = towers(clip_folder, partial(ConvNet, widths=[4, 8], blocks=[0, 1]))
    layer = "encoders.text.tower.encoder.layers.0"
    assert find_units(model, []) == ["encoders.image", "encoders.image.stages.1", "encoders.text", layer]
    tapped = find_units(model, [layer, "encoders.image.stages.1.0:mean"])
    assert tapped == ["encoders.image.stages.1.0.0", "encoders.image.stages.1.2"]
    model.heads["kind"].shared = model.encoders["text"].tower.encoder.layers[0]
    assert "encoders.image" in find_units(model, []) and layer not in find_units(model, [])


def test_weights_are_whole_only_while_their_unit_runs(alone, clip_folder):
    trainee = trainee_of(towers(clip_folder, partial(PretrainedVision, weights=f"path:{clip_folder}")), shard=True)
    encoders, seen = trainee.model.encoders, {}

    def whole_ones(module):
        return [name for name, parameter in module.named_parameters() if not isinstance(parameter, DTensor)]

    def note(name):
        encoders[name].tower.register_forward_hook(
            lambda *_: seen.update({f"{at} in {name}": len(whole_ones(encoders[at])) for at in encoders})
        )

    for name in encoders:
        note(name)
    backward(trainee)
    assert seen["image in image"] > 3 and seen["text in text"] > 3
    assert seen["image in text"] == seen["text in image"] == 0
    assert whole_ones(trainee) == []


def test_one_process_trains_whole_weights_and_says_so(make_job, caplog):
    plain, asked = make_job("plain"), make_job("asked", shard=True)
    fit(plain)
    with caplog.at_level(logging.WARNING):
        fit(asked)
    assert "train.shard: one process has nobody to share weights with" in caplog.text
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(asked).items())


def test_terms_on_taps_alone_are_refused(wordpiece_file, monkeypatch):
    model, batch = make_model(wordpiece_file), make_batch()
    tap = "encoders.image.stages.0"
    objective = terms({"loss": "fitnet", "taps": {"student": tap, "teacher": tap}})
    trainee = Trainee(*make_objective(model, objective, batch, Tapped(make_model(wordpiece_file), [tap])(batch)))
    ranks = Ranks()
    monkeypatch.setattr(ranks, "count", 2)
    with pytest.raises(UserError, match=r"train\.shard needs a term on logits or embeddings"):
        trainee.shard(ranks)


def test_single_numbers_are_refused(wordpiece_file):
    model = make_model(wordpiece_file)
    model.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match=r"train\.shard: model\.temperature is a single number"):
        Shards(model, nn.ModuleDict(), [], Ranks())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": True}, "which compile: true does not allow: compiled code does not gather them"),
        ({"channels_last": True}, "which channels_last: true does not allow"),
        ({"precision": "fp16"}, "which precision: fp16 does not allow: .* use 'bf16' or 'no'"),
        ({"optimizer": "muon"}, "which optimizer: muon does not allow: muon reads whole matrices; use 'adamw'"),
        ({"optimizer": "adafactor"}, "which optimizer: adafactor does not allow"),
    ],
)
def test_what_does_not_go_with_parts_is_refused(settings, message):
    check_sharding(TrainConfig.model_validate(settings), "student.train")
    check_sharding(TrainConfig.model_validate({"shard": True, "precision": "bf16"}), "student.train")
    with pytest.raises(UserError, match=rf"^student\.train\.shard splits weights over the ranks, {message}"):
        check_sharding(TrainConfig.model_validate(settings | {"shard": True}), "student.train")
