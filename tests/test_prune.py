"""Pruning plans: consistent cuts, exact rebuilding, fixed outputs, and refusals that say what to do."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import checkpoint, pipeline
from distill.config import PruneConfig
from distill.contracts import IGNORE, Batch, Outputs, UserError
from distill.fusion import ConcatFusion, CrossAttentionFusion
from distill.multimodal import MultimodalModel
from distill.prune import PrunePlan, apply, check_pruning, choose, plan, prune
from distill.recipe import load_recipe
from distill.tasks import LinearHead
from students.text import StaticEmbeddings
from students.vision import ConvNet


class Excited(nn.Module):
    """An inverted residual block with a depthwise convolution, squeeze-and-excitation and BatchNorm."""

    def __init__(self, width: int, hidden: int, groups: int | None = None) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU())
        self.spatial = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups or hidden, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.squeeze, self.excite = nn.Conv2d(hidden, 16, 1), nn.Conv2d(16, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu(self.norm(self.spatial(self.expand(x))))
        gate = self.excite(nn.functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.project(y * gate)


class Tower(nn.Module):
    def __init__(self, groups: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Excited(32, 64, groups), Excited(32, 64))
        self.last = nn.Sequential(nn.Conv2d(32, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.linear = nn.Linear(48 * 4, 40)

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.last(self.blocks(self.stem(image.float() / 255))), 2)
        return self.linear(x.flatten(1)).relu()


class StandIn(nn.Module):
    """Batch -> Outputs with a prunable image tower, a text table and a concatenating head."""

    def __init__(self, tower: nn.Module | None = None, *, expose: bool = False) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"image": tower or Tower(), "text": nn.Embedding(50, 24)})
        self.fuse = nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 20))
        self.head = nn.Linear(20, 5)
        self.expose = expose

    def forward(self, batch: Batch) -> Outputs:
        image = self.encoders["image"](batch.inputs["image"]) * batch.present["image"][:, None]
        mask = batch.inputs["text_mask"][..., None]
        text = (self.encoders["text"](batch.inputs["text"]) * mask).sum(1) / mask.sum(1).clamp(min=1)
        fused = self.fuse(torch.cat([image, text], 1))
        return Outputs({"category": self.head(fused)}, {"fused": fused} | ({"image": image} if self.expose else {}), {})


def batch(rows: int = 3, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)
    text = torch.randint(1, 50, (rows, 6), generator=generator)
    present = {name: torch.ones(rows, dtype=torch.bool) for name in ("image", "text")}
    inputs = {"image": image, "text": text, "text_mask": torch.ones(rows, 6, dtype=torch.bool)}
    return Batch(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), inputs, present, {})


def settled(model: nn.Module) -> nn.Module:
    """Give BatchNorm statistics and scales that are not the initial ones, and go to eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def silenced(model: nn.Module, made: PrunePlan) -> nn.Module:
    """The unpruned model with zeros where the plan cuts outputs: it must compute what the pruned one does."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        cut = made.tensors.get(name, {}).get("0")
        if cut:
            gone = sorted(set(range(cut["of"])) - set(cut["kept"]))
            parameter.data[gone] = 0
    return model


def outputs(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        result = model(batch())
    return {
        f"{part}.{name}": value for part in ("logits", "embeddings") for name, value in getattr(result, part).items()
    }


CONFIG: dict[str, Any] = {"ratio": 0.5, "round_to": 8, "modules": ["encoders.image"]}
MODELS = {
    "stand_in": StandIn,
    "grouped": lambda: StandIn(Tower(groups=4)),
    "exposed": lambda: StandIn(expose=True),
    "plain": lambda: real(ConcatFusion(["image", "text"], 32), unnormalised=True),
    "attention": lambda: real(CrossAttentionFusion(["image", "text"], 32), unnormalised=True),
}


def real(fusion: nn.Module, *, unnormalised: bool = False) -> MultimodalModel:
    image = ConvNet(widths=[16, 32, 64], blocks=[0, 1, 2])
    text = StaticEmbeddings(tokenizer_file="absent.json", vocab_size=50, dim=24)
    heads = {name: LinearHead(32, 5) for name in ("fused", "image", "text")}
    unimodal = {"category": {name: heads[name] for name in ("image", "text")}}
    encoders = {"image": image, "text": text}
    model = MultimodalModel(encoders, fusion, {"category": heads["fused"]}, unimodal, dim=32, embedding_dim=8)
    if unnormalised:  # LayerNorm sees the zeros of a silenced channel, so that comparison needs a neck without it
        model.necks["image"].norm = nn.Identity()
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("importance", ["magnitude", "random", "taylor"])
def test_the_pruned_model_is_the_silenced_one(name: str, importance: Any) -> None:
    torch.manual_seed(0)
    model = settled(MODELS[name]())
    config = PruneConfig(importance=importance, **CONFIG)
    before = copy.deepcopy(model.state_dict())
    pruned, made = prune(model, batch(), config, loss=lambda result, _: result.logits["category"].logsumexp(1).sum())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected = outputs(silenced(model, made))
    for key, value in outputs(pruned).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    channels = made.report["channels"]
    assert abs(channels[1] / channels[0] - 0.5) < 0.15
    assert made.report["parameters"][1] == sum(p.numel() for p in pruned.parameters()) < made.report["parameters"][0]
    assert made.report["flops"][1] < 0.7 * made.report["flops"][0]
    for path in made.attributes:
        module = pruned.get_submodule(path)
        if isinstance(module, nn.Conv2d) and path.startswith("encoders.image"):
            assert module.out_channels % 8 == 0 and module.weight.shape[0] == module.out_channels


@pytest.mark.parametrize("name", MODELS)
def test_weights_reload_exactly_into_a_rebuilt_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = settled(MODELS[name]())
    pruned, made = prune(model, batch(), PruneConfig(**CONFIG))
    made.save(tmp_path / "plan.json")
    checkpoint.save_weights(pruned, tmp_path / "pruned.safetensors")
    other = apply(MODELS[name](), PrunePlan.load(tmp_path / "plan.json")).eval()
    checkpoint.load_weights(other, tmp_path / "pruned.safetensors")
    found = outputs(other)
    assert all(torch.equal(value, found[key]) for key, value in outputs(pruned).items())
    for path, module in pruned.named_modules():
        assert module.extra_repr() == other.get_submodule(path).extra_repr()


def test_the_encoder_learns_its_new_width_and_the_model_trains_on() -> None:
    torch.manual_seed(0)
    model = real(CrossAttentionFusion(["image", "text"], 32))
    model.encoders["text"].requires_grad_(False)
    pruned, made = prune(settled(model), batch(), PruneConfig(**CONFIG))
    width = pruned.encoders["image"].out_dim
    assert width < 64 and pruned.necks["image"].norm.normalized_shape == (width,)
    assert pruned.token_necks["image"][0].in_features == width == made.attributes["encoders.image"]["out_dim"]
    assert pruned.necks["image"].linear.out_features == 32  # outside prune.modules only inputs shrink
    assert model.encoders["image"].out_dim == 64
    stream = made.tensors["encoders.image.stages.2.0.0.weight"]["0"]
    readers = ("necks.image.linear.weight", "token_necks.image.0.weight")
    assert all(made.tensors[name]["1"] == stream for name in readers)
    assert made.tensors["necks.image.norm.weight"]["0"] == stream
    assert not any(parameter.requires_grad for parameter in pruned.encoders["text"].parameters())
    optimizer = torch.optim.SGD([p for p in pruned.parameters() if p.requires_grad], lr=0.1)
    pruned.train()(batch()).logits["category"].square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None for p in pruned.encoders["image"].parameters())


def test_outputs_of_the_model_keep_their_width() -> None:
    torch.manual_seed(0)
    _, made = prune(settled(StandIn(expose=True)), batch(), PruneConfig(**CONFIG))
    assert "0" not in made.tensors.get("encoders.image.linear.weight", {})
    _, made = prune(settled(StandIn()), batch(), PruneConfig(**CONFIG))
    assert "0" in made.tensors["encoders.image.linear.weight"]


def test_weak_channels_go_first() -> None:
    torch.manual_seed(0)
    model = settled(StandIn())
    weak = torch.randperm(48)[:24].sort().values
    with torch.no_grad():
        model.encoders["image"].last[0].weight[weak] *= 1e-4
        model.encoders["image"].last[1].weight[weak] *= 1e-4
        model.encoders["image"].linear.weight.view(40, 48, 4)[:, weak] *= 1e-4
    made = plan(model, batch(), PruneConfig(ratio=0.1, round_to=1, modules=["encoders.image.last"]))
    kept = made.tensors["encoders.image.last.0.weight"]["0"]["kept"]
    assert len(kept) == 44 and not set(range(48)) - set(kept) - set(weak.tolist())
    taken = made.tensors["encoders.image.linear.weight"]["1"]["kept"]
    assert taken == [channel * 4 + place for channel in kept for place in range(4)]


class Wide(nn.Module):
    """A LayerNorm that is so much wider than what remains of it that a set of its indices comes unsorted."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.out = nn.Linear(3, 1000), nn.LayerNorm(1000), nn.Linear(1000, 40)

    def forward(self, image: Tensor) -> Tensor:
        return self.out(self.norm(self.wide(image.float().mean((2, 3)))))


