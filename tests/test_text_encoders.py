"""Small text encoders: right under padding, the same after saving, export and pruning, and able to learn."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from distill import pipeline
from distill.bench import flops
from distill.builders import build_part
from distill.checkpoint import load_weights, save_weights
from distill.config import PruneConfig
from distill.contracts import Batch, Outputs, UserError
from distill.data_config import Part
from distill.export.onnx import export_onnx
from distill.fusion import ConcatFusion
from distill.multimodal import Encoder, MultimodalModel
from distill.predict import open_session
from distill.prune import PrunePlan, apply, check_pruning, plan, prune
from distill.recipe import load_recipe
from distill.taps import list_taps
from distill.tasks import LinearHead
from students import ENCODERS, RecurrentText, TextCNN

VOCAB = 40
KINDS: dict[str, dict[str, Any]] = {
    "lstm": {"type": "recurrent_text", "hidden": 5, "layers": 2, "pooling": "attention"},
    "gru": {"type": "recurrent_text", "hidden": 5, "cell": "gru", "pooling": "last"},
    "one_way": {"type": "recurrent_text", "hidden": 6, "bidirectional": False, "layers": 2},
    "cnn": {"type": "text_cnn", "channels": 8, "widths": [2, 3, 5]},
    "transformer": {"type": "small_transformer", "heads": 2},
}
WIDTHS = {"lstm": 10, "gru": 10, "one_way": 6, "cnn": 24, "transformer": 8}
RECURRENT = ["lstm", "gru", "one_way"]


def build(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    part = Part.model_validate({"vocab_size": VOCAB, "dim": 8, "max_length": 48, **KINDS[kind], **options})
    return build_part(ENCODERS, part, "student.encoders.text", tokenizer_file="tokenizer.json")


def texts(lengths: list[int], width: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Random rows of these lengths, with random tokens behind them too, which nothing may read."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"text": torch.randint(1, VOCAB, (len(lengths), width), generator=generator), "text_mask": mask}


def as_batch(inputs: dict[str, Tensor]) -> Batch:
    rows = len(inputs["text"])
    return Batch(torch.arange(rows), torch.zeros(rows).long(), inputs, {"text": torch.ones(rows).bool()}, {})


def around(encoder: Encoder, *, normalised: bool = True) -> MultimodalModel:
    """A model that reads texts alone."""
    torch.manual_seed(1)
    head = LinearHead(16, 5)
    fusion = ConcatFusion(["text"], 16)
    model = MultimodalModel({"text": encoder}, fusion, {"kind": head}, {}, dim=16, embedding_dim=8)
    if not normalised:  # LayerNorm sees the zeros of a silenced channel
        model.necks["text"].norm = nn.Identity()
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_what_the_pipeline_reads(kind: str) -> None:
    encoder = build(kind, dropout=0.3).eval()
    inputs = texts([7, 3, 1], 7)
    tokens, mask, pooled = encoder(inputs)
    assert tokens.shape == (3, 7, WIDTHS[kind]) and pooled.shape == (3, WIDTHS[kind])
    assert encoder.out_dim == WIDTHS[kind] and mask is inputs["text_mask"]
    assert (tokens[~mask] == 0).all() and (tokens[mask] != 0).any(1).all()
    assert encoder.table.weight.shape == (VOCAB, 8) and encoder.max_length == 48 and encoder.pad_id == 0
    assert encoder.tokenizer_file == Path("tokenizer.json") and callable(type(encoder).reduce_vocabulary)
    assert torch.equal(encoder(inputs).pooled, pooled)
    assert not torch.equal(encoder.train()(inputs).pooled, pooled)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), more=st.integers(0, 12), seed=st.integers(0, 99))
def test_padding_changes_nothing(kind: str, lengths: list[int], more: int, seed: int) -> None:
    encoder, width = build(kind).eval(), max(1, *lengths)
    wide = texts(lengths, width + more, seed=seed)
    narrow = {name: tensor[:, :width] for name, tensor in wide.items()}
    with torch.no_grad():
        one, other = encoder(narrow), encoder(wide)
        alone = [
            encoder({name: tensor[row : row + 1] for name, tensor in narrow.items()}) for row in range(len(lengths))
        ]
    torch.testing.assert_close(other.pooled, one.pooled, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.tokens[:, :width], one.tokens, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([encoded.pooled for encoded in alone]), one.pooled, rtol=1e-4, atol=1e-6)
    assert one.pooled.isfinite().all() and (one.pooled[torch.tensor(lengths) == 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_text_learns_without_nan(kind: str) -> None:
    encoder = build(kind)
    encoder(texts([0, 0], 3)).pooled.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_give_the_same(kind: str, tmp_path: Path) -> None:
    encoder = build(kind).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_weights(encoder, tmp_path / "model.safetensors")
    again = build(kind).eval()
    load_weights(again, tmp_path / "model.safetensors")
    inputs = texts([6, 2, 4], 6)
    assert all((a - b).abs().max() == 0 for a, b in zip(encoder(inputs)[::2], again(inputs)[::2], strict=True))


class Bare(nn.Module):
    """An encoder as a model; exporting a fusion beside it takes longer."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"text": encoder})

    def forward(self, batch: Batch) -> Outputs:
        tokens, _, pooled = self.encoders["text"](batch.inputs)
        return Outputs({"tokens": tokens}, {"text": pooled}, {})


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_says_the_same_at_any_batch_and_length(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    attempts, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: attempts.append(k.get("strict")) or export(*a, **k))
    model = Bare(build(kind)).eval()
    info = export_onnx(model, as_batch(texts([5, 2], 5)), tmp_path / "model.onnx")
    assert info["outputs"]["tokens"]["shape"][::2] == ["batch", WIDTHS[kind]]
    assert attempts == [False]
    session = open_session(tmp_path / "model.onnx")
    for lengths, width in (([1], 1), ([3], 9), ([0, 4, 2], 4), ([31, 30, 1, 0], 31), ([0], 2)):
        batch = as_batch(texts(lengths, width, seed=width))
        feeds = {
            name: tensor.numpy() for name, tensor in {**batch.inputs, "text_present": batch.present["text"]}.items()
        }
        tokens, pooled = session.run(["tokens", "embedding_text"], feeds)
        with torch.no_grad():
            expected = model(batch)
        assert np.abs(tokens - expected.logits["tokens"].numpy()).max() < 1e-4
        assert np.abs(pooled - expected.embeddings["text"].numpy()).max() < 1e-4


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_recurrence_is_that_of_packed_sequences(cell: Any, pooling: Any) -> None:
    torch.manual_seed(0)
    encoder = RecurrentText(
        tokenizer_file="", vocab_size=VOCAB, dim=8, cell=cell, hidden=5, layers=2, pooling=pooling
    ).eval()
    whole = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](8, 5, num_layers=2, bidirectional=True, batch_first=True)
    for number, layer in enumerate(encoder.layers):
        for module, suffix in ((layer.ahead, ""), (layer.back, "_reverse")):
            for name, parameter in module.named_parameters():
                getattr(whole, f"{name.removesuffix('0')}{number}{suffix}").data = parameter.data
    lengths = torch.tensor([6, 1, 4])
    inputs = texts(lengths.tolist(), 6)
    with torch.no_grad():
        packed = pack_padded_sequence(encoder.table(inputs["text"]), lengths, batch_first=True, enforce_sorted=False)
        states, last = whole(packed)
        states = pad_packed_sequence(states, batch_first=True)[0]
        tokens, _, pooled = encoder(inputs)
    torch.testing.assert_close(tokens, states)
    final = (last[0] if cell == "lstm" else last)[-2:].transpose(0, 1).flatten(1)
    torch.testing.assert_close(pooled, final if pooling == "last" else states.sum(1) / lengths[:, None])


