"""The multimodal model: subsets, masks, modality dropout, taps, frozen towers, and single modalities."""

import pytest
import torch
from tiny import NUM_CLASSES, TASKS, around, make_batch, make_model

from distill.batch_parts import take
from distill.build import build_model, check_model, example_batch, input_spec
from distill.config import ModelConfig
from distill.contracts import Outputs, UserError
from distill.data_config import DataConfig
from distill.evaluate import only
from distill.multimodal import OneModality, evaluating
from distill.tapped import Tapped
from students import ENCODERS
from teachers import PretrainedText, PretrainedVision, TimmEncoder

FUSIONS = ["concat", "cross_attention"]

DATA = DataConfig(
    source={"type": "table", "path": "rows.csv"}, modalities={"image": "image", "text": "text"}, working_size=16
)


@pytest.fixture(params=FUSIONS)
def model(request, wordpiece_file):
    return make_model(wordpiece_file, fusion=request.param).eval()


def absent(batch, modality, rows=slice(None)):
    mask = batch.present[modality].clone()
    mask[rows] = False
    return batch._replace(present={**batch.present, modality: mask})


def test_outputs_have_a_head_a_task_and_a_modality(model):
    outputs = model(make_batch())
    expected = {f"{task}{suffix}" for task in NUM_CLASSES for suffix in ("", ".fused", ".image", ".text")}
    assert set(outputs.logits) == expected
    assert all(logits.shape == (6, NUM_CLASSES[name.split(".")[0]]) for name, logits in outputs.logits.items())
    assert {name: value.shape for name, value in outputs.embeddings.items()} == dict.fromkeys(
        ("image", "text", "fused"), (6, 6)
    )
    assert outputs.features == {}


@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_content_of_an_absent_modality_does_not_reach_the_logits(model, modality):
    batch, other = absent(make_batch(), modality), make_batch(seed=1)
    names = ["image"] if modality == "image" else ["text"]
    swapped = batch._replace(inputs=batch.inputs | {name: other.inputs[name] for name in names})
    one, two = model(batch), model(swapped)
    for task in NUM_CLASSES:
        assert torch.equal(one.logits[task], two.logits[task])
    assert torch.equal(one.embeddings["fused"], two.embeddings["fused"])
    assert torch.equal(one.logits[f"kind.{modality}"], two.logits[f"kind.{modality}"])
    assert not torch.equal(model(make_batch()).logits["kind"], one.logits["kind"])


def test_with_nothing_present_every_row_gets_the_same_finite_answer(model):
    logits = model(absent(absent(make_batch(), "image"), "text")).logits["kind"]
    assert torch.isfinite(logits).all() and torch.allclose(logits, logits[:1])


def test_padding_of_texts_has_no_influence(model):
    batch = make_batch()
    mask = batch.inputs["text_mask"]
    junk = batch.inputs["text"].masked_fill(~mask, 33)
    longer = {
        "text": torch.nn.functional.pad(junk, (0, 3), value=9),
        "text_mask": torch.nn.functional.pad(mask, (0, 3), value=False),
    }
    expected, found = model(batch), model(batch._replace(inputs=batch.inputs | longer))
    for part in ("logits", "embeddings"):
        for name, value in getattr(expected, part).items():
            torch.testing.assert_close(getattr(found, part)[name], value, rtol=1e-5, atol=1e-6)


def test_only_keeps_one_modality(model):
    batch = make_batch()
    alone = only(batch, "text")
    assert not alone.present["image"].any() and alone.present["text"].all()
    assert torch.equal(model(alone).logits["kind"], model(absent(batch, "image")).logits["kind"])
    lacking = only(absent(batch, "text", 2), "text")
    assert not lacking.present["text"][2]  # what a row lacks does not come back
    assert batch.present["image"].all()


def test_modality_dropout_acts_in_training_only(wordpiece_file):
    batch = make_batch(rows=400)
    model = make_model(wordpiece_file, modality_dropout=0.5)
    torch.manual_seed(0)
    dropped = torch.stack(list(model.dropped(batch.present).values()), dim=1)
    assert dropped.any(dim=1).all()  # never both
    lost = (~dropped).float().mean(dim=0)
    assert 0.17 < lost[0] < 0.33 and 0.17 < lost[1] < 0.33
    model.eval()
    assert all(mask.all() for mask in model.dropped(batch.present).values())
    assert torch.equal(model(batch).logits["kind"], model(batch).logits["kind"])