def test_layer_norm_keeps_the_channels_of_its_neighbours() -> None:
    torch.manual_seed(0)
    made = plan(StandIn(Wide()), batch(), PruneConfig(ratio=0.9, round_to=1, modules=["encoders.image.wide"]))
    kept = made.tensors["encoders.image.wide.weight"]["0"]
    assert kept["kept"] == sorted(kept["kept"]) and len(kept["kept"]) == 100
    assert made.tensors["encoders.image.norm.weight"]["0"] == kept == made.tensors["encoders.image.out.weight"]["1"]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.norm2 = heads, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 16, 32))
        self.blocks, self.norm, self.out = (
            nn.Sequential(Attention(32, 4), Attention(32, 4)),
            nn.LayerNorm(32),
            nn.Linear(32, 40),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image.float() / 255).flatten(2).transpose(1, 2) + self.place
        return self.out(self.norm(self.blocks(x)).mean(1))


def test_a_transformer_keeps_its_heads_and_one_set_of_channels() -> None:
    torch.manual_seed(0)
    pruned, made = prune(StandIn(Transformer()).eval(), batch(), PruneConfig(**CONFIG))
    tower, prefix = pruned.encoders["image"], "encoders.image."
    assert tower.blocks[0].q.out_features == tower.blocks[1].v.out_features == 32
    assert tower.blocks[0].mlp[0].out_features < 128
    streams = [
        made.tensors[f"{prefix}place"]["2"],
        made.tensors[f"{prefix}patches.weight"]["0"],
        made.tensors[f"{prefix}norm.weight"]["0"],
        made.tensors[f"{prefix}blocks.1.q.weight"]["1"],
        made.tensors[f"{prefix}blocks.0.o.weight"]["0"],
        made.tensors[f"{prefix}blocks.0.mlp.2.bias"]["0"],
    ]
    assert all(stream == streams[0] for stream in streams) and len(streams[0]["kept"]) < 32


