"""What a model rounds in training is what its int8 graph rounds: numbers, places, and the whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.layers
import torch
from export_models import as_feeds, learn, rows, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from onnxruntime.quantization.quant_utils import compute_scale_zp
from torch import Tensor, nn

from distill.averaging import statistics
from distill.aware import with_gaps, without_dropout
from distill.config import QuantizeConfig
from distill.contracts import Batch, Outputs
from distill.export.onnx import export_onnx
from distill.predict import open_session
from distill.quantization.places import find_places
from distill.quantization.static import StaticQuantizer
from distill.quantization.tables import quantize_rows
from distill.rounding import (
    MOMENTUM,
    Place,
    Plan,
    ValueRounding,
    WeightRounding,
    advance,
    attach_again,
    round_inside,
    rounded_rows,
    without_rounding,
)

TASKS = ("category", "subcategory")
CALIBRATION = [as_feeds(rows(32, 8, seed=seed)) for seed in (100, 101)]
finite = st.floats(-1e4, 1e4, width=32)


def quantizer_of(model: nn.Module, folder: Path, ranges: Any = None) -> StaticQuantizer:
    export_onnx(model, rows(4, 6, seed=1), folder / "float.onnx")
    return StaticQuantizer(folder / "float.onnx", CALIBRATION, QuantizeConfig(), ranges)


def plan_of(model: nn.Module, folder: Path) -> Plan:
    batch = rows(4, 6, seed=3)
    return find_places(model, [(batch, as_feeds(batch))], quantizer_of(model, folder))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(trained(), tmp_path_factory.mktemp("plan"))


@pytest.fixture
def rounding(plan: Plan) -> nn.Module:
    """The stand-in, which rounds."""
    model = copy.deepcopy(trained())
    round_inside(model, plan)
    return model


def answers(model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
    model.eval()
    with torch.no_grad():
        return {task: model(batch).logits[task].numpy() for task in TASKS}


def steps(model: nn.Module, number: int) -> Iterator[Tensor]:
    """Train a little; gives the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(number):
        model.train()
        advance(model, step, number)
        yield learn(model, optimizer, step)


@given(low=finite, high=finite, values=hypothesis_numpy.arrays(np.float32, 40, elements=finite))
def test_values_are_rounded_as_by_onnxruntime(low: float, high: float, values: np.ndarray) -> None:
    low, high = min(low, 0.0), max(high, 1e-3)
    limits = (np.array(low, np.float32), np.array(high, np.float32), np.array(0, np.uint8), np.array(255, np.uint8))
    zero, scale = compute_scale_zp(*limits)
    integers = np.clip(np.rint(values / scale) + zero.astype(np.int64), 0, 255)
    expected = (integers - zero.astype(np.int64)) * scale
    found = ValueRounding(low, high).eval()(torch.from_numpy(values)).numpy()
    off = np.abs(found - expected)
    between = np.abs(values / scale - np.floor(values / scale) - 0.5) < 1e-3  # torch multiplies with 1 / scale
    assert (off[~between] <= 1e-5 * max(1e-30, *np.abs(expected))).all()
    assert (off <= scale * 1.001).all()


@given(hypothesis_numpy.arrays(np.float32, (3, 7), elements=st.floats(-1e3, 1e3, width=32)))
def test_looked_up_rows_are_those_of_an_integer_table(table: np.ndarray) -> None:
    integers, scales = quantize_rows(table)
    expected = integers.astype(np.float32) * scales.astype(np.float32)
    np.testing.assert_allclose(rounded_rows(torch.from_numpy(table)).numpy(), expected, rtol=1e-5, atol=1e-6)


@given(factors=hypothesis_numpy.arrays(np.float32, 5, elements=st.floats(-8, 8, width=32)), seed=st.integers(0, 99))
def test_the_factors_of_a_batchnorm_may_come_before_or_after(factors: np.ndarray, seed: int) -> None:
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    scale = torch.from_numpy(factors).reshape(5, 1, 1, 1)
    torch.testing.assert_close(WeightRounding()(weight) * scale, WeightRounding()(weight * scale), rtol=1e-4, atol=1e-5)


def test_weights_have_255_levels_a_channel_and_pass_gradients() -> None:
    weight = torch.randn(4, 500, requires_grad=True)
    rounded = WeightRounding()(weight)
    levels = rounded / (weight.abs().amax(1, keepdim=True) / 127)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.abs().max() <= 127.001 and len(levels[0].round().unique()) > 100
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not WeightRounding()(torch.zeros(2, 3)).any()


