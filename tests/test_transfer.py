"""The transfer set: how its texts are made, and how its rows come into batches."""

import re
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import WORDS, make_batch, make_loader, make_model, write_clip
from tiny_project import distill, make_project

from distill.batch_parts import take
from distill.cache import flatten
from distill.contracts import CLEAN_VIEW, IGNORE, Outputs, UserError
from distill.data.loader import InputSpec, Loader
from distill.data.mixed import (
    LABELLED,
    TRANSFER,
    MixedLoader,
    as_data,
    join_batches,
    join_outputs,
)
from distill.data.transfer import replace_words, whole_words
from distill.tapped import Tapped

TEXTS = [f"{first} {second}, the moon" for first in ("cat", "dog", "sun") for second in ("dark", "light", "red")]


def test_words_are_those_a_tokenizer_keeps_whole(wordpiece_file):
    assert whole_words(wordpiece_file) == sorted(word for word in WORDS if len(word) >= 3)


def test_a_vocabulary_without_words_is_refused(tmp_path):
    write_clip(tmp_path)
    with pytest.raises(UserError, match=r"no word is a token of its own.*set it to 0"):
        whole_words(tmp_path / "tokenizer.json")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("abc ,:", min_size=1), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99))
def test_texts_keep_their_shape_and_repeat_with_their_seed(texts, probability, seed):
    made = replace_words(texts, ["new", "other"], 8, probability=probability, seed=seed)
    assert made == replace_words(texts, ["new", "other"], 8, probability=probability, seed=seed)
    shapes = {re.sub(r"\w+", "w", text) for text in texts}
    assert len(made) == 8 and {re.sub(r"\w+", "w", text) for text in made} <= shapes


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_words_are_replaced_with_the_given_probability(probability, expected):
    made = replace_words(["one two three four"], ["new"], 1000, probability=probability, seed=0)
    assert np.mean([word == "new" for text in made for word in text.split()]) == pytest.approx(expected, abs=0.03)


@pytest.fixture
def make_mixed(prepared, wordpiece_file):
    """Training batches of 16 labelled rows and 5 of the transfer set, for two models."""

    def make(reads="student", workers=0) -> MixedLoader:
        names = ("student", "teacher")
        specs = dict.fromkeys(names, InputSpec((), wordpiece_file, 16))
        transfer = as_data(TEXTS, prepared)
        extra = Loader(transfer, "train", specs, batch_size=5, seed=0, augment=None, shuffle=True, workers=workers)
        return MixedLoader(make_loader(prepared, wordpiece_file, names, workers=workers), extra, reads, pad_id=0)

    return make


def test_transfer_rows_are_text_without_label_behind_the_labelled_rows(make_mixed, prepared, wordpiece_file):
    alone = next(make_loader(prepared, wordpiece_file).epoch(0))["student"]
    batches = next(make_mixed().epoch(0))
    assert sorted(batches) == [
        "student",
        *(f"{name}{kind}" for name in ("student", "teacher") for kind in (LABELLED, TRANSFER)),
    ]
    batch, labelled, count = batches["student"], batches["student" + LABELLED], len(alone.ids)
    assert len(batch.ids) == count + 5
    assert labelled.ids.equal(alone.ids) and not labelled.inputs
    torch.testing.assert_close(batch.inputs["image"][:count], alone.inputs["image"])
    assert not batch.inputs["image"][count:].any()
    assert batch.present["text"][count:].all() and not batch.present["image"][count:].any()
    assert (batch.ids[count:] > int(prepared.ids.max())).all() and (batch.views[count:] == CLEAN_VIEW).all()
    for task, labels in batch.targets.items():
        assert (labels[count:] == IGNORE).all() and labels[:count].equal(alone.targets[task])
    for rows, part in ((slice(0, count), alone), (slice(count, None), batches["teacher" + TRANSFER])):
        width = part.inputs["text"].shape[1]
        assert batch.inputs["text"][rows, :width].equal(part.inputs["text"])
        assert not batch.inputs["text_mask"][rows, width:].any()


def test_a_mixed_epoch_goes_on_at_any_batch(make_mixed):
    loader = make_mixed()
    whole = [batches["student"].ids.tolist() for epoch in range(3) for batches in loader.epoch(epoch)]
    for number in range(len(whole)):
        epoch, start = divmod(number, len(loader))
        rest = [batches["student"].ids.tolist() for batches in make_mixed().epoch(epoch, start)]
        assert rest == whole[number : (epoch + 1) * len(loader)]


