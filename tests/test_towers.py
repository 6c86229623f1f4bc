"""Kept outputs of frozen towers: equal to the live tower, encoded once, resumable, and put into the right batch."""

import numpy as np
import pytest
import torch
from tiny import AUGMENT, NO_TEXT, around

from distill.build import input_spec
from distill.contracts import CLEAN_VIEW, TEST, TRAIN, VALID, UserError
from distill.data.loader import Loader
from distill.data_config import TextAugment
from distill.progress import silent
from distill.ranks import Ranks
from distill.towers import Rows, TowerOutputs, WithTowers, encode_towers, frozen_towers
from students import ConvNet
from teachers import PretrainedText, PretrainedVision

KEY = {"towers": "aa"}
VIEWS = (0, 1)


@pytest.fixture(scope="module")
def models(bert_folder, clip_folder):
    """Teachers with one and with two frozen towers, and with none."""
    bert, clip = f"path:{bert_folder}", f"path:{clip_folder}"
    torch.manual_seed(0)
    made = {
        "text": {"image": ConvNet(widths=[4], blocks=[0]), "text": PretrainedText(weights=bert, max_length=8)},
        "both": {"image": PretrainedVision(weights=clip), "text": PretrainedText(weights=clip, max_length=16)},
        "none": {
            "image": PretrainedVision(weights=clip, freeze=False),
            "text": PretrainedText(weights=bert, freeze=False),
        },
    }
    return {name: around(encoders, fusion="cross_attention").eval() for name, encoders in made.items()}


def loader_of(prepared, model, split=TRAIN, *, clean=False, **options):
    spec = {"teacher": input_spec(model)}
    augment, shuffle = (None, False) if clean else (AUGMENT, True)
    defaults = {"batch_size": 16, "seed": 0, "augment": augment, "views": len(VIEWS), "shuffle": shuffle}
    return Loader(prepared, split, spec, **(defaults | options))


def encode(prepared, model, folder, report=silent):
    sources = [Rows(loader_of(prepared, model, split, clean=True), CLEAN_VIEW) for split in (TRAIN, VALID, TEST)]
    sources += [Rows(loader_of(prepared, model), view) for view in VIEWS]
    by_tower = dict.fromkeys(frozen_towers(model), sources)
    return encode_towers(model, by_tower, folder, reads="teacher", key=KEY, report=report, ranks=Ranks())


def with_towers(loader, model, folder):
    return WithTowers(loader, {name: TowerOutputs(folder / name, KEY) for name in frozen_towers(model)}, "teacher")