def test_gradients_stop_outside_the_range() -> None:
    values = torch.tensor([-2.0, -0.5, 0.3, 5.0], requires_grad=True)
    ValueRounding(-1, 1).eval()(values).sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 0]


def test_a_range_follows_in_training_until_it_settles() -> None:
    value = ValueRounding(-1, 1)
    value(torch.tensor([-3.0, 2.0]))
    assert value.low.item() == pytest.approx(-1 - 2 * MOMENTUM) and value.high.item() == pytest.approx(1 + MOMENTUM)
    before = value.range()
    value.settled = True
    value(torch.tensor([-9.0, 9.0]))
    value.settled = False
    value(torch.tensor([-9.0, 9.0]), follow=False)
    value.eval()(torch.tensor([-9.0, 9.0]))
    assert value.range() == before


def test_all_that_the_graph_rounds_is_found(plan: Plan) -> None:
    assert plan.missed == [] and plan.tables == ["table"]
    assert len(plan.weights) == 5 + 1 + 2  # heads of single modalities are not exported
    places = {(place.at, path) for place in plan.values for path in place.modules}
    assert {("output", "image.2"), ("output", "fuse.1"), ("output", "image.3.1")} & places
    assert ("input", "image") in places or ("input", "image.0") in places


def test_a_plan_is_read_as_it_was_written(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_nothing_to_round_changes_nothing() -> None:
    model = copy.deepcopy(trained())
    before = answers(model, rows(50, 8, seed=5))
    round_inside(model, Plan([], [], [], []))
    for task, expected in answers(model, rows(50, 8, seed=5)).items():
        assert np.array_equal(expected, before[task])


@pytest.mark.parametrize("number", [0, 12])
def test_what_is_trained_is_what_runs(number: int, rounding: nn.Module, tmp_path: Path) -> None:
    for _ in steps(rounding, number):
        pass
    batch = rows(500, 8, seed=7)
    expected = answers(rounding, batch)
    ranges = without_rounding(rounding)
    quantizer = quantizer_of(rounding, tmp_path, ranges)
    quantizer.write(tmp_path / "int8.onnx")
    session = open_session(tmp_path / "int8.onnx")
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, as_feeds(batch)), strict=True))
    plain = answers(rounding, batch)  # with rounded weights, but not values
    for task in TASKS:
        off = np.abs(found[task] - expected[task])
        assert (found[task].argmax(1) == expected[task].argmax(1)).mean() >= 0.998
        assert off.mean() < 0.2 * np.abs(plain[task] - expected[task]).mean()
        assert len(np.unique(expected[task].argmax(1))) > 2


def test_training_with_rounding_learns_and_settles(rounding: nn.Module) -> None:
    norms = [part for part in rounding.modules() if isinstance(part, nn.BatchNorm2d)]
    before = [value.clone() for value in statistics(rounding)]
    assert len(before) == 2 * len(norms) + 2 * len(rounding.rounding.values)  # what ranks average
    losses = [loss.item() for loss in steps(rounding, 10)]
    assert np.isfinite(losses).all()
    assert not any(torch.equal(old, new) for old, new in zip(before[:2], statistics(rounding)[:2], strict=True))
    assert not any(norm.training for norm in norms)  # the last fifth
    now = [value.clone() for value in statistics(rounding)]
    rounding.train()
    advance(rounding, 9, 10)
    rounding(rows(16, 8, seed=1))
    assert all(torch.equal(old, new) for old, new in zip(now, statistics(rounding), strict=True))
    rounding.train()
    advance(rounding, 0, 10)
    assert all(norm.training for norm in norms)


def test_training_mends_what_coarse_rounding_spoils(plan: Plan) -> None:
    coarse = [replace(place, low=place.low / 6, high=place.high / 6) for place in plan.values]
    model = copy.deepcopy(trained())
    round_inside(model, replace(plan, values=coarse))

    def right() -> float:
        batch = rows(400, 8, seed=999)
        return float((answers(model, batch)["subcategory"].argmax(1) == batch.targets["subcategory"].numpy()).mean())

    before = right()
    losses = [loss.item() for loss in steps(model, 60)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    assert right() > before + 0.05


def test_a_frozen_part_does_not_move_its_ranges(rounding: nn.Module) -> None:
    rounding.train()
    rounding.image.eval()
    before = rounding.rounding.ranges()
    rounding(rows(16, 8, seed=1))
    after = rounding.rounding.ranges()
    moved = {name for name in before if before[name] != after[name]}
    assert moved and len(moved) < len(before)


def test_a_model_goes_on_rounding_when_its_norms_are_exchanged(plan: Plan) -> None:
    """As several GPUs do it; the others' hooks are not doubled."""
    batch, model = rows(50, 8, seed=5), copy.deepcopy(trained())
    round_inside(model, replace(plan, values=[*plan.values, Place("norm", "output", ["image.1"], -0.5, 0.5)]))
    expected = answers(model, batch)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    lost = answers(model, batch)
    attach_again(model)
    for task, found in answers(model, batch).items():
        np.testing.assert_allclose(found, expected[task], rtol=1e-5, atol=1e-5)
    assert all(len(part._forward_hooks) <= 1 for part in model.modules())
    assert any(not np.array_equal(lost[task], expected[task]) for task in TASKS)
    attach_again(copy.deepcopy(trained()))


def test_rounding_is_taken_away_whole(rounding: nn.Module) -> None:
    without_rounding(rounding)
    assert rounding.state_dict().keys() == trained().state_dict().keys()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in rounding.modules())
    assert not torch.equal(rounding.image[0].weight, trained().image[0].weight)
    torch.testing.assert_close(rounding.image[0].weight, WeightRounding()(trained().image[0].weight))