def test_every_text_is_read_equally_often(make_mixed, prepared):
    loader = make_mixed()
    passes = len(loader.transfer)  # batches of the transfer set in one pass; as many epochs are whole passes
    first = int(prepared.ids.max()) + 1
    seen = [i for epoch in range(passes) for batches in loader.epoch(epoch) for i in batches["student"].ids.tolist()]
    counts = np.bincount([i - first for i in seen if i >= first], minlength=len(TEXTS))
    assert counts.tolist() == [len(loader)] * len(TEXTS)


def test_closing_an_epoch_ends_both_loaders(make_mixed):
    epoch = make_mixed(workers=1).epoch(0)
    assert len(list(islice(epoch, 2))) == 2
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    epoch.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_texts_are_padded_with_the_readers_padding():
    long, short = make_batch(4, 7), make_batch(3, 4)
    joined = join_batches(short, long, pad_id=9)
    assert (joined.inputs["text"][:3, 4:] == 9).all() and not joined.inputs["text_mask"][:3, 4:].any()
    assert joined.inputs["text"][3:].equal(long.inputs["text"])


def test_outputs_that_only_one_part_has_are_zero_in_the_other():
    both = Outputs({"kind": torch.ones(2, 3)}, {"text": torch.ones(2, 4)}, {"tap": torch.ones(2, 5)})
    less = Outputs({"kind": torch.ones(3, 3)}, {"text": torch.ones(3, 4)}, {})
    joined = join_outputs(both, less)
    assert joined.logits["kind"].equal(torch.ones(5, 3))
    assert joined.features["tap"].equal(torch.cat([torch.ones(2, 5), torch.zeros(3, 5)]))


def test_rows_without_a_modality_do_not_touch_its_encoder(wordpiece_file):
    """Neither values, taps nor the statistics of batch norm change when rows without an image are added."""
    path = "encoders.image.stages:mean"
    images = make_batch(6)
    texts = make_batch(5, seed=1)
    texts = texts._replace(present={**texts.present, "image": torch.zeros(5, dtype=torch.bool)})
    alone, mixed = make_model(wordpiece_file).train(), make_model(wordpiece_file).train()
    expected = Tapped(alone, [path])(images)
    found = Tapped(mixed, [path])(join_batches(images, texts, pad_id=0))
    torch.testing.assert_close({name: value[:6] for name, value in found.logits.items()}, expected.logits)
    torch.testing.assert_close(found.features[path][:6], expected.features[path])
    assert not found.features[path][6:].any()
    torch.testing.assert_close(mixed.state_dict(), alone.state_dict())


def without_images(batch):
    """Rows of texts alone, as a transfer set has them."""
    inputs = {name: value for name, value in batch.inputs.items() if name != "image"}
    absent = {**batch.present, "image": torch.zeros(len(batch.ids), dtype=torch.bool)}
    return batch._replace(inputs=inputs, present=absent)


