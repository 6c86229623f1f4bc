"""Explanations: sums that have to come out, places that have to light up, and the page of a whole run."""

import base64
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import test_modalities
import tiny
import torch
from big_checkpoints import RATE, write_audio
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_project import distill, make_project, refusal
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from distill import explaining, pipeline
from distill.build import input_spec, told_by_data
from distill.contracts import CLEAN_VIEW, Artifact, Batch, UserError
from distill.data.loader import InputSpec, Loader
from distill.explain import Subject, explain_row, pictures
from distill.explain.attention import STAND_IN, attention_layers, attention_weights, fusion_attention
from distill.explain.gradients import TOLERANCE, grad_cam, integrated_gradients, last_map
from distill.explain.inside import cells, peaks, pieces
from distill.explain.scores import contributions, log_odds
from distill.explain.starts import NoStartError, Start, forward_from, starts_of
from distill.fusion import FUSIONS
from distill.multimodal import MultimodalModel
from distill.preprocess import Tokenizer
from distill.recipe import load_recipe
from distill.tasks import LinearHead
from students import ENCODERS, ConvNet
from teachers import PretrainedAudio, PretrainedText, PretrainedVision

READING = ("cross_attention", "self_attention", "bottleneck", "perceiver")


def forward_of(model, batch, modality, content=None, task="kind"):
    """The starts of a modality, and the log-odds of the answer as a function of them."""
    starts = starts_of(model.encoders[modality], batch.inputs_of(modality), modality, content=content)
    label = int(model(batch).logits[task].argmax())
    return starts, forward_from(model, batch, task, label, [start.place for start in starts])


def frozen(model):
    return model.eval().requires_grad_(False)


