"""What is removed: by data, by scales of BatchNorm, by layer, by prefix, by depth, by a scan, and in steps."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune import CONFIG, Excited, StandIn, Tower, batch, outputs, real, settled
from test_text_encoders import around, as_batch, build, texts
from torch import Tensor, nn

from distill.config import PruneConfig
from distill.contracts import Batch, Outputs, UserError
from distill.fusion import ConcatFusion, PerceiverFusion
from distill.prune import PrunePlan, apply, compose, plan, prune
from distill.prune.depth import check_blocks
from distill.prune.measuring import answers, drop
from distill.prune.saliency import saliency
from distill.prune.selection import choose, ranked_together
from distill.prune.sensitivity import RATIOS, allocate, prices, scan, stage_of
from distill.recovery import share_of, so_far

IMAGE: dict[str, Any] = {"round_to": 1, "modules": ["encoders.image"]}


def rows(count: int, size: int = 1) -> list[Batch]:
    """Labelled batches."""
    found = []
    for number in range(count):
        one = batch(size)
        images = torch.randint(256, one.inputs["image"].shape, generator=torch.Generator().manual_seed(number))
        labels = {"category": torch.arange(number, number + size) % 5}
        found.append(one._replace(inputs={**one.inputs, "image": images.to(torch.uint8)}, targets=labels))
    return found


def loss_of(outputs: Outputs, given: Batch) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits["category"], given.targets["category"])


@pytest.mark.parametrize("kind", ["taylor", "hessian"])
def test_importance_of_data_is_the_mean_over_gradients(kind: str) -> None:
    torch.manual_seed(0)
    model, batches = settled(StandIn()), rows(4)
    found = saliency(model, kind, batches, None)
    weight, expected = model.head.weight, torch.zeros(5, 20)
    for one in batches:
        (gradient,) = torch.autograd.grad(loss_of(model(one), one), [weight])
        expected += (weight * gradient).abs() / 4 if kind == "taylor" else (weight * gradient).square() / 8
    torch.testing.assert_close(found["head.weight"], expected.detach())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_second_order_importance_of_a_batch_norm_is_near_the_loss_of_removing_it() -> None:
    """At a minimum of the expected loss the Fisher information is the Hessian; here labels come of the model itself."""
    torch.manual_seed(0)
    logits, weight = nn.Linear(1, 1, bias=False), torch.tensor([[0.3]])
    logits.weight.data = weight
    share = weight.sigmoid().item()
    model = nn.ModuleDict({"inner": logits})
    model.forward = lambda given: Outputs({"y": logits(given.inputs["x"])}, {}, {})  # type: ignore[method-assign]
    given = [
        Batch(torch.arange(1), torch.arange(1), {"x": torch.ones(1, 1)}, {}, {"y": torch.tensor([float(label)])})
        for label in [1] * round(1000 * share) + [0] * round(1000 * (1 - share))
    ]

    def loss(said: Outputs, one: Batch) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(said.logits["y"][:, 0], one.targets["y"])

    found = saliency(model, "hessian", given, loss)["inner.weight"].item()
    before = sum(loss(model(one), one).item() for one in given) / len(given)
    logits.weight.data = torch.zeros(1, 1)
    after = sum(loss(model(one), one).item() for one in given) / len(given)
    assert found == pytest.approx(after - before, rel=0.05)


@pytest.mark.parametrize("kind", ["taylor", "hessian"])
def test_channels_that_the_loss_does_not_feel_go_first(kind: Any) -> None:
    """Large weights whose effect is nil: magnitude keeps them, what reads data does not."""
    torch.manual_seed(0)
    model = settled(StandIn())
    deaf = torch.arange(0, 40, 2)
    with torch.no_grad():
        model.encoders["image"].linear.weight[deaf] *= 30
        model.encoders["image"].linear.bias.fill_(9.0)
        model.encoders["image"].linear.bias[deaf] = -1e6  # behind ReLU they are 0 for every image
    config = {"ratio": 0.5, "round_to": 1, "modules": ["encoders.image.linear"]}
    made = plan(model, batch(), PruneConfig(**config, importance=kind), rows=rows(8))
    assert made.tensors["encoders.image.linear.weight"]["0"]["kept"] == list(range(1, 40, 2))
    made = plan(model, batch(), PruneConfig(**config))
    assert set(deaf.tolist()) <= set(made.tensors["encoders.image.linear.weight"]["0"]["kept"])


def test_scales_of_batch_norm_are_compared_as_they_are() -> None:
    torch.manual_seed(0)
    model = settled(StandIn())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.uniform_(0.9, 1.0)
    tower = model.encoders["image"]
    tower.last[1].weight.data[:30] *= 0.1
    made = plan(model, batch(), PruneConfig(ratio=0.1, importance="bn_scale", **IMAGE))
    assert {name for name, cuts in made.tensors.items() if "0" in cuts and name.endswith("0.weight")} == {
        "encoders.image.last.0.weight"
    }
    assert set(made.tensors["encoders.image.last.0.weight"]["0"]["kept"]) >= set(range(30, 48))
    assert "0" not in made.tensors["encoders.image.linear.weight"]  # it has no BatchNorm, so it stays
    with pytest.raises(UserError, match=r"prune\.importance=bn_scale: no channels there have a BatchNorm"):
        plan(model, batch(), PruneConfig(importance="bn_scale", modules=["encoders.image.linear"]))


def widths(made: PrunePlan, model: nn.Module) -> dict[str, float]:
    """Share of channels that each layer has left."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and path.startswith("encoders.image"):
            cut = made.tensors.get(f"{path}.weight", {}).get("0")
            found[path.removeprefix("encoders.image.")] = len(cut["kept"]) / cut["of"] if cut else 1.0
    return found