def test_modality_dropout_leaves_rows_that_have_one_modality_alone(wordpiece_file):
    batch = absent(make_batch(rows=100), "image", slice(0, 50))
    model = make_model(wordpiece_file, modality_dropout=0.9)
    dropped = model.dropped(batch.present)
    assert dropped["text"][:50].all() and not dropped["image"][:50].any()
    assert (~dropped["text"][50:]).any()
    assert batch.present["text"].all()  # the batch itself, which losses read, is unchanged


def test_taps_read_modules_and_their_means(model):
    paths = ["encoders.image.stages.1", "encoders.image.stages:mean", "encoders.text.table:mean", "necks.text"]
    batch = make_batch()
    tapped = Tapped(model, paths)
    features = tapped(batch).features
    assert list(features) and set(features) == set(paths)
    assert features["encoders.image.stages.1"].shape == (6, 8, 4, 4)
    torch.testing.assert_close(
        features["encoders.image.stages:mean"], features["encoders.image.stages.1"].mean(dim=(2, 3))
    )
    assert features["encoders.text.table:mean"].shape == (6, 8) and features["necks.text"].shape == (6, 12)
    other = tapped(make_batch(seed=1)).features
    assert not torch.equal(other["necks.text"], features["necks.text"])
    assert features["necks.text"].requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_towers_that_refuse_empty_batches_answer_one(bert_folder, clip_folder, training):
    """A rank may have no row of a batch."""
    text, image = PretrainedText(weights=f"path:{bert_folder}"), PretrainedVision(weights=f"path:{clip_folder}")
    model = around({"image": image.thaw() or image, "text": text.thaw() or text}).train(training)
    taps = ["encoders.image", "encoders.text", "necks.text", "encoders.text:mean"]
    batch = make_batch()
    for rows in (torch.arange(0), torch.arange(1)):
        some = take(batch, rows)
        outputs = Tapped(model, taps)(some)
        assert all(len(value) == len(rows) for part in outputs for value in part.values())
    imageless = batch._replace(inputs=batch.inputs | {"image": batch.inputs["image"][:0]})
    imageless = imageless._replace(present=batch.present | {"image": torch.zeros(6, dtype=torch.bool)})
    outputs = Tapped(model, taps)(imageless)
    assert all(len(value) == 6 and bool(value.isfinite().all()) for part in outputs for value in part.values())
    outputs.logits["kind"].sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert grads and all(bool(gradient.isfinite().all()) for gradient in grads)


def test_a_tap_keeps_what_a_module_said_though_the_next_one_writes_into_it():
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, values):
            return Outputs({"kind": self.inner(values)}, {}, {})

    values = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    said = Tapped(Model(), ["inner.0"])(values).features["inner.0"]
    assert torch.equal(said, inner[0](values)) and bool((said < 0).any())


def test_a_tap_leaves_the_outputs_as_they_are(model):
    batch = make_batch()
    plain = model(batch)
    tapped = Tapped(model, ["fusion"])(batch)
    assert all(torch.equal(tapped.logits[name], plain.logits[name]) for name in plain.logits)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("encoders.image.stage.1", "no module 'encoders.image.stage.1'; did you mean 'encoders.image.stages"),
        ("encoders.image.stages:max", "the only reduction is ':mean'"),
    ],
)
def test_an_unknown_tap_is_refused(model, path, message):
    with pytest.raises(UserError, match=message):
        Tapped(model, [path])


def test_a_frozen_tower_stays_in_eval_mode_and_keeps_its_state(bert_folder):
    text = PretrainedText(weights=f"path:{bert_folder}")
    image = TimmEncoder(name="resnet18", size=32, freeze=True)
    model = around({"image": image, "text": text}).train()
    assert model.training and model.fusion.training
    assert not any(module.training for tower in (text.tower, image.net) for module in tower.modules())
    before = {name: value.clone() for name, value in model.encoders.state_dict().items()}
    model(make_batch()).logits["kind"].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.encoders.state_dict().items())
    assert all(parameter.grad is None for parameter in model.encoders.parameters())