class Shared(nn.Module):
    """A residual block with one activation, which runs twice, a layer without a module, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)
        self.matrix = nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Outputs:
        image = batch.inputs["image"].float() / 255
        image = self.activation(image + self.second(self.activation(self.first(image))))
        return Outputs({"category": self.head(image.mean(dim=(2, 3)) @ self.matrix)}, {}, {})


def test_what_has_no_module_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    batch = rows(8, 6, seed=3)
    batch = batch._replace(inputs={"image": batch.inputs["image"]}, present={"image": batch.present["image"]})
    feeds = {name: value for name, value in as_feeds(batch).items() if name.startswith("image")}
    export_onnx(model, batch, tmp_path / "float.onnx")
    quantizer = StaticQuantizer(tmp_path / "float.onnx", [feeds], QuantizeConfig())
    found = find_places(model, [(batch, feeds)], quantizer)
    assert found.weights == ["first", "second", "head"]
    assert [name for name in found.missed if "MatMul" in name]
    taken = {path: place.at for place in found.values for path in place.modules}
    assert taken["second"] in ("input", "output") and "activation" not in taken
    round_inside(model, found)
    assert model(batch).logits["category"].isfinite().all()


@settings(max_examples=20)
@given(low=st.floats(-9, 0, width=32), high=st.floats(0, 9, width=32))
def test_a_range_that_is_written_is_the_one_that_is_read(low: float, high: float) -> None:
    value = ValueRounding(low, high)
    again = ValueRounding(*value.range())
    values = torch.linspace(-10, 10, 999)
    torch.testing.assert_close(value.eval()(values), again.eval()(values), rtol=1e-4, atol=1e-5)
    assert isinstance(Place("x", "output", ["a"], *value.range()), Place)


class StandsIn(nn.Module):
    """An image's vector, or a learnt one in its place, into a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.activation, self.value = nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)
        self.missing = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, batch: Batch) -> Outputs:
        pooled = self.activation(self.reads(batch.inputs["image"].float().mean((2, 3)) / 255))
        vector = torch.where(batch.present["image"][:, None], pooled, self.missing)
        return Outputs({"category": self.value(vector)}, {}, {})


def test_what_stands_in_for_a_missing_modality_is_rounded_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = StandsIn().eval()
    batch = rows(8, 6, seed=3)
    batch = batch._replace(inputs={"image": batch.inputs["image"]}, present={"image": torch.ones(8, dtype=torch.bool)})
    export_onnx(model, batch, tmp_path / "float.onnx")
    passes = [
        (each, {name: value for name, value in as_feeds(each).items() if name.startswith("image")})
        for each in with_gaps(batch)
    ]
    assert [each.present["image"].all().item() for each, _ in passes] == [True, False]
    calibrated = StaticQuantizer(tmp_path / "float.onnx", [feeds for _, feeds in passes], QuantizeConfig())
    places = {place.modules[0]: place for place in find_places(model, passes, calibrated).values}
    assert places["value"].at == "input" and places["value"].low < -0.9, "where a negative vector is read"
    assert "activation" not in places, "the graph rounds what the layer reads alone"
    alone = find_places(model, passes[:1], calibrated)
    assert "value" not in [place.modules[0] for place in alone.values], "whole rows cannot tell"


def test_stochastic_depth_is_off_too() -> None:
    model = nn.Sequential(nn.Dropout(0.2), timm.layers.DropPath(0.3))
    without_dropout(model)
    model.train()
    assert torch.equal(model(torch.ones(64, 3)), torch.ones(64, 3))