def test_each_layer_loses_its_share_or_each_prefix_its_own() -> None:
    torch.manual_seed(0)
    model = settled(StandIn())
    found = widths(plan(model, batch(), PruneConfig(ratio=0.5, scope="layer", **IMAGE)), model)
    assert set(found.values()) == {0.5}
    ratios = {"encoders.image.blocks": 0.25, "encoders.image.blocks.1": 0.0, "encoders.image.last": 0.75}
    found = widths(plan(model, batch(), PruneConfig(ratio=0.5, scope="layer", ratios=ratios, **IMAGE)), model)
    assert found["blocks.0.expand.0"] == 0.75 and found["blocks.1.expand.0"] == 1.0 and found["last.0"] == 0.25
    assert found["stem.0"] == 1.0  # one set of channels with the last layers of both blocks, of which one keeps all
    assert found["linear"] == 0.5
    alone = {"encoders.image.last": 0.5}
    found = widths(plan(model, batch(), PruneConfig(ratio=0.0, ratios=alone, **IMAGE)), model)
    assert {path for path, share in found.items() if share < 1} == {"last.0"}


def test_groups_are_ranked_in_sets_of_their_own() -> None:
    layers = [["a.0"], ["a.1"], ["a.1", "b"], ["ab"], ["c.0.x"]]
    rules = {"a": 0.2, "a.1": 0.4, "b": 0.3, "c.0": 0.1}
    found = ranked_together(layers, 0.5, rules, alone=False)
    assert sorted(found) == [(0.1, [4]), (0.2, [0]), (0.3, [2]), (0.4, [1]), (0.5, [3])]
    assert ranked_together(layers, 0.5, {}, alone=False) == [(0.5, [0, 1, 2, 3, 4])]
    assert ranked_together(layers[:2], 0.5, {}, alone=True) == [(0.5, [0]), (0.5, [1])]


def test_what_was_removed_before_counts_towards_the_ratio() -> None:
    score = torch.arange(8.0)
    assert choose([score], 0.5, [1], [0]) == [[0, 1, 2, 3]]
    assert choose([score], 0.5, [1], [8]) == [[]] and choose([score], 0.5, [1], [4]) == [[0, 1]]
    assert choose([score], 0.25, [1], [8]) == [[]]