def test_choice_ranks_all_groups_together_and_rounds() -> None:
    low, high = torch.arange(16.0), torch.arange(16.0) + 8
    first, second = choose([low, high], 0.5, [1, 1])
    assert first == list(range(12)) and second == list(range(4))
    first, second = choose([low, high], 0.4, [8, 8])
    assert first == list(range(8)) and second == []
    first, second = choose([low, high + 1000], 0.5, [4, 4])
    assert first == list(range(12)) and second == list(range(4))  # no group vanishes
    assert [len(lost) for lost in choose([low, torch.zeros(5)], 0.5, [8, 8])] == [8, 0]
    assert [len(lost) for lost in choose([torch.zeros(40)], 0.99, [1])] == [36]


def test_random_choice_follows_its_seed() -> None:
    torch.manual_seed(0)
    model, config = settled(StandIn()), PruneConfig(importance="random", **CONFIG)
    assert plan(model, batch(), config, seed=3) == plan(model, batch(), config, seed=3)
    assert plan(model, batch(), config, seed=3) != plan(model, batch(), config, seed=4)


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    model = settled(StandIn())
    with pytest.raises(UserError, match=r"no module 'encoders.imag'; did you mean 'encoders.image'"):
        plan(model, batch(), PruneConfig(modules=["encoders.imag"]))
    with pytest.raises(UserError, match="no channels can be pruned there"):
        plan(model, batch(), PruneConfig(modules=["encoders.text"]))
    with pytest.raises(UserError, match="needs rows with labels"):
        plan(model, batch(), PruneConfig(importance="taylor", **CONFIG))
    labelled = batch()._replace(targets={"category": torch.tensor([0, IGNORE, 3])})
    plan(model, labelled, PruneConfig(importance="taylor", **CONFIG))
    pruned, made = prune(model, batch(), PruneConfig(**CONFIG))
    with pytest.raises(UserError, match="build the model it was made for"):
        apply(pruned, made)
    with pytest.raises(UserError, match="absent"):
        apply(nn.Linear(2, 2), made)
    (tmp_path / "plan.json").write_text(json.dumps({"tensors": {}, "other": 1}))
    for path in (tmp_path / "plan.json", tmp_path / "absent.json"):
        with pytest.raises(UserError, match="not readable as a pruning plan"):
            PrunePlan.load(path)