def test_evaluating_puts_the_mode_back(model):
    for mode in (True, False):
        model.train(mode)
        with evaluating(model) as inside:
            assert not inside.training and not model(make_batch()).logits["kind"].requires_grad
        assert model.training is mode
    model.train()
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training


def config(wordpiece_file, **changes):
    text = {"type": "static_embeddings", "tokenizer_file": str(wordpiece_file), "vocab_size": 80, "dim": 8}
    image = {"type": "convnet", "widths": [4, 8], "blocks": [0, 1]}
    base = {"encoders": {"image": image, "text": text}, "fusion": {"type": "concat", "dim": 12}}
    return ModelConfig.model_validate(base | changes)


def test_a_config_becomes_a_model_that_reads_its_own_example(wordpiece_file):
    model = build_model(config(wordpiece_file), ENCODERS, TASKS, "student")
    outputs = model.eval()(example_batch(input_spec(model), DATA))
    assert outputs.logits["kind"].shape == (3, 3) and outputs.embeddings["fused"].shape == (3, 128)


def test_one_modality_and_chosen_heads(wordpiece_file):
    changed = config(wordpiece_file, heads={"kind": {"type": "linear", "dropout": 0.1}}, unimodal_heads=False)
    model = build_model(changed, ENCODERS, TASKS, "student")
    assert set(model.eval()(make_batch()).logits) == {"kind"}
    alone = ModelConfig.model_validate(
        changed.model_dump() | {"encoders": {"image": changed.encoders["image"].model_dump()}}
    )
    image_only = build_model(alone, ENCODERS, TASKS, "student")
    spec = input_spec(image_only)
    assert spec.media == ("image",) and spec.tokenizer is None
    assert set(image_only.eval()(example_batch(spec, DATA)).embeddings) == {"image", "fused"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoders": {"image": {"type": "convnett"}}},
            "student.encoders.image: unknown type 'convnett'; did you mean",
        ),
        ({"encoders": {"image": {"type": "convnet", "widths": [4]}}}, "convnet needs the parameter 'blocks'"),
        ({"fusion": {"type": "concatt", "dim": 3}}, "student.fusion: unknown type 'concatt'; did you mean 'concat'"),
        ({"fusion": {"type": "concat"}}, "student.fusion: concat needs the parameter 'dim'"),
        ({"heads": {"kid": {"type": "linear"}}}, "the data has no task 'kid'; did you mean 'kind'"),
        ({"heads": {"kind": {"type": "linear", "drop": 1}}}, "no parameter 'drop'; did you mean 'dropout'"),
    ],
)
def test_a_part_that_is_wrong_is_refused_before_building(wordpiece_file, changes, message):
    with pytest.raises(UserError, match=message):
        check_model(config(wordpiece_file, **changes), ENCODERS, "student", list(NUM_CLASSES), {})


def test_a_value_that_a_builder_refuses_names_the_place(wordpiece_file):
    wrong = config(wordpiece_file, encoders={"image": {"type": "convnet", "widths": [4, 8], "blocks": [1]}})
    with pytest.raises(UserError, match=r"student.encoders.image: convnet cannot be built: widths has 2 stages"):
        build_model(wrong, ENCODERS, TASKS, "student")


def test_logits_are_the_mean_of_the_heads_that_have_their_modality(model):
    batch = make_batch()
    for rows, names in ((batch, ("fused", "image", "text")), (only(batch, "text"), ("fused", "text"))):
        with torch.no_grad():
            logits = model(rows).logits
        expected = torch.stack([logits[f"kind.{name}"] for name in names]).mean(0)
        torch.testing.assert_close(logits["kind"], expected)


def test_one_modality_answers_as_the_model_does_and_shares_its_parameters(wordpiece_file):
    model = make_model(wordpiece_file).eval()
    alone = OneModality(model, "image")
    batch = make_batch(4)
    with torch.no_grad():
        expected, found = model(batch).logits, alone(batch).logits
    assert sorted(found) == ["kind", "kind.image", "tone", "tone.image"]
    for task in ("kind", "tone"):
        torch.testing.assert_close(found[task], expected[f"{task}.image"])
    assert {id(p) for p in alone.parameters()} < {id(p) for p in model.parameters()}
