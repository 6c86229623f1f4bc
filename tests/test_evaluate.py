"""Predictions of a split: from torch and from a bundle, subsets of modalities, accuracy, and what is kept on disk."""

import numpy as np
import pytest
import torch
from tiny import NO_KIND, NUM_CLASSES, SPLIT_ROWS, make_batch, make_loader, make_model

from distill import evaluate
from distill.contracts import IGNORE, TEST, Batch, UserError
from distill.evaluate import (
    clean_batches,
    feeds,
    final_logits,
    only,
    predict_bundle,
    predict_torch,
    validation_scores,
)
from distill.formats.audio import AudioFormat
from distill.formats.image import ImageFormat
from distill.results import with_blanks
from distill.targets import CLASSIFICATION, Task

ROWS = SPLIT_ROWS["test"]


@pytest.fixture
def model(wordpiece_file):
    return make_model(wordpiece_file, dropout=0.5, modality_dropout=0.5)


@pytest.fixture
def batches(prepared, wordpiece_file):
    loader = make_loader(prepared, wordpiece_file, split=TEST, shuffle=False, augment=None, batch_size=7)
    return clean_batches(loader, "student")


def test_predictions_are_the_eval_modes_in_order_of_id(model, batches, prepared):
    model.train()
    arrays = predict_torch(model, batches)
    assert set(arrays) == {f"logits.{task}" for task in NUM_CLASSES} and model.training
    assert all(array.shape == (ROWS, NUM_CLASSES[n.split(".")[1]]) for n, array in arrays.items())
    assert all(array.dtype == np.float32 for array in arrays.values())
    model.eval()
    ids = torch.cat([batch.ids for batch in batches()])
    assert ids.tolist() == sorted(prepared.ids[prepared.rows(TEST)].tolist())
    with torch.no_grad():
        expected = torch.cat([model(batch).logits["kind"] for batch in batches()])
    np.testing.assert_array_equal(arrays["logits.kind"], expected.numpy())


def test_subsets_are_the_logits_with_one_modality_present(model, batches):
    arrays = predict_torch(model, batches, subsets=("image", "text"))
    expected = {f"subset.{name}.{task}" for name in ("image", "text") for task in NUM_CLASSES}
    assert set(arrays) == expected | {f"logits.{task}" for task in NUM_CLASSES}
    model.eval()
    with torch.no_grad():
        alone = torch.cat([model(only(batch, "text")).logits["tone"] for batch in batches()])
    np.testing.assert_array_equal(arrays["subset.text.tone"], alone.numpy())
    assert not np.allclose(arrays["subset.text.tone"], arrays["subset.image.tone"])
    assert not np.allclose(arrays["subset.text.tone"], arrays["logits.tone"])


def test_progress_counts_rows(model, batches):
    seen = []
    predict_torch(model, batches, report=lambda done, total, *note: seen.append(done))
    assert seen == [7, 14, 21, 24]


def test_final_logits_leave_out_single_modality_heads(model):
    assert set(final_logits(model(make_batch()))) == set(NUM_CLASSES)


class Bundle:
    """Stands for a bundle on its runtime: keeps what it was fed."""

    def __init__(self, model):
        self.model, self.fed = model.eval(), []

    def run(self, arrays):
        self.fed.append(arrays)
        rows = len(arrays["image"])
        return {
            "kind": np.full((rows, 3), len(self.fed), np.float64),
            "tone": np.zeros((rows, 2), np.float32),
            "embedding_fused": np.zeros((rows, 6), np.float32),
        }


def test_a_bundle_is_fed_the_same_rows_under_the_graphs_names(model, batches):
    bundle = Bundle(model)
    arrays = predict_bundle(bundle, batches)
    assert set(arrays) == {"logits.kind", "logits.tone"} and arrays["logits.kind"].dtype == np.float32
    assert arrays["logits.kind"][:, 0].tolist() == [1] * 7 + [2] * 7 + [3] * 7 + [4] * 3
    for fed, batch in zip(bundle.fed, batches(), strict=True):
        assert set(fed) == {"image", "text", "text_mask", "image_present", "text_present"}
        assert fed["image"].dtype == np.uint8 and fed["text"].dtype == np.int64 and fed["text_mask"].dtype == bool
        np.testing.assert_array_equal(fed["image"], batch.inputs["image"].numpy())
    assert set(feeds(make_batch())) == set(bundle.fed[0])


TASKS = {"kind": Task(CLASSIFICATION, ("a", "b", "c")), "tone": Task(CLASSIFICATION, ("x", "y"))}


class Answers(torch.nn.Module):
    """Says the right kind, and always the first tone."""

    def forward(self, batch):
        kind = torch.nn.functional.one_hot(batch.targets["kind"].clamp(min=0), 3).float()
        tone = torch.tensor([[1.0, 0.0]]).expand(len(batch.ids), 2)
        return evaluate.Outputs({"kind": kind, "tone": tone, "kind.image": -kind}, {}, {})


def test_accuracy_is_the_mean_over_tasks(batches, prepared):
    scores = validation_scores(Answers(), batches, TASKS)
    tone = (prepared.targets["tone"][prepared.rows(TEST)] == 0).mean()
    assert scores["valid/kind_accuracy"] == 1 and scores["valid/tone_accuracy"] == pytest.approx(tone)
    assert scores["valid/accuracy"] == pytest.approx((1 + tone) / 2)


def test_rows_without_a_label_do_not_count(prepared, wordpiece_file):
    loader = make_loader(prepared, wordpiece_file, shuffle=False, augment=None)
    assert prepared.targets["kind"][NO_KIND] == IGNORE
    assert validation_scores(Answers(), clean_batches(loader, "student"), TASKS)["valid/kind_accuracy"] == 1


def test_a_task_without_labels_is_left_out_and_none_at_all_is_refused():
    batch = make_batch()
    bare = torch.full((6,), IGNORE)
    some = batch._replace(targets={"kind": batch.targets["kind"], "tone": bare})
    scores = validation_scores(Answers(), lambda: iter([some]), TASKS)
    assert scores == {"valid/kind_accuracy": 1.0, "valid/accuracy": 1.0}
    none = batch._replace(targets={"kind": bare, "tone": bare})
    with pytest.raises(UserError, match="no validation row has a label"):
        validation_scores(Answers(), lambda: iter([none]), TASKS)


def test_arrays_come_back_from_disk(tmp_path):
    arrays = {"ids": np.arange(5), "logits.kind": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32).T}
    evaluate.write_arrays(tmp_path / "teacher.safetensors", arrays)
    found = evaluate.read_arrays(tmp_path / "teacher.safetensors")
    assert found.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_texts_alone_are_read_beside_blanks_of_every_other_modality():
    formats = {"image": ImageFormat(8), "audio": AudioFormat(8000, 0.5)}
    ids, text = torch.arange(2), torch.ones(2, 3, dtype=torch.int64)
    batch = Batch(ids, ids, {"text": text}, {"text": torch.ones(2, dtype=torch.bool)}, {})
    inputs = with_blanks(batch, formats).inputs
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "image": (2, 3, 8, 8),
        "audio": (2, 4000),
        "audio_length": (2,),
        "text": (2, 3),
    }
    assert inputs["audio"].dtype == torch.int16 and not inputs["image"].any() and inputs["text"] is text