def test_log_odds_are_those_of_the_softmax():
    logits = torch.tensor([[2.0, -1.0, 0.5], [30.0, -30.0, 0.0]])
    p = logits.double().softmax(1)[:, 1]
    assert torch.allclose(log_odds(logits, 1), p.log() - (1 - p).log())
    assert torch.allclose(log_odds(logits + 7, 1), log_odds(logits, 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(2, 5))
def test_contributions_add_up_to_what_all_modalities_change(seed, num_present, num_classes):
    generator = torch.Generator().manual_seed(seed)
    said = {}
    names = ["image", "text", "audio", "series", "tabular"]

    def answer(chosen):
        return said.setdefault(frozenset(chosen), torch.randn(num_classes, generator=generator) * 3)

    found = contributions(answer, names[:num_present], names)
    assert len(found["subsets"]) == 2**num_present
    for key, chosen in (("nothing", frozenset()), ("+".join(names[:num_present]) or "nothing", names[:num_present])):
        assert found["subsets"][key] == pytest.approx(float(answer(chosen).double().softmax(0)[found["label"]]))
    for measure in ("probability", "log_odds"):
        one = found[measure]
        assert math.isclose(sum(one["values"].values()), one["all"] - one["nothing"], abs_tol=1e-9)
        assert abs(one["error"]) < 1e-9
        assert all(one["values"][name] == 0.0 for name in names[num_present:])


def test_contributions_of_an_additive_answer_are_its_parts():
    worth = {"image": 2.0, "text": -0.5}

    def answer(chosen):
        return torch.tensor([1 + sum(worth[name] for name in chosen), 0.0])

    found = contributions(answer, ["image", "text"], ["image", "text"])
    assert found["label"] == 0
    assert found["log_odds"]["values"] == pytest.approx(worth)


@pytest.mark.parametrize("fusion", ["concat", *READING])
def test_integrated_gradients_are_complete(wordpiece_file, fusion):
    model, batch = frozen(tiny.make_model(wordpiece_file, fusion=fusion)), tiny.make_batch(1)
    content = torch.tensor([False, True, True, True, False])
    for modality in ("image", "text"):
        starts, forward = forward_of(model, batch, modality, content)
        found = integrated_gradients(forward, starts)
        change = float(forward(starts[0].value) - forward(starts[0].baseline))
        assert found.change == pytest.approx(change, abs=1e-6) and change != 0
        assert float(found.values[0].sum()) == pytest.approx(change + found.error, abs=1e-5)
        assert abs(found.error) < max(TOLERANCE * abs(change), 2e-3)
    assert not found.values[0][~content].any() and found.values[0][content].any()


def test_integrated_gradients_of_a_product_are_known():
    """Of ``x y`` from 0 on, each factor gets half of the product."""
    starts = [Start(name, torch.tensor([[value]]), torch.zeros(1, 1), "") for name, value in (("x", 3.0), ("y", 4.0))]
    found = integrated_gradients(lambda x, y: (x * y)[:, 0], starts)
    assert [float(values) for values in found.values] == pytest.approx([6.0, 6.0])
    assert found.change == 12 and abs(found.error) < 1e-4 and found.steps == 32


def test_what_a_row_lacks_gets_nothing(wordpiece_file):
    model = frozen(tiny.make_model(wordpiece_file, fusion="cross_attention"))
    batch = tiny.make_batch(1)
    batch = batch._replace(present={**batch.present, "image": torch.zeros(1, dtype=torch.bool)})
    word_of = np.array([-1, 0, 1, 2, -1])
    explained = explain_row(Subject(model, batch, "kind", ["a", "b", "c"], word_of), list(tiny.KINDS))
    assert explained.numbers["contributions"]["log_odds"]["values"]["image"] == 0.0
    assert "lacks" in explained.numbers["inputs"]["image"]["why_not"]
    assert not [panel.name for panel in explained.panels if panel.name.startswith("image")]
    starts, forward = forward_of(model, batch, "image")
    found = integrated_gradients(forward, starts)
    assert found.change == 0 and not found.values[0].any()
    (image_reads, text_reads) = fusion_attention(model, batch)
    assert image_reads.reader == "image" and text_reads.shares == {f"image{STAND_IN}": pytest.approx(1), "image": 0}


def corner_model():
    """A ConvNet whose first channel is how red a place is, and a head that reads that channel alone."""
    encoder = ConvNet(widths=[2, 2], blocks=[0, 0])
    for stage in encoder.stages:
        convolution, norm = stage[0]
        nn.init.zeros_(convolution.weight)
        convolution.weight.data[0, 0, 1, 1] = 1.0
        norm.bias.data[1] = 0.1
    model = MultimodalModel(
        {"image": encoder},
        FUSIONS["pooled"](["image"]),
        {"kind": LinearHead(2, 2)},
        {},
        dim=2,
        embedding_dim=2,
    )
    model.heads["kind"].linear.weight.data = torch.tensor([[5.0, 0.0], [0.0, 0.0]])
    nn.init.zeros_(model.heads["kind"].linear.bias)
    return frozen(model)


def one_image(pixels):
    present = {"image": torch.ones(1, dtype=torch.bool)}
    return Batch(torch.zeros(1, dtype=torch.int64), torch.full((1,), CLEAN_VIEW), {"image": pixels}, present, {})


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 8), (8, 0), (8, 8)])
def test_the_corner_that_a_model_sees_lights_up(top, left):
    model = corner_model()
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    pixels[0, 0, top : top + 8, left : left + 8] = 255
    batch = one_image(pixels)
    starts, forward = forward_of(model, batch, "image")
    layer = last_map(model.encoders["image"], batch.inputs)
    heat = grad_cam(forward, layer, starts[0].value)
    assert heat.shape == (4, 4)
    inside = heat[top // 4 : top // 4 + 2, left // 4 : left // 4 + 2]
    assert float(inside.min()) > 0 and float(heat.sum()) == pytest.approx(float(inside.sum()))
    values = integrated_gradients(forward, starts).values[0]
    assert not values[1:].any(), "the model reads red alone"
    red = values[0, top : top + 8, left : left + 8]
    assert float(red.sum()) > 0 and float(red.sum()) == pytest.approx(float(values.clamp(min=0).sum()))


def test_patches_are_no_feature_map():
    """Of a vision transformer only the embedding of patches is a map, and its tokens are others."""

    class Patches(ConvNet):
        def forward(self, inputs):
            encoded = super().forward(inputs)
            return encoded._replace(tokens=encoded.tokens * 2)

    inputs = {"image": torch.randint(0, 255, (1, 3, 16, 16), dtype=torch.uint8)}
    assert last_map(frozen(Patches(widths=[2, 2], blocks=[0, 0])), inputs) is None
    assert last_map(frozen(ConvNet(widths=[2, 2], blocks=[0, 0])), inputs) is not None


def test_an_encoder_without_a_table_says_so(wordpiece_file):
    encoder = tiny.make_model(wordpiece_file).encoders["text"]
    weight = encoder.table.weight
    encoder.table = nn.Module()
    encoder.table.forward = lambda ids: weight[ids]
    with pytest.raises(NoStartError, match=r"no torch\.nn\.Embedding"):
        starts_of(encoder, tiny.make_batch(1).inputs_of("text"), "text", content=torch.ones(5, dtype=torch.bool))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["none", "bool", "float", "causal", "groups"]))