def test_applying_a_plan_needs_no_torch_pruning() -> None:
    code = "import sys; sys.modules['torch_pruning'] = None; import distill.prune, torch; from torch import nn\n" \
        "plan = distill.prune.PrunePlan({'weight': {'0': {'of': 3, 'kept': [0, 2]}}}, {'': {'out_features': 2}})\n" \
        "assert distill.prune.apply(nn.Linear(4, 3, bias=False), plan)(torch.ones(1, 4)).shape == (1, 2)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("student", "modules", "sentence"),
    [
        ("{text: {type: static_embeddings, vocab_size: 64, dim: 8}}", None, None),
        ("{image: {type: convnet, widths: [8], blocks: [0]}}", None, None),
        (
            "{text: {type: static_embeddings, vocab_size: 64, dim: 8}}",
            "[necks.image]",
            "'necks.image'; set it to [fusion]",
        ),
        (
            "{image: {type: convnet, widths: [8], blocks: [0]}}",
            "[fusion, encoders.text.table]",
            "'encoders.text.table'; set it to [encoders.image, fusion]",
        ),
        ("{image: {type: convnet, widths: [8], blocks: [0]}}", "[fusion]", None),
        ("{image: {type: convnet, widths: [8], blocks: [0]}}", "[encoders, necks.image, embedders]", None),
    ],
)
def test_what_may_be_pruned_is_checked_before_anything_is_trained(student, modules, sentence):
    overrides = [] if modules is None else [f"prune.modules={modules}"]
    recipe = load_recipe("quickstart", [f"student.encoders={student}", *overrides])
    if sentence is None:
        check_pruning(recipe, pipeline.ENCODERS)
        return
    with pytest.raises(UserError, match=re.escape(f"prune.modules: the student has no module {sentence}")):
        check_pruning(recipe, pipeline.ENCODERS)


@pytest.mark.parametrize(("until", "refused"), [(None, True), ("pruned", True), ("export", True), ("student", False)])
def test_a_run_that_prunes_nothing_needs_no_modules_to_prune(monkeypatch, until, refused):
    monkeypatch.setattr(pipeline, "check_recipe", lambda *_: None)
    recipe = load_recipe("quickstart", ["prune.modules=[encoders.sound]"])
    with pytest.raises(UserError, match=r"encoders\.sound") if refused else nullcontext():
        pipeline.check(recipe, until)