def test_attention_weighs_tokens_by_their_scores() -> None:
    encoder = build("lstm").eval()
    tokens, mask, pooled = encoder(texts([4, 2], 4))
    scores = encoder.attention.score(tokens)[..., 0].masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(pooled, (scores.softmax(1)[..., None] * tokens).sum(1))


@settings(max_examples=25, deadline=None)
@given(widths=st.lists(st.integers(1, 6), min_size=1, max_size=3), length=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_text_cnn_is_the_maximum_over_windows(widths: list[int], length: int, seed: int) -> None:
    encoder = TextCNN(tokenizer_file="", vocab_size=VOCAB, dim=4, widths=widths, channels=3).eval()
    inputs = texts([length], length + 3, seed=seed)
    tokens, _, pooled = encoder(inputs)
    words = encoder.table(inputs["text"][0, :length])
    for number, (width, convolution) in enumerate(zip(widths, encoder.convolutions, strict=True)):
        before = (width - 1) // 2
        padded = torch.cat([torch.zeros(before, 4), words, torch.zeros(width - 1 - before, 4)])
        maps = [torch.einsum("ocw,wc->o", convolution.weight, padded[t : t + width]) for t in range(length)]
        expected = (torch.stack(maps) + convolution.bias).relu()
        part = slice(3 * number, 3 * number + 3)
        torch.testing.assert_close(tokens[0, :length, part], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(pooled[0, part], expected.max(0).values, rtol=1e-4, atol=1e-6)


def test_a_transformer_knows_the_order_of_words() -> None:
    encoder = build("transformer").eval()
    one = {"text": torch.tensor([[3, 4, 5]]), "text_mask": torch.ones(1, 3).bool()}
    other = {**one, "text": torch.tensor([[5, 4, 3]])}
    assert (encoder(one).pooled - encoder(other).pooled).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_learn_which_of_two_words_comes_first(kind: str) -> None:
    inputs = texts([6] * 64, 8, seed=3)
    inputs["text"].clamp_(min=10)
    first = torch.arange(64) % 2
    inputs["text"][torch.arange(64), 2], inputs["text"][torch.arange(64), 3] = 7 + first, 8 - first
    encoder = build(kind)
    head = nn.Linear(encoder.out_dim, 2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=0.02)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(head(encoder(inputs).pooled), first)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5 and losses[-1] < 0.1


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("lstm", {"cell": "rnn"}, "student.encoders.text.cell is 'rnn'"),
        ("lstm", {"pooling": "max"}, "student.encoders.text.pooling is 'max'"),
        ("lstm", {"layers": 0}, "recurrent_text cannot be built: layers is 0, expected at least 1"),
        ("lstm", {"dim": 0}, "dim is 0, expected at least 1"),
        ("cnn", {"max_length": 0}, "max_length is 0, expected at least 1"),
        ("gru", {"hidden": 0}, "hidden is 0, expected at least 1"),
        ("cnn", {"widths": []}, "widths is empty; give the tokens of at least one window"),
        ("cnn", {"widths": [3, 0]}, "widths is 0, expected at least 1"),
        ("transformer", {"heads": 3}, "heads 3 does not divide dim 8"),
        ("transformer", {"depth": 0}, "depth is 0, expected at least 1"),
        ("transformer", {"mlp_ratio": 0.01}, "mlp_ratio is 0, expected at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(kind: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_its_parts_can_be_tapped(kind: str) -> None:
    taps = {tap.path: tap.shape for tap in list_taps(around(build(kind)), as_batch(texts([6, 4, 2], 6)))}
    assert taps["encoders.text"] == [6, WIDTHS[kind]] and taps["encoders.text.table"] == [6, 8]
    inner = {"cnn": "convolutions.0", "transformer": "blocks.1"}.get(kind, "layers.0")
    assert taps[f"encoders.text.{inner}"] == ([8, 6] if kind == "cnn" else [6, WIDTHS[kind]])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_learns_too(kind: str) -> None:
    encoder = build(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = encoder(texts([6, 0, 2], 6)).pooled
    pooled.float().square().sum().backward()
    torch.testing.assert_close(pooled.float(), encoder(texts([6, 0, 2], 6)).pooled, rtol=0.1, atol=0.05)
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize(("kind", "modules"), [("cnn", "encoders.text"), ("transformer", "encoders.text.blocks")])
def test_a_pruned_encoder_is_the_silenced_one(kind: str, modules: str, tmp_path: Path) -> None:
    model = around(build(kind), normalised=False)
    batch = as_batch(texts([6, 4, 2], 6))
    pruned, made = prune(model, batch, PruneConfig(ratio=0.5, round_to=2, modules=[modules]))
    silenced = copy.deepcopy(model)
    for name, parameter in silenced.named_parameters():
        cut = made.tensors.get(name, {}).get("0")
        if cut:
            parameter.data[sorted(set(range(cut["of"])) - set(cut["kept"]))] = 0
    found, expected = (each(batch) for each in (pruned, silenced))
    torch.testing.assert_close(found.logits["kind"], expected.logits["kind"], rtol=1e-4, atol=1e-5)
    assert made.report["channels"][1] < 0.7 * made.report["channels"][0]
    assert pruned.encoders["text"].out_dim == (12 if kind == "cnn" else 8)


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_pruned_weights_reload_into_a_rebuilt_model(kind: str, tmp_path: Path) -> None:
    batch = as_batch(texts([6, 4, 2], 6))
    pruned, made = prune(around(build(kind)), batch, PruneConfig(ratio=0.5, round_to=2, modules=["encoders"]))
    made.save(tmp_path / "plan.json")
    save_weights(pruned, tmp_path / "pruned.safetensors")
    other: Any = apply(around(build(kind)), PrunePlan.load(tmp_path / "plan.json"))
    load_weights(other, tmp_path / "pruned.safetensors")
    assert torch.equal(other(batch).logits["kind"], pruned(batch).logits["kind"])
    assert other.encoders["text"].out_dim == other.necks["text"].norm.normalized_shape[0] < WIDTHS[kind]
    pruned.train()(batch).logits["kind"].sum().backward()


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrence_stays_whole_beside_what_is_pruned(kind: str) -> None:
    model, batch = around(build(kind)), as_batch(texts([6, 4, 2], 6))
    pruned, made = prune(model, batch, PruneConfig(ratio=0.5, round_to=2, modules=["encoders", "necks", "fusion"]))
    assert not any(name.startswith("encoders.") for name in made.tensors) and made.tensors
    tokens = [each.encoders["text"](batch.inputs).tokens for each in (model, pruned)]
    assert torch.equal(*tokens)
    with pytest.raises(UserError, match="no channels can be pruned there; name other modules"):
        plan(model, batch, PruneConfig(modules=["encoders.text"]))


@pytest.mark.parametrize(
    ("text", "modules", "sentence"),
    [
        (
            KINDS["gru"],
            "[encoders.text]",
            r"'encoders.text' has no channels to remove: gates and states of a recurrence",
        ),
        (KINDS["gru"], "[encoders.text.layers.0]", r"have one width, which pruning does not cut; set it to \[fusion\]"),
        ({"type": "static_embeddings"}, "[fusion, encoders.text]", "it is a table, without layers; set it to"),
        (KINDS["gru"], "[encoders, fusion]", None),
        (KINDS["cnn"], "[encoders.text]", None),
        (KINDS["transformer"], "[encoders.text.blocks]", None),
    ],
)
def test_what_has_no_channels_is_said_before_anything_is_trained(text: Any, modules: str, sentence: str | None) -> None:
    part = json.dumps({"text": {"vocab_size": 64, "dim": 8, **text}})
    recipe = load_recipe("quickstart", [f"prune.modules={modules}", f"student.encoders={part}"])
    if sentence is None:
        check_pruning(recipe, pipeline.ENCODERS)
        return
    with pytest.raises(UserError, match=sentence):
        check_pruning(recipe, pipeline.ENCODERS)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_products_of_a_recurrence_are_counted(cell: Any) -> None:
    """torch has a fused LSTM on CPUs, which its counter of operations does not know."""
    encoder = RecurrentText(tokenizer_file="", vocab_size=VOCAB, dim=8, cell=cell, hidden=6, bidirectional=False)
    gates = {"lstm": 4, "gru": 3}[cell]
    batch = as_batch(texts([5], 5))
    assert flops(Bare(encoder), batch) == 5 * 2 * gates * 6 * (8 + 6)
    two, model = as_batch(texts([5, 5], 5)), around(encoder)
    behind = 2 * (6 * 16 + 16 * 16 + 16 * 5 + 2 * 16 * 8)
    found = plan(model, two, PruneConfig(modules=["fusion"])).report["flops"][0]
    assert found == 5 * 2 * gates * 6 * (8 + 6) + behind