def test_attention_weights_are_those_of_the_operator(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    heads = 1 if kind == "groups" else 2
    q = torch.randn(1, 2, 4, 3, generator=generator)
    k, v = (torch.randn(1, heads, 4, 3, generator=generator) for _ in range(2))
    options = {"none": {}, "causal": {"is_causal": True}, "groups": {"enable_gqa": True}}.get(kind, {})
    if kind in ("bool", "float"):
        mask = torch.rand(4, 4, generator=generator) > 0.5
        mask[:, 0] = True
        options["attn_mask"] = mask if kind == "bool" else torch.where(mask, 0.0, -1e4)
    weights = attention_weights(q, k, v, **options)
    value = v.repeat_interleave(2 // heads, 1)
    assert torch.allclose(weights @ value, scaled_dot_product_attention(q, k, v, **options), atol=1e-5)


@pytest.mark.parametrize("fusion", READING)
def test_shares_of_attention_add_up_and_know_whose_tokens_they_are(wordpiece_file, fusion):
    model, batch = frozen(tiny.make_model(wordpiece_file, fusion=fusion)), tiny.make_batch(1)
    before = model(batch).logits["kind"]
    paid = fusion_attention(model, batch)
    assert paid and torch.equal(model(batch).logits["kind"], before), "hooks are gone"
    for one in paid:
        assert sum(one.shares.values()) == pytest.approx(1)
        for name, tokens in one.tokens.items():
            assert len(tokens) == {"image": 16, "text": 5}[name]
            assert float(tokens.sum()) == pytest.approx(one.shares[name], abs=1e-5)
    assert len(attention_layers(model, batch)) == len({one.layer for one in paid})
    without = batch._replace(present={**batch.present, "text": torch.zeros(1, dtype=torch.bool)})
    hidden = fusion_attention(model, without)
    assert all(one.shares.get("text", 0.0) == pytest.approx(0, abs=1e-6) for one in hidden)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 450))
def test_condensed_maps_keep_their_sum(height, width):
    plane = torch.randn(height, width, dtype=torch.float64)
    small = cells(plane)
    assert max(small.shape) <= 32 and torch.allclose(small.sum(), plane.sum())
    line = plane[0]
    assert len(pieces(line)) <= 200 and torch.allclose(pieces(line).sum(), line.sum())
    assert float(peaks(line).abs().max()) == float(line.abs().max())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), max_size=30))
def test_colours_keep_the_sign_and_the_order(values):
    heat = pictures.scaled(np.array(values))
    assert np.abs(heat).max(initial=0) <= 1 and np.array_equal(np.sign(heat), np.sign(values))
    colours = pictures.coloured(heat).astype(int)
    assert np.array_equal(colours[heat == 0], np.full((int((heat == 0).sum()), 3), 255))
    assert (colours[heat > 0.5][:, 0] > colours[heat > 0.5][:, 2]).all(), "red speaks for a class"
    assert (colours[heat < -0.5][:, 0] < colours[heat < -0.5][:, 2]).all(), "blue against it"