@pytest.mark.parametrize("kind", ["text", "both"])
@pytest.mark.parametrize("split", [TRAIN, VALID])
def test_a_model_says_the_same_with_kept_towers_as_with_live_ones(prepared, models, tmp_path, kind, split):
    model = models[kind]
    encode(prepared, model, tmp_path)
    loader = loader_of(prepared, model, split, clean=split == VALID)
    kept = with_towers(loader, model, tmp_path)
    assert len(kept) == len(loader)
    for epoch in range(3):
        for live, filled in zip(loader.epoch(epoch), kept.epoch(epoch), strict=True):
            batch = filled["teacher"]
            assert {f"{name}_encoded" for name in frozen_towers(model)} <= set(batch.inputs)
            assert not set(frozen_towers(model)) & set(batch.inputs)
            assert torch.equal(batch.ids, live["teacher"].ids)
            with torch.no_grad():
                expected, found = model(live["teacher"]), model(batch)
            for part in ("logits", "embeddings"):
                for name, value in getattr(expected, part).items():
                    torch.testing.assert_close(getattr(found, part)[name], value, rtol=5e-3, atol=5e-3, msg=name)


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["text", "both"])
def test_towers_without_memory_read_inputs_in_parts(prepared, models, tmp_path, monkeypatch, caplog, kind):
    model = models[kind]
    encode(prepared, model, tmp_path / "whole")
    for tower in (PretrainedText, PretrainedVision):

        def limited(self, first, *rest, whole=tower.encode):
            if len(first) > 10:
                raise MemoryError
            return whole(self, first, *rest)

        monkeypatch.setattr(tower, "encode", limited)
    encode(prepared, model, tmp_path / "parts")
    assert "out of memory in the teacher: it now reads batches in 8 parts" in caplog.text
    one, two = (with_towers(loader_of(prepared, model), model, tmp_path / name) for name in ("whole", "parts"))
    for first, second in zip(one.epoch(1), two.epoch(1), strict=True):
        with torch.no_grad():
            expected, found = model(first["teacher"]), model(second["teacher"])
        for name, value in expected.logits.items():  # tokens behind a text's end, which nothing reads, may differ
            torch.testing.assert_close(found.logits[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_texts_that_repeat_are_encoded_for_the_views_before_they_do(prepared, models, tmp_path):
    model = models["text"]
    twice = AUGMENT.model_copy(update={"text": TextAugment(word_dropout=0.5, views=2)})
    sources = [Rows(loader_of(prepared, model, augment=twice), view) for view in range(2)]
    encode_towers(model, {"text": sources}, tmp_path, reads="teacher", key=KEY, report=silent, ranks=Ranks())
    kept = WithTowers(
        loader_of(prepared, model, augment=twice, views=None),
        {"text": TowerOutputs(tmp_path / "text", KEY, 2)},
        "teacher",
    )
    for live, filled in zip(kept.loader.epoch(5), kept.epoch(5), strict=True):
        with torch.no_grad():
            expected, found = model(live["teacher"]), model(filled["teacher"])
        torch.testing.assert_close(found.logits["kind"], expected.logits["kind"], rtol=5e-3, atol=5e-3)


def test_augmented_views_are_kept_apart(prepared, models, tmp_path):
    model = models["both"]
    encode(prepared, model, tmp_path)
    kept = with_towers(loader_of(prepared, model), model, tmp_path)
    rows = kept.row_positions[:8]
    inputs = [kept.batch(rows, torch.full((8,), view))["teacher"].inputs for view in (CLEAN_VIEW, *VIEWS)]
    for one, other in ((0, 1), (1, 2)):
        difference = inputs[one]["image_encoded"] - inputs[other]["image_encoded"]
        assert difference.abs().max() > 1e-2
    mixed = torch.tensor([0, 1] * 4)
    together = kept.batch(rows, mixed)["teacher"].inputs
    for place, view in enumerate(mixed.tolist()):
        alone = inputs[1 + view]
        torch.testing.assert_close(together["image_encoded"][place], alone["image_encoded"][place])


def test_epochs_beyond_the_kept_views_read_them_again(prepared, models, tmp_path):
    model = models["text"]
    encode(prepared, model, tmp_path)
    loader = loader_of(prepared, model)
    views = [set(batch["teacher"].views.tolist()) for epoch in range(4) for batch in loader.epoch(epoch)]
    assert set().union(*views) == set(VIEWS)
    list(with_towers(loader, model, tmp_path).epoch(3))


def test_each_distinct_text_is_encoded_once(prepared, models, tmp_path):
    model = models["text"]
    rows = []
    inner = model.encoders["text"].encode

    def counting(text, mask):
        rows.extend(tuple(row[keep].tolist()) for row, keep in zip(text, mask, strict=True))
        return inner(text, mask)

    model.encoders["text"].encode = counting
    try:
        info = encode(prepared, model, tmp_path)["text"]
    finally:
        del model.encoders["text"].encode
    inputs = len(prepared) + len(VIEWS) * len(prepared.rows(TRAIN))
    assert info["inputs"] == inputs and info["distinct"] == len(rows) == len(set(rows)) < inputs
    assert info["bytes"] > 0 and info["seconds"] >= 0


def test_every_view_of_every_image_is_encoded(prepared, models, tmp_path):
    info = encode(prepared, models["both"], tmp_path)["image"]
    assert info["distinct"] == info["inputs"] == len(prepared) + len(VIEWS) * len(prepared.rows(TRAIN))


def test_encoding_again_encodes_nothing(prepared, models, tmp_path):
    model = models["both"]
    encode(prepared, model, tmp_path)
    inner = {name: model.encoders[name].encode for name in model.encoders}
    try:
        for name in inner:
            model.encoders[name].encode = lambda *args: pytest.fail("encoded again")
        encode(prepared, model, tmp_path)
    finally:
        for name in inner:
            del model.encoders[name].encode


def test_a_row_without_text_has_outputs_too(prepared, models, tmp_path):
    """An absent text is a row of no tokens, or of the frame alone: its tower outputs must exist and stay finite."""
    model = models["text"]
    encode(prepared, model, tmp_path)
    kept = with_towers(loader_of(prepared, model, clean=True), model, tmp_path)
    batch = kept.batch(np.array([NO_TEXT]), torch.tensor([CLEAN_VIEW]))["teacher"]
    assert not batch.present["text"].any()
    with torch.no_grad():
        assert torch.isfinite(model(batch).logits["kind"]).all()


def test_a_split_of_absent_texts_only_is_encoded(prepared, models, tmp_path):
    from dataclasses import replace

    bare = replace(
        prepared, texts=[""] * len(prepared), present={**prepared.present, "text": np.zeros(len(prepared), bool)}
    )
    model = models["text"]
    encode(bare, model, tmp_path)
    for batches in with_towers(loader_of(bare, model), model, tmp_path).epoch(0):
        with torch.no_grad():
            assert torch.isfinite(model(batches["teacher"]).logits["kind"]).all()


def test_outputs_of_another_teacher_are_refused(prepared, models, tmp_path):
    encode(prepared, models["text"], tmp_path)
    with pytest.raises(UserError, match="towers"):
        TowerOutputs(tmp_path / "text", {"towers": "bb"})


def test_a_trainable_tower_is_not_kept(models, prepared, tmp_path):
    assert frozen_towers(models["none"]) == [] and frozen_towers(models["text"]) == ["text"]
    assert frozen_towers(models["both"]) == ["image", "text"]
    assert encode(prepared, models["none"], tmp_path) == {}
