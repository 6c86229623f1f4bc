"""Encoders that tell each other between their stages what they see."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encoders import DATA, PARAMS, largest
from torch import Tensor, nn

from distill.build import build_model, check_model, example_batch, input_spec, told_by_data
from distill.check import check_recipe
from distill.config import ModelConfig, TeacherConfig
from distill.contracts import Batch, UserError
from distill.encoders import Encoded, encode_exchanging
from distill.evaluate import feeds
from distill.exchange import HIDDEN, HIDDEN_MASK, MMTM, Hidden, excited, has_stages, squeezed
from distill.export.onnx import export_onnx
from distill.multimodal import evaluating
from distill.pipeline import ENCODERS
from distill.predict import open_session
from distill.recipe import load_recipe
from distill.tapped import Tapped
from distill.targets import unnamed
from students import INHERITANCES

STAGED = [kind for kind in PARAMS if has_stages(ENCODERS[kind])]
THREE = {"image": "convnet", "text": "small_transformer", "audio": "audio_convnet"}
ROWS = 4


def settings_of(encoders: dict[str, str], **changes: Any) -> dict[str, Any]:
    parts = {modality: {"type": kind, **PARAMS[kind]} for modality, kind in encoders.items()}
    found = {"encoders": parts, "exchange": {"type": "mmtm", "at": [1, 2]}, "fusion": {"type": "concat", "dim": 16}}
    return found | {"embedding_dim": 8, "unimodal_heads": False} | changes


def built(encoders: dict[str, str], tokenizer_file: Path, *, told: bool = True, **changes: Any) -> Any:
    """A model whose gates say something, unless they are to stay as they begin."""
    config = ModelConfig.model_validate(settings_of(encoders, **changes))
    given = told_by_data(config, ENCODERS, DATA) | {"text": {"tokenizer_file": tokenizer_file}}
    torch.manual_seed(0)
    model: Any = build_model(config, ENCODERS, {"kind": unnamed(3)}, "student", given)
    with torch.no_grad():
        for parameter in model.exchange.parameters() if told and model.exchange else ():
            parameter.add_(0.5 * torch.randn_like(parameter))
    model.train()(batch_of(model, 8))
    return model.eval()


def batch_of(model: Any, rows: int = ROWS) -> Batch:
    return example_batch(input_spec(model), DATA, rows=rows, length=7)


def having(batch: Batch, present: dict[str, list[bool]]) -> Batch:
    return batch._replace(present={name: torch.tensor(rows) for name, rows in present.items()})


def row(batch: Batch, number: int) -> Batch:
    here = slice(number, number + 1)
    inputs, present = ({name: v[here] for name, v in part.items()} for part in (batch.inputs, batch.present))
    return Batch(batch.ids[here], batch.views[here], inputs, present, {})


@pytest.mark.parametrize("kind", STAGED)
def test_stage_by_stage_an_encoder_says_what_it_says_at_once(kind, wordpiece_file):
    modality = ENCODERS[kind].reads
    model = built({modality: kind}, wordpiece_file, exchange=None)
    encoder, inputs = model.encoders[modality], batch_of(model).inputs
    hidden = encoder.begin(inputs)
    for stage, width in enumerate(encoder.stage_widths):
        hidden = encoder.advance(stage, hidden)
        assert squeezed(hidden).shape == (ROWS, width)
    found: Encoded = encoder({HIDDEN: hidden.values, HIDDEN_MASK: hidden.mask})
    for ours, theirs in zip(found, encoder(inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_convolutions_and_transformers_have_stages_and_recurrences_have_none():
    assert {"convnet", "resnet_cifar", "small_transformer", "audio_convnet", "series_convnet"} == {*STAGED}


def test_gates_are_those_of_the_paper():
    torch.manual_seed(0)
    exchange = MMTM({"image": [3, 4], "text": [6, 6]}, [2], ratio=2).double()
    with torch.no_grad():
        for parameter in exchange.parameters():
            parameter.copy_(torch.randn_like(parameter))
    told = {"image": torch.randn(2, 4).double(), "text": torch.randn(2, 6).double()}
    present = {"image": torch.tensor([True, True]), "text": torch.tensor([True, False])}
    found = exchange(0, told, present)
    linear: Any = exchange.joints[0][0]  # type: ignore[index]
    text = torch.stack([told["text"][0], exchange.missing[0]["text"]])  # type: ignore[index]
    z = (torch.cat([told["image"], text], 1) @ linear.weight.T + linear.bias).clamp(min=0)
    assert z.shape == (2, 5)
    for name in told:
        gate: Any = exchange.gates[0][name]  # type: ignore[index]
        torch.testing.assert_close(found[name], 2 / (1 + (-(z @ gate.weight.T + gate.bias)).exp()))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 5, 3)])
def test_what_is_not_there_is_not_squeezed(shape):
    values, mask = torch.rand(shape), torch.tensor([[True] * 5, [True, True, False, False, False]])
    last = values.movedim(1, -1).mean(1) if len(shape) == 4 else values
    torch.testing.assert_close(squeezed(Hidden(values, mask)), torch.stack([last[0].mean(0), last[1, :2].mean(0)]))
    gates = torch.rand(2, 3)
    torch.testing.assert_close(squeezed(excited(Hidden(values, mask), gates)), squeezed(Hidden(values, mask)) * gates)


def test_at_first_encoders_are_as_without_exchange(wordpiece_file):
    model = built(THREE, wordpiece_file, told=False)
    without = copy.deepcopy(model)
    without.exchange = None
    batch = having(batch_of(model), {"image": [True, True, False, True], "text": [True] * 4, "audio": [False] * 4})
    with evaluating(model), evaluating(without):
        assert largest(model(batch), without(batch)) < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.booleans()] * 3), min_size=ROWS, max_size=ROWS))
def test_a_row_reads_what_it_has_and_no_other_row(wordpiece_file, some):
    model = three(wordpiece_file)
    present = {name: [bool(has[number]) for has in some] for number, name in enumerate(THREE)}
    batch = having(batch_of(model), present)
    other = {k: torch.where(_wide(batch.present[owner(k)], v), v, _other(v)) for k, v in batch.inputs.items()}
    with evaluating(model):
        whole, changed = model(batch), model(batch._replace(inputs=other))
        assert largest(whole, changed) == 0.0
        for number in range(ROWS):
            alone = model(row(batch, number))
            torch.testing.assert_close(alone.logits["kind"][0], whole.logits["kind"][number], rtol=1e-4, atol=1e-5)


def three(tokenizer_file: Path, kept: dict[str, Any] = {}) -> Any:  # noqa: B006 - built once
    if not kept:
        kept["model"] = built(THREE, tokenizer_file)
    return kept["model"]


def owner(name: str) -> str:
    return name.partition("_")[0]


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1))


def _other(values: Tensor) -> Tensor:
    return ~values if values.dtype == torch.bool else (values + 1) % 5


def tokens(model: Any, batch: Batch, path: str = "encoders.image") -> Tensor:
    with evaluating(model):
        return Tapped(copy.deepcopy(model), [path])(batch).features[path]


def test_what_one_reads_changes_the_others_where_it_is_there(wordpiece_file):
    model = built({"image": "convnet", "text": "small_transformer"}, wordpiece_file)
    batch = having(batch_of(model), {"image": [True] * 4, "text": [True, True, False, False]})
    changed = batch._replace(inputs={**batch.inputs, "text": (batch.inputs["text"] + 3) % 9})
    differs = (tokens(model, batch) != tokens(model, changed)).flatten(1).any(1)
    assert differs.tolist() == [True, True, False, False]


def test_a_modality_that_training_drops_tells_nothing(wordpiece_file):
    model = built({"image": "convnet", "text": "small_transformer"}, wordpiece_file, modality_dropout=0.5)
    batch = batch_of(model, 32)
    changed = batch._replace(inputs={**batch.inputs, "text": (batch.inputs["text"] + 3) % 9})
    model.training, found, dropped = True, [], {}
    for some in (batch, changed):
        torch.manual_seed(1)
        dropped = model.dropped(some.present)
        found.append(encode_exchanging(dict(model.encoders), model.exchange, some, dropped)["image"].tokens)
    differs = (found[0] != found[1]).flatten(1).any(1)
    assert 0 < int(differs.sum()) < 32
    assert torch.equal(differs, dropped["text"])
    answers = []
    for some in (batch, changed):
        torch.manual_seed(1)
        answers.append(model(some).logits["kind"])
    same = (answers[0] == answers[1]).all(1)
    assert torch.equal(same, ~dropped["text"])


def test_one_graph_answers_for_every_subset(wordpiece_file, tmp_path):
    model = three(wordpiece_file)
    export_onnx(model, batch_of(model, 3), tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx")
    subsets = list(product([True, False], repeat=3))
    batch = having(batch_of(model, 8), {name: [has[n] for has in subsets] for n, name in enumerate(THREE)})
    (found,) = session.run(["kind"], dict(feeds(batch)))
    with evaluating(model):
        assert float((torch.from_numpy(found) - model(batch).logits["kind"]).abs().max()) < 1e-5


def test_everything_learns(wordpiece_file):
    model = built({"image": "convnet", "text": "small_transformer"}, wordpiece_file).train()
    batch = having(batch_of(model), {"image": [True, True, True, False], "text": [True, True, False, True]})
    nn.functional.cross_entropy(model(batch).logits["kind"], torch.tensor([0, 1, 2, 0])).backward()
    assert not [name for name, p in model.exchange.named_parameters() if p.grad is None or not p.grad.abs().sum()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exchange": {"type": "mmtn", "at": [1]}}, r"student.exchange: unknown type 'mmtn'; did you mean 'mmtm'"),
        ({"exchange": {"type": "mmtm"}}, r"mmtm needs the parameter 'at'"),
        ({"encoders": {"image": "convnet"}}, r"one encoder, 'image', and nobody to tell"),
        (
            {"encoders": {"image": "convnet", "text": "text_cnn"}},
            r"text_cnn, which reads text, .*; use small_transformer",
        ),
        ({"fusion": None, "unimodal_heads": True}, r"student.exchange is for models with fusion"),
    ],
)
def test_what_cannot_exchange_is_refused(changes, said, wordpiece_file):
    encoders = changes.pop("encoders", {"image": "convnet", "text": "small_transformer"})
    config = ModelConfig.model_validate(settings_of(encoders, **changes))
    given = {"text": {"tokenizer_file": wordpiece_file}}
    with pytest.raises(UserError, match=said):
        check_model(config, ENCODERS, "student", ["kind"], given)


@pytest.mark.parametrize(
    ("at", "said"),
    [([], "rising"), ([0], "rising"), ([2, 2], "rising"), ([3], r"image has 2 stages; name none beyond")],
)
def test_stages_that_are_not_there_are_refused(at, said, wordpiece_file):
    with pytest.raises(UserError, match=rf"student.exchange: mmtm cannot be built: at is .*{said}"):
        built({"image": "convnet", "text": "small_transformer"}, wordpiece_file, exchange={"type": "mmtm", "at": at})


def test_members_of_an_ensemble_do_not_exchange(wordpiece_file):
    found = settings_of({"image": "convnet", "text": "small_transformer"}, members=2, objective=[])
    config = TeacherConfig.model_validate(found)
    with pytest.raises(UserError, match=r"teacher.exchange: members .* set teacher.members to 1"):
        check_model(config, ENCODERS, "teacher", ["kind"], {"text": {"tokenizer_file": wordpiece_file}})


@pytest.mark.parametrize("where", ["teacher.train", "prune.train"])
def test_encoders_that_exchange_are_not_split_over_ranks(where):
    recipe = load_recipe("middle_fusion", [f"{where}.shard=true"])
    with pytest.raises(UserError, match=rf"{where}.shard splits encoders as wholes, and an exchange runs their stages"):
        check_recipe(recipe, ENCODERS, INHERITANCES)