def test_bars_point_to_the_side_of_their_sign():
    drawn = np.asarray(pictures.bars({"for": 2.0, "against": -2.0})).astype(int)
    red, blue = ((drawn == colour).all(-1).nonzero()[1] for colour in (pictures.FOR, pictures.AGAINST))
    assert red.mean() > blue.mean() and pytest.approx(len(red), rel=0.05) == len(blue)
    assert pictures.matrix(["a"], ["b", "c"], np.array([[0.5, np.nan]])).height > 0


SIX = {
    "image": {"widths": [4, 8], "blocks": [0, 0]},
    "audio": {"widths": [4, 8], "blocks": [0, 0], "n_mels": 8},
    "video": {"widths": [4, 8], "blocks": [0, 0]},
    "series": {"widths": [4, 8], "blocks": [0, 0]},
    "tabular": {"dim": 8, "tokens": "columns"},
}
KINDS = {
    "image": "convnet",
    "audio": "audio_convnet",
    "video": "frame_convnet",
    "series": "series_convnet",
    "tabular": "tabular_mlp",
}


def test_each_of_six_modalities_is_explained(tmp_path, wordpiece_file):
    test_modalities.write_rows(tmp_path)
    _, data = test_modalities.opened(tmp_path)
    config = test_modalities.config()

    class Parts:
        encoders = {name: type("Part", (), {"type": KINDS[name]}) for name in SIX}  # noqa: RUF012

    told = told_by_data(Parts, ENCODERS, config)
    torch.manual_seed(0)
    encoders = {name: ENCODERS[KINDS[name]](**options, **told[name]) for name, options in SIX.items()}
    encoders["text"] = tiny.make_model(wordpiece_file).encoders["text"]
    model = frozen(tiny.around(encoders, fusion="self_attention"))
    loader = Loader(
        data,
        "test",
        {"m": InputSpec(tuple(SIX), wordpiece_file, 16)},
        batch_size=4,
        seed=0,
        augment=None,
        shuffle=False,
    )
    (place, *_) = (row for row in loader.row_positions if data.arrays["tabular"][row, -1])
    batch = loader.batch(np.array([place]), loader.clean_views(1))["m"]
    word_of = Tokenizer(wordpiece_file, 16).words([data.texts[int(place)]])[2][0]
    table = data.formats["tabular"]
    subject = Subject(model, batch, "kind", data.texts[int(place)].split(), word_of, (table.numbers, table.categories))
    explained = explain_row(subject, list(tiny.KINDS))
    sums = {}
    for name, one in explained.numbers["inputs"].items():
        found = one["integrated_gradients"]
        (key,) = found.keys() - {"baseline", "change", "error", "steps"}
        values = found[key]
        values = list(values.values()) if key == "columns" else values
        sums[name] = sum(v["value"] for v in values) if key == "words" else float(np.sum(values))
        assert sums[name] == pytest.approx(found["change"] + found["error"], abs=1e-4), name
        assert abs(found["error"]) <= max(0.1 * abs(found["change"]), 2e-3), name
        assert found["change"] != 0, name
    assert sums.keys() == {*SIX, "text"}
    columns = explained.numbers["inputs"]["tabular"]["integrated_gradients"]["columns"]
    assert columns.keys() == {"age", "pay", "kind"} and columns["kind"] != 0, "the row has a known category"
    spectrogram = np.array(explained.numbers["inputs"]["audio"]["integrated_gradients"]["cells"])
    assert spectrogram.shape == (8, 25), "bands, then frames"
    shown = {panel.name for panel in explained.panels if panel.picture or panel.words}
    media = {f"{name}-integrated-gradients" for name in ("image", "audio", "video", "series")}
    assert shown >= media | {"contributions", "image-grad-cam", "text", "tabular", "fusion-attention"}