def test_the_ratios_of_steps_add_up() -> None:
    torch.manual_seed(0)
    model = settled(real(PerceiverFusion(["image", "text"], 32, heads=4, depth=3)))
    settings_of = {"ratio": 0.5, "round_to": 4, "modules": ["encoders.image", "fusion"], "heads": 0.5, "steps": 3}
    config = PruneConfig(**settings_of, depth={"fusion.blocks": 2}, head_dims=0.5)
    now, made, kept = model, PrunePlan(), []
    for step in (1, 2, 3):
        before = made
        made = plan(now, batch(), so_far(config, step), before=before)
        now = apply(copy.deepcopy(now), made.since(before))
        channels, heads, blocks = (made.report[name] for name in ("channels", "heads", "blocks"))
        kept.append((round(channels[1] / channels[0], 1), heads[1], blocks[1]))
        assert "head_dims" not in made.report or step == 3
    shares, heads, blocks = zip(*kept, strict=True)
    assert shares[0] > shares[1] > shares[2] == pytest.approx(0.5, abs=0.11)
    assert blocks == (2, 2, 1) and heads[0] > heads[2]
    direct = apply(copy.deepcopy(model), made)
    for name, value in outputs(direct).items():
        torch.testing.assert_close(value, outputs(now)[name], rtol=1e-4, atol=1e-5)
    assert made.report["parameters"] == [sum(p.numel() for p in each.parameters()) for each in (model, now)]


def test_budgets_of_steps_add_up() -> None:
    config = PruneConfig.model_validate({"steps": 3, "train": {"epochs": 5, "max_steps": 10, "max_minutes": 6}})
    parts = [share_of(config.train, step, 3) for step in (1, 2, 3)]
    assert [part.epochs for part in parts] == [1, 2, 2] and [part.max_steps for part in parts] == [3, 3, 4]
    assert [part.max_minutes for part in parts] == [2, 2, 2]
    assert so_far(config, 3) == config and share_of(config.train, 1, 1) == config.train


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"ratio": 0}, "ratio is 0 and so is all else, so nothing is pruned; raise one"),
        ({"ratio": 0, "sensitivity": True}, "leave ratios out and set ratio above 0"),
        ({"ratios": {"a": 0.1}, "sensitivity": True}, "leave ratios out and set ratio above 0"),
        ({"steps": 3, "train": {"epochs": 2}}, r"train\.epochs is 2, fewer than steps, 3"),
        ({"steps": 3, "train": {"max_steps": 2}}, r"train\.max_steps is 2, fewer than steps, 3"),
    ],
)
def test_configs_that_prune_nothing_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PruneConfig.model_validate(values)