@pytest.mark.parametrize("missing", [[], [1, 5], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("training", [True, False])
def test_inputs_may_end_before_the_batch(wordpiece_file, missing, training):
    """The same values, taps, gradients and statistics as with blank images in their place."""
    path = "encoders.image.stages:mean"
    images, texts = make_batch(6), without_images(make_batch(5, seed=1))
    images.present["image"][missing] = False
    short = join_batches(images, texts, pad_id=0)
    blank = torch.zeros(5, *images.inputs["image"].shape[1:], dtype=torch.uint8)
    full = short._replace(inputs={**short.inputs, "image": torch.cat([images.inputs["image"], blank])})
    assert len(short.inputs["image"]) == 6 and len(short.inputs["text"]) == len(short.ids) == 11
    found = []
    for batch in (short, full):
        model = make_model(wordpiece_file).train(training)
        outputs = Tapped(model, [path])(batch)
        sum(value.square().sum() for kind in outputs for value in kind.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((outputs, gradients, model.state_dict()))
    torch.testing.assert_close(*found)


def test_parts_of_a_batch_whose_images_end_early():
    """Rows keep their images, wherever a part is cut."""
    images, texts = make_batch(6), without_images(make_batch(5, seed=1))
    joined = join_batches(images, texts, pad_id=0)
    for rows in ([0, 4, 8], [6, 10], list(range(11))):
        part = take(joined, torch.tensor(rows))
        kept = [row for row in rows if row < 6]
        assert part.inputs["image"].equal(images.inputs["image"][kept])
        assert part.inputs["text"].equal(joined.inputs["text"][rows]) and part.ids.tolist() == joined.ids[rows].tolist()


def test_a_batch_needs_no_input_that_no_row_has(wordpiece_file):
    model = make_model(wordpiece_file, fusion="cross_attention").eval()
    batch = make_batch(4)
    absent = {**batch.present, "image": torch.zeros(4, dtype=torch.bool)}
    inputs = {name: value for name, value in batch.inputs.items() if name != "image"}
    with torch.no_grad():
        expected = model(batch._replace(present=absent)).logits
        found = model(batch._replace(present=absent, inputs=inputs)).logits
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("transfer"))


def train(recipe, name, *overrides):
    output = recipe.parent / "runs"
    extra = ["transfer.texts=30", "cache.dtype=float32", f"output={output}", f"name={name}", *overrides]
    answer = distill("train", recipe, *extra)
    assert answer.code == 0, answer.err
    return output / name


def test_cached_and_live_teacher_give_the_same_student_with_a_transfer_set(recipe):
    cached, live = train(recipe, "cached"), train(recipe, "live", "cache.enabled=false")
    weights = [load_file(run / "student" / "model.safetensors") for run in (cached, live)]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    plain = load_file(train(recipe, "plain", "transfer.texts=0") / "student" / "model.safetensors")
    assert any(not torch.allclose(plain[name], value, atol=1e-3) for name, value in weights[0].items())


NO_TEXT = ["student.encoders={image: {type: convnet, widths: [8], blocks: [0]}}", "student.inherit={}"]
NO_TEACHER = ["student.objective=[{loss: cross_entropy, task: colour}]"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (NO_TEXT, "the student has no text"),
        (NO_TEACHER, "no term of student.objective learns from the teacher"),
        (["transfer.replace=0"], "transfer.replace"),
        (["transfer.ratio=3"], "a batch takes 48 of them"),
    ],
)
def test_a_transfer_set_that_nobody_can_use_is_refused(recipe, overrides, sentence):
    answer = distill("validate", recipe, "transfer.texts=30", *overrides)
    assert answer.code == 2 and sentence in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
def test_what_an_absent_row_gets_does_not_depend_on_its_batch(wordpiece_file, fusion):
    """Whether some, all or none of the other rows have an image, or no image is given at all."""
    path = "encoders.image.stages:mean"
    tapped = Tapped(make_model(wordpiece_file, fusion=fusion).eval(), [path])
    some = torch.tensor([True, False, True, False])
    batch = make_batch(4)
    batch = batch._replace(present={**batch.present, "image": some})
    nobody = batch._replace(present={**batch.present, "image": torch.zeros(4, dtype=torch.bool)})
    with torch.no_grad():
        mixed, alone = tapped(batch), tapped(nobody)
    for name, value in flatten(mixed).items():
        torch.testing.assert_close(flatten(alone)[name][~some], value[~some])


def test_a_batch_without_images_leaves_batch_statistics_alone(wordpiece_file):
    model = make_model(wordpiece_file).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    batch = make_batch(4)
    outputs = model(batch._replace(present={**batch.present, "image": torch.zeros(4, dtype=torch.bool)}))
    assert model.encoders["image"].training
    assert all(value.equal(before[name]) for name, value in model.named_buffers())
    sum(value.sum() for value in outputs.logits.values()).backward()
    assert all(parameter.grad is not None for parameter in model.encoders["image"].parameters())


def test_a_teacher_that_saw_rows_without_images_has_a_cache_that_opens(recipe):
    """The check after filling reads other batches than the filling did."""
    rows = (recipe.parent / "rows.csv").read_text(encoding="utf-8").splitlines()
    emptied = [re.sub(r"images/\d+\.png", "", row) if number % 3 == 1 else row for number, row in enumerate(rows)]
    table = recipe.parent / "gaps.csv"
    table.write_text("\n".join(emptied), encoding="utf-8")
    output = recipe.parent / "runs"
    answer = distill("cache", recipe, f"data.source.path={table}", f"output={output}", "name=gaps", "cache.views=8")
    assert answer.code == 0, answer.err