def explained_tower(encoders, inputs, word_of=np.zeros(0, np.int64)):  # noqa: B008
    present = {name: torch.ones(1, dtype=torch.bool) for name in encoders}
    batch = Batch(torch.zeros(1, dtype=torch.int64), torch.full((1,), CLEAN_VIEW), inputs, present, {})
    torch.manual_seed(0)
    model = frozen(tiny.around(encoders))
    words = [f"w{number}" for number in range(int(word_of.max(initial=-1)) + 1)]
    return explain_row(Subject(model, batch, "kind", words, word_of), list(tiny.KINDS))


PIXELS = torch.randint(0, 256, (1, 3, tiny.SIZE, tiny.SIZE), generator=torch.Generator().manual_seed(0))
INPUTS = {
    "image": PIXELS.to(torch.uint8),
    "text": torch.tensor([[512, 3, 9, 40, 513]]),
    "text_mask": torch.ones(1, 5, dtype=torch.bool),
}


@pytest.mark.parametrize("projected", [False, True])
def test_towers_of_clip_are_explained_through(clip_folder, projected):
    options = {"weights": f"path:{clip_folder}", "projected": projected}
    encoders = {"image": PretrainedVision(**options), "text": PretrainedText(**options)}
    explained = explained_tower(encoders, INPUTS, np.array([-1, 0, 1, 1, -1]))
    for name, key in (("image", "cells"), ("text", "words")):
        found = explained.numbers["inputs"][name]["integrated_gradients"]
        assert found["change"] != 0 and abs(found["error"]) < max(TOLERANCE * abs(found["change"]), 1e-3)
        assert len(found[key]) == {"image": 16, "text": 2}[name]
    assert "no" in explained.numbers["inputs"]["image"]["grad_cam"]["why_not"]
    reads = explained.numbers["attention"]["encoders"]
    assert len(reads["image"]["tokens"]) == 5 and len(reads["text"]["tokens"]) == 5
    assert sum(reads["image"]["tokens"]) == pytest.approx(1)


@pytest.mark.parametrize(("kind", "key", "size"), [("ast", "cells", (32, 25)), ("wav2vec2", "pieces", (200,))])
def test_towers_of_sound_are_explained_at_their_own_front_end(tmp_path, kind, key, size):
    tower = PretrainedAudio(weights=f"path:{write_audio(tmp_path, kind)}", sample_rate=RATE, num_samples=8000)
    wave = (8000 * torch.sin(torch.arange(8000) * 0.2)).to(torch.int16)[None]
    explained = explained_tower({"audio": tower}, {"audio": wave, "audio_length": torch.tensor([6000])})
    found = explained.numbers["inputs"]["audio"]["integrated_gradients"]
    assert found["change"] != 0 and np.array(found[key]).shape == size
    assert np.sum(found[key]) == pytest.approx(found["change"] + found["error"], abs=1e-4)


