"""Attention heads and their dimensions: found in our own, transformers' and timm's attention, cut exactly, exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_prune
import torch
from test_fusion_models import answers, graph_of
from test_prune import outputs, real, settled
from tiny import around, make_batch
from torch import nn

from distill.checkpoint import load_weights, save_weights
from distill.config import PruneConfig
from distill.contracts import Batch, UserError
from distill.fusion import FUSIONS
from distill.multimodal import Encoded, Encoder, evaluating
from distill.predict import EMBEDDING
from distill.prune import PrunePlan, apply, plan, prune
from distill.prune.heads import attentions
from students import ConvNet, SmallTransformer
from teachers import PretrainedText, PretrainedVision, TimmEncoder

HEADS: dict[str, Any] = {"ratio": 0.0, "heads": 0.5, "round_to": 1}


def model(kind: str, bert: Path, clip: Path) -> Any:
    """A model of images and texts with one kind of attention in it."""
    torch.manual_seed(0)
    image: Encoder = ConvNet(widths=[8, 8], blocks=[0, 1])
    text: Encoder = PretrainedText(weights=f"path:{bert}", freeze=False)
    if kind == "vit":
        image = TimmEncoder(name="test_vit", size=32)
    if kind == "clip":
        image = PretrainedVision(weights=f"path:{clip}", freeze=False)
    if kind == "own":
        text = SmallTransformer(tokenizer_file="absent.json", vocab_size=60, dim=32, heads=4, max_length=12)
    made: Any = around({"image": image, "text": text}, fusion="perceiver" if kind == "own" else "concat", dim=16)
    return made.eval()


MODULES = {"own": ["encoders.text", "fusion"], "bert": ["encoders.text"], "vit": ["encoders.image"]}
MODULES["clip"] = MODULES["vit"]


def silenced(whole: nn.Module, made: PrunePlan) -> nn.Module:
    """The unpruned model with zeros where output projections read what is cut."""
    whole = copy.deepcopy(whole)
    for name, cuts in made.tensors.items():
        if "1" in cuts:
            gone = sorted(set(range(cuts["1"]["of"])) - set(cuts["1"]["kept"]))
            whole.get_parameter(name).data[:, gone] = 0.0
    return whole


@pytest.mark.parametrize(
    ("kind", "scope"), [("own", "global"), ("own", "layer"), ("bert", "global"), ("vit", "layer"), ("clip", "global")]
)
def test_the_pruned_model_is_the_one_whose_heads_are_silent(kind, scope, bert_folder, clip_folder) -> None:
    whole, batch = model(kind, bert_folder, clip_folder), make_batch()
    there = attentions(whole, MODULES[kind])
    assert len(there) == {"own": 4, "bert": 1, "vit": 6, "clip": 1}[kind]
    pruned, made = prune(whole, batch, PruneConfig(**HEADS, modules=MODULES[kind], scope=scope))
    for path, value in pruned(batch).embeddings.items():
        torch.testing.assert_close(value, silenced(whole, made)(batch).embeddings[path], rtol=1e-4, atol=1e-5)
    left = attentions(pruned, MODULES[kind])
    assert [each.size for each in left] == [each.size for each in there]
    assert made.report["heads"] == [sum(each.heads for each in group) for group in (there, left)]
    assert made.report["heads"][1] == made.report["heads"][0] // 2
    if scope == "layer":
        assert all(now.heads == before.heads // 2 for now, before in zip(left, there, strict=True))
    for each in left:
        assert made.attributes[each.path][each.layout.count] == each.heads
        assert each.heads == len(made.tensors[f"{each.output}.weight"]["1"]["kept"]) // each.size


@pytest.mark.parametrize("kind", ["own", "bert", "clip"])
def test_dimensions_of_heads_keep_the_scale_of_scores(kind, bert_folder, clip_folder) -> None:
    """Dimensions that were zero anyway go, and nothing changes."""
    whole, batch = model(kind, bert_folder, clip_folder), make_batch()
    there = attentions(whole, MODULES[kind])
    with torch.no_grad():
        for each in there:
            query, _, value = (whole.get_submodule(path) for path in each.inputs)
            output = whole.get_submodule(each.output)
            dead = [head * each.size + place for head in range(each.heads) for place in range(head, each.size, 2)]
            for layer in (query, value):
                layer.weight[dead], layer.bias[dead] = 0.0, 0.0
            whole.get_submodule(each.inputs[1]).weight[dead] = 0.0
            output.weight[:, dead] = 0.0
    config = PruneConfig(ratio=0.0, head_dims=0.4, round_to=1, modules=MODULES[kind])
    pruned, made = prune(whole, batch, config)
    for path, value in pruned(batch).embeddings.items():
        torch.testing.assert_close(value, whole(batch).embeddings[path], rtol=1e-4, atol=1e-5)
    for before, now in zip(there, attentions(pruned, MODULES[kind]), strict=True):
        assert now.heads == before.heads and now.size == before.size - int(0.4 * before.size)
    assert made.report["head_dims"][1] < made.report["head_dims"][0]


def test_the_weakest_heads_go_and_all_layers_are_ranked_together(bert_folder, clip_folder) -> None:
    whole = model("own", bert_folder, clip_folder)
    first, second, *_ = attentions(whole, ["encoders.text"])
    with torch.no_grad():
        for each, heads in ((first, [0, 2, 3]), (second, [1])):
            for head in heads:
                rows = slice(head * each.size, (head + 1) * each.size)
                for path in each.inputs:
                    whole.get_submodule(path).weight[rows] *= 0.01
    made = plan(whole, make_batch(), PruneConfig(**HEADS, modules=["encoders.text"]))
    kept = [made.tensors[f"{each.output}.weight"]["1"]["kept"][:: each.size] for each in (first, second)]
    assert kept == [[8], [0, 16, 24]]


@pytest.mark.parametrize("importance", ["taylor", "hessian", "random"])
def test_heads_are_judged_by_data_too(importance, bert_folder, clip_folder) -> None:
    whole, batch = model("own", bert_folder, clip_folder), make_batch()
    config = PruneConfig(**HEADS, modules=["encoders.text"], importance=importance)
    made = plan(whole, batch, config, loss=lambda outputs, _: outputs.embeddings["fused"].square().mean(), seed=1)
    assert made.report["heads"] == [8, 4]


def test_a_transformer_and_a_fusion_lose_heads_and_widths_and_are_exported(bert_folder, clip_folder, tmp_path) -> None:
    whole, batch = model("own", bert_folder, clip_folder), make_batch(4)
    changes = {**HEADS, "modules": MODULES["own"], "ratio": 0.5, "head_dims": 0.5}
    pruned, made = prune(whole, batch, PruneConfig(**changes))
    for path in ("encoders.text.blocks.0", "fusion.blocks.0"):
        before, now = whole.get_submodule(path), pruned.get_submodule(path)
        assert now.attention.heads < before.attention.heads
        assert now.mlp[0].out_features < before.mlp[0].out_features
        assert now.attention.q.out_features < now.attention.heads * 8
    with evaluating(pruned):
        expected = pruned(batch).embeddings["fused"].numpy()
    session = graph_of(pruned, batch, tmp_path / "model.onnx")
    np.testing.assert_allclose(answers(session, batch)[f"{EMBEDDING}fused"], expected, rtol=1e-3, atol=1e-5)
    made.save(tmp_path / "plan.json")
    save_weights(pruned, tmp_path / "model.safetensors")
    again = apply(model("own", bert_folder, clip_folder), PrunePlan.load(tmp_path / "plan.json"))
    load_weights(again, tmp_path / "model.safetensors")
    with evaluating(again):
        assert (again(batch).embeddings["fused"].numpy() == expected).all()


@pytest.mark.parametrize("kind", ["cross_attention", "self_attention", "bottleneck", "perceiver"])
def test_every_fusion_with_attention_loses_heads_and_widths(kind: str) -> None:
    torch.manual_seed(0)
    whole = settled(real(FUSIONS[kind](["image", "text"], 32)))
    pruned, made = prune(whole, test_prune.batch(), PruneConfig(**{**HEADS, "ratio": 0.5}, modules=["fusion"]))
    assert any(name.endswith("mlp.0.weight") for name in made.tensors)
    assert made.report["heads"][1] == made.report["heads"][0] // 2
    assert outputs(pruned).keys() == outputs(whole).keys()


class Odd(Encoder):
    """Attention that is laid out like ours, and reads its heads in another order."""

    reads, out_dim = "text", 16

    def __init__(self) -> None:
        super().__init__()
        self.table, self.heads = nn.Embedding(60, 16), 4
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.tokenizer_file, self.max_length, self.pad_id, self.frozen = Path("absent.json"), 12, 0, False

    def forward(self, inputs: dict[str, torch.Tensor]) -> Encoded:
        x, mask = self.table(inputs["text"]), inputs["text_mask"]
        q, k, v = (layer(x).unflatten(-1, (-1, self.heads)).movedim(-1, 1) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).movedim(1, -1).flatten(2)
        y = x + self.o(y)
        return Encoded(y, mask, y.mean(1))


def test_refusals_say_what_to_do(bert_folder, clip_folder) -> None:
    batch: Batch = make_batch()
    whole = model("vit", bert_folder, clip_folder)
    with pytest.raises(UserError, match=r"prune\.head_dims: no attention in encoders\.image whose head_dims"):
        plan(whole, batch, PruneConfig(ratio=0.0, head_dims=0.5, modules=["encoders.image"]))
    own = model("own", bert_folder, clip_folder)
    with pytest.raises(UserError, match=r"prune\.heads: no attention in encoders\.image whose heads can be cut"):
        plan(own, batch, PruneConfig(**HEADS))
    with pytest.raises(UserError, match=r"no BatchNorm for prune\.importance=bn_scale; choose magnitude"):
        plan(own, batch, PruneConfig(**HEADS, importance="bn_scale", modules=["encoders.text"]))
    odd: Any = around({"image": ConvNet(widths=[8], blocks=[0]), "text": Odd()}, fusion="concat", dim=16).eval()
    with pytest.raises(UserError, match=r"attention of 'encoders\.text' .* cannot be cut \(its outputs differ"):
        plan(odd, batch, PruneConfig(**HEADS, modules=["encoders.text"]))