class Deep(Tower):
    """Four blocks, of which :func:`idle` lets two hardly do anything."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Excited(32, 64) for _ in range(4)))


def idle(model: StandIn) -> StandIn:
    for index in (1, 2):
        model.encoders["image"].blocks[index].project[1].weight.data *= 1e-3
    return model


def test_the_blocks_that_a_model_misses_least_go() -> None:
    torch.manual_seed(0)
    model = idle(StandIn(Deep())).eval()
    config = PruneConfig(ratio=0.0, depth={"encoders.image.blocks": 2})
    pruned, made = prune(model, batch(), config, rows=rows(2, 8))
    assert made.removed == {"encoders.image.blocks": {"of": 4, "gone": [1, 2]}} and made.report["blocks"] == [4, 2]
    assert len(pruned.encoders["image"].blocks) == 2 and len(model.encoders["image"].blocks) == 4
    weight = pruned.state_dict()["encoders.image.blocks.1.expand.0.weight"]
    assert torch.equal(weight, model.state_dict()["encoders.image.blocks.3.expand.0.weight"])
    for name, value in outputs(pruned).items():
        torch.testing.assert_close(value, outputs(model)[name], rtol=0.05, atol=0.01)
    both = PruneConfig(ratio=0.5, depth={"encoders.image.blocks": 2}, **IMAGE)
    smaller, made = prune(model, batch(), both, rows=rows(2, 8))
    assert made.removed["encoders.image.blocks"]["gone"] == [1, 2]
    assert not [name for name in made.tensors if ".blocks.1." in name or ".blocks.2." in name]
    assert any(".blocks.3." in name for name in made.tensors)
    assert outputs(smaller).keys() == outputs(model).keys()


@pytest.mark.parametrize("children", [["block0", "block1"], ["1", "0"]])
def test_lists_whose_blocks_have_names_are_none(children: list[str]) -> None:
    """Without one of them torch would name the others anew."""
    model = nn.Module()
    model.blocks = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in children))
    with pytest.raises(UserError, match="'blocks' is no plain list of blocks"):
        check_blocks(model, "blocks")


def test_blocks_of_a_transformer_go_and_those_that_change_shapes_stay() -> None:
    model = around(build("transformer", depth=4))
    given = as_batch(texts([7, 3, 5, 6], 7))
    made = plan(model, given, PruneConfig(ratio=0.0, depth={"encoders.text.blocks": 3}))
    assert len(apply(copy.deepcopy(model), made).encoders["text"].blocks) == 1
    with pytest.raises(UserError, match=r"depth\.encoders\.text\.blocks is 4, and no further block can go: it has 1"):
        plan(model, given, PruneConfig(ratio=0.0, depth={"encoders.text.blocks": 4}))
    with pytest.raises(UserError, match=r"'encoders\.text\.norm' is no plain list of blocks; .*encoders\.text\.blocks"):
        plan(model, given, PruneConfig(ratio=0.0, depth={"encoders.text.norm": 1}))
    net = settled(real(ConcatFusion(["image", "text"], 32)))
    stage = "encoders.image.stages.2"  # a convolution that changes the width, ReLU, and two residual blocks
    made = plan(net, batch(), PruneConfig(ratio=0.0, depth={stage: 2}))
    assert made.removed[stage]["gone"] == [2, 3]
    with pytest.raises(UserError, match="as do activations and those that change a shape"):
        plan(net, batch(), PruneConfig(ratio=0.0, depth={stage: 3}))


def test_agreement_is_lost_as_outputs_move() -> None:
    whole = {"a": torch.tensor([[0.0], [2.0]]), "b": torch.tensor([[1.0, 1.0], [3.0, 1.0]])}
    assert drop(whole, whole) == 0.0
    silent = {name: value.mean(0).expand_as(value) for name, value in whole.items()}
    assert drop(whole, silent) == pytest.approx(1.0)
    assert drop(whole, {**whole, "a": torch.tensor([[0.0], [1.0]])}) == pytest.approx(0.25)


def test_stages_of_layers() -> None:
    first, other = "encoders.image.stages.0.1.conv", "encoders.image.stages.1.0"
    assert stage_of([first]) == "encoders.image.stages.0" == stage_of([first, "encoders.image.stages.0.2.conv"])
    assert stage_of([first, other]) == "encoders.image.stages" and stage_of(["necks.image"]) == "necks.image"
    assert stage_of([first, "fusion.out.1"]) == first


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stages_take_the_options_that_cost_least_together(data: st.DataObject) -> None:
    names = [str(number) for number in range(data.draw(st.integers(1, 4)))]
    options = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1, allow_subnormal=False)), min_size=1, max_size=4)
    known = {name: [(0, 0.0), *data.draw(options)] for name in names}
    removed = {name: [count for count, _ in known[name]] for name in names}
    costs = {name: [cost for _, cost in known[name]] for name in names}
    most = sum(max(counts) for counts in removed.values())
    least = data.draw(st.integers(0, most))
    found = allocate(removed, costs, least)

    def total(choice: dict[str, int], of: dict[str, Any]) -> Any:
        return sum(of[name][option] for name, option in choice.items())

    every = (dict(zip(names, choice, strict=True)) for choice in product(*(range(len(known[n])) for n in names)))
    assert total(found, removed) >= least
    assert total(found, costs) == pytest.approx(min(total(c, costs) for c in every if total(c, removed) >= least))
    assert total(allocate(removed, costs, most + 5), removed) == most


def test_costs_lie_between_the_measured_ones_and_never_fall() -> None:
    assert prices([0, 1, 2, 3, 4, 6, 8], [2, 4, 6], [0.2, 0.6, 0.5]) == pytest.approx([0, 0.1, 0.2, 0.4, 0.6, 0.6, 0.6])


def test_a_scan_counts_what_rounding_leaves() -> None:
    """Of eight channels in units of four, a quarter is nothing: half of them go where that is cheaper."""
    scores = [torch.arange(8.0), torch.arange(8.0)]
    price = {"a": 1.0, "b": 0.1}
    seen: list[list[int]] = []

    def cost(lost: list[list[int]]) -> float:
        seen.append([len(indices) for indices in lost])
        return price["a"] * len(lost[0]) + price["b"] * len(lost[1])

    ratios, table = scan({"a": [0], "b": [1]}, scores, [4, 4], cost, 4)
    assert len(choose([scores[1]], ratios["b"], [4])[0]) == 4 and not choose([scores[0]], ratios["a"], [4])[0]
    assert seen == [[4, 0], [4, 0], [4, 0], [0, 4], [0, 4], [0, 4]] and list(table["a"]["drop"]) == [
        str(r) for r in RATIOS
    ]
    assert table["b"] == {
        "channels": 8,
        "drop": {"0.25": 0.0, "0.5": 0.4, "0.75": 0.4, "0.9": 0.4},
        "ratio": ratios["b"],
    }


def test_a_scan_spares_the_stage_that_matters() -> None:
    torch.manual_seed(0)
    model = idle(settled(StandIn(Deep())))
    config = PruneConfig(ratio=0.4, sensitivity=True, **IMAGE)
    pruned, made = prune(model, batch(), config, rows=rows(1, 8))
    found = made.report["sensitivity"]
    assert set(found) == {
        "encoders.image",  # the channels that stem and blocks share
        *(f"encoders.image.{part}" for part in ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "last.0", "linear")),
    }
    one, two = (found[f"encoders.image.blocks.{index}"] for index in (1, 2))
    assert one["drop"]["0.5"] < found["encoders.image"]["drop"]["0.5"]
    assert min(one["ratio"], two["ratio"]) > found["encoders.image"]["ratio"]
    channels = made.report["channels"]
    assert channels[1] / channels[0] == pytest.approx(0.6, abs=0.03)
    even, _ = prune(model, batch(), PruneConfig(ratio=0.4, scope="layer", **IMAGE))
    whole = answers(model, rows(1, 8))
    assert drop(whole, answers(pruned, rows(1, 8))) < drop(whole, answers(even, rows(1, 8)))
    alone = {stage: [] for stage in found}
    assert compose(PrunePlan(report={"sensitivity": alone}), made).report["sensitivity"] == found


def test_prefixes_are_checked() -> None:
    model = settled(StandIn())
    with pytest.raises(UserError, match=r"prune\.ratios: the model has no module 'encoders\.imag'; did you mean"):
        plan(model, batch(), PruneConfig(ratios={"encoders.imag": 0.5}, **IMAGE))
    with pytest.raises(UserError, match=r"prune\.ratios: 'fuse' has no channels to prune; choices: encoders\.image"):
        plan(model, batch(), PruneConfig(ratios={"fuse": 0.5}, **IMAGE))
    assert plan(model, batch(), PruneConfig(ratios={"encoders.image.last": 0.0}, **CONFIG)).report