def test_torchs_own_attention_is_watched_too():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model, x = frozen(Own()), torch.randn(1, 5, 8)
    (layer,) = attention_layers(model, x)
    assert layer.path == "attention"
    assert torch.allclose(layer.weights.mean(0), model.attention(x, x, x)[1][0], atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run up to its student: the baseline and what follows are not there."""
    folder = tmp_path_factory.mktemp("explained")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        answer = distill("train", "recipe.yaml", "teacher.train.epochs=1", "student.train.epochs=1")
        assert answer.code == 0, answer.err
    return folder


BUDGET = ("teacher.train.epochs=1", "student.train.epochs=1")


@pytest.fixture
def run_folder(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained / "runs/tiny"


def test_a_run_is_explained_on_one_page_that_loads_nothing(run_folder):
    manifests = {path: path.stat().st_mtime_ns for path in run_folder.glob("*/manifest.json")}
    answer = distill("explain", "recipe.yaml", *BUDGET, "--rows", "1053,1046")
    assert answer.code == 0, answer.err
    assert "explained: runs/tiny/explain/explain.html" in answer.out
    assert manifests == {path: path.stat().st_mtime_ns for path in run_folder.glob("*/manifest.json")}
    found = json.loads((run_folder / "explain/explain.json").read_text())
    assert found["task"] == "colour" and [row["id"] for row in found["rows"]] == [1053, 1046]
    page = (run_folder / "explain/explain.html").read_text()
    assert "<script" not in page and not re.findall(r'(?:src|href)="(?!data:)', page)
    inline = {base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)"', page)}
    assert {path.read_bytes() for path in (run_folder / "explain").glob("*.png")} == inline
    for row in found["rows"]:
        assert row["true"] in ("red", "green", "blue") and row["text"] in page
        for name in ("teacher", "student"):
            one = row["models"][name]
            gradients = [one["inputs"][m]["integrated_gradients"] for m in ("image", "text")]
            assert all(abs(g["error"]) < max(0.1 * abs(g["change"]), 5e-3) for g in gradients)
            assert [word["word"] for word in gradients[1]["words"]] == row["text"].split()
            assert abs(one["contributions"]["log_odds"]["error"]) < 1e-9
            assert (run_folder / "explain" / one["pictures"][0]).is_file()
        teacher, student = (row["models"][name]["attention"] for name in ("teacher", "student"))
        assert teacher["fusion"] and "text" in teacher["encoders"], "the frozen tower ran"
        assert "operator" in student["why_not"]


def test_a_run_is_found_by_its_folder_and_answers_as_it_was_evaluated(run_folder, tmp_path):
    answer = distill("explain", run_folder, "--models", "student", "--task", "shape", "--output", tmp_path, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["path"] == str(tmp_path) and found["models"] == ["student"] and len(found["rows"]) == 6
    recipe = load_recipe("recipe.yaml", BUDGET)
    done = {item.stage.name: item.artifact for item in pipeline.plan(recipe) if item.artifact}
    work = pipeline.workspace(recipe, done)
    model = work.model("student")
    (batch, *_) = [each["student"] for each in work.clean_loader("test", input_spec(model), "student").epoch(0)]
    with torch.no_grad():
        likely = dict(zip(batch.ids.tolist(), model(batch).logits["shape"].softmax(1).amax(1).tolist(), strict=True))
    for row in found["rows"]:
        assert row["models"]["student"]["probability"] == pytest.approx(likely[row["id"]], abs=1e-5)


def test_by_default_those_of_teacher_and_student_that_are_there():
    recipe = load_recipe("quickstart")
    done = {name: Artifact(name, Path(name), "") for name in ("data", "teacher", "vocabulary", "inherit")}
    assert explaining.choose_models([], done, recipe, "r") == ["teacher"]
    both = done | {"student": done["data"]}
    assert explaining.choose_models([], both, recipe, "r") == ["teacher", "student"]
    with pytest.raises(UserError, match="make it with `distill cache r`"):
        explaining.choose_models([], {}, recipe, "r")
    with pytest.raises(UserError, match="the student has no fusion and so answers no task"):
        explaining.choose_models(["student"], both, load_recipe("retrieval"), "r")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--models", "pruned"), "the pruned is not there yet"),
        (("--models", "baseline"), "make it with `distill export recipe.yaml teacher.train.epochs=1 student."),
        (("--models", "studnt"), "no model 'studnt'; did you mean 'student'"),
        (("--rows", "1000"), "1000 is the id of no test row; they begin with"),
        (("--rows", "1,x"), "'x' is no row id"),
        (("--task", "colr"), "task 'colr' is unknown; did you mean 'colour'"),
        (("seed=5",), "the teacher is not there yet, or was made with other settings"),
    ],
)
def test_mistakes_are_told_in_one_sentence(run_folder, options, said):
    assert said in refusal(distill("explain", "recipe.yaml", *BUDGET, *options))


def test_without_captum_one_sentence_says_what_to_install(run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    said = refusal(distill("explain", "recipe.yaml", *BUDGET))
    assert said == "explanations need the package captum; pip install 'multidistill[explain]'"
