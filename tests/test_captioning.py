"""Captions: the decoder, what it writes, how it is measured, and a run from a table to a report and a bundle."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_project import distill, make_captioning

from distill import captions
from distill.contracts import IGNORE, Batch
from distill.data.batches import Batches
from distill.data.prepared import PreparedData
from distill.evaluate import read_arrays
from distill.fusion import ConcatFusion
from distill.fusion.base import masked_mean
from distill.losses import token_cross_entropy, token_kd
from distill.multimodal import Encoded, Encoder, MultimodalModel
from distill.predict import load
from distill.results import shown_alike
from distill.runs import read_json
from distill.targets import CAPTIONING, FIRST, LAST, PAD, Task
from distill.tasks import CaptionHead
from distill.tasks.captioning import sinusoids
from distill.writing import Retold, targets_of

VOCABULARY, LENGTH, DIM = 11, 5, 16


def made(seed=0, rows=4, tokens=3):
    """A decoder in eval mode and something to read; a part of it is masked."""
    torch.manual_seed(seed)
    head = CaptionHead(DIM, VOCABULARY, length=LENGTH, depth=2, heads=2).eval()
    for parameter in head.parameters():  # sharper than it begins
        torch.nn.init.normal_(parameter, std=0.5)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[1:, -1] = False
    return head, (torch.randn(rows, DIM), torch.randn(rows, tokens, DIM), mask, torch.arange(tokens))


@torch.no_grad()
def log_probability(head, read, caption):
    """Of one caption [L] for each row, under teacher forcing."""
    targets = targets_of(caption[None].expand(len(read[0]), -1))
    each = head(*read, targets).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (each * (targets != IGNORE)).sum(1)


@pytest.mark.parametrize("seed", range(3))
def test_writing_takes_the_token_that_teacher_forcing_finds_most_probable(seed):
    head, read = made(seed)
    with torch.no_grad():
        written = head(*read, None)
        logits = head(*read, targets_of(written))
    known = targets_of(written) != IGNORE
    assert written.shape == (4, LENGTH) and (written[known] == logits.argmax(-1)[known]).all()
    assert (written[~known] == PAD).all()


def test_a_position_reads_no_later_token_and_nothing_that_is_masked():
    head, (fused, tokens, mask, places) = made()
    targets = torch.tensor([[5, 6, 7, LAST, IGNORE]]).expand(4, -1)
    other = targets.clone()
    other[:, 2] = 9
    changed = tokens.clone()
    changed[~mask] = 7.0
    with torch.no_grad():
        one, two, three = (
            head(fused, tokens, mask, places, targets),
            head(fused, tokens, mask, places, other),
            head(fused, changed, mask, places, targets),
        )
    torch.testing.assert_close(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3], two[:, 3])
    torch.testing.assert_close(one, three)


def test_what_is_written_depends_on_the_order_of_what_is_read():
    head, (fused, tokens, mask, places) = made()
    targets = torch.tensor([[5, 6, 7, LAST, IGNORE]]).expand(4, -1)
    with torch.no_grad():
        one, two = (
            head(fused, tokens, mask, places, targets),
            head(fused, tokens.flip(1), mask.flip(1), places, targets),
        )
    assert (one - two).abs().amax((1, 2)).min() > 1e-2


class Given(Encoder):
    """An encoder whose tokens are the input."""

    def __init__(self, name):
        super().__init__()
        self.reads, self.out_dim = name, DIM

    def forward(self, inputs):
        tokens, mask = inputs[self.reads], inputs.get("text_mask", torch.ones(4, 3, dtype=torch.bool))
        return Encoded(tokens, mask[:, : tokens.shape[1]], masked_mean(tokens, mask[:, : tokens.shape[1]]))


@torch.no_grad()
@pytest.mark.parametrize("order", [("text", "image"), ("image", "text")])
def test_padding_of_one_modality_moves_no_other(order):
    torch.manual_seed(0)
    head = CaptionHead(DIM, VOCABULARY, length=LENGTH, depth=1, heads=2)
    encoders = {name: Given(name) for name in order}
    model = MultimodalModel(encoders, ConcatFusion(list(order), DIM), {"words": head}, {}, dim=DIM, embedding_dim=4)
    model.eval()
    text, image = torch.randn(4, 5, DIM), torch.randn(4, 3, DIM)
    targets = {"words": torch.tensor([[5, 6, 7, LAST, IGNORE]]).expand(4, -1)}
    said = []
    for padding in (0, 4):
        mask = torch.nn.functional.pad(torch.ones(4, 5, dtype=torch.bool), (0, padding))
        padded = torch.nn.functional.pad(text, (0, 0, 0, padding), value=7.0)
        there = {name: torch.ones(4, dtype=torch.bool) for name in order}
        inputs = {"text": padded, "text_mask": mask, "image": image}
        batch = Batch(torch.arange(4), torch.zeros(4, dtype=torch.int64), inputs, there, targets)
        said.append(model(batch).logits["words"])
    torch.testing.assert_close(*said)


@pytest.mark.parametrize(("count", "dim"), [(1, 8), (9, 8), (5, 7)])
def test_places_have_vectors_of_their_own(count, dim):
    vectors = sinusoids(torch.arange(count), dim)
    assert vectors.shape == (count, dim) and vectors.unique(dim=0).shape == (count, dim)
    half = (dim + 1) // 2
    for place in range(count):
        for number in range(dim):
            angle = place / 10000 ** ((number % half) / half)
            expected = math.sin(angle) if number < half else math.cos(angle)
            assert vectors[place, number] == pytest.approx(expected, abs=1e-5)


def test_one_beam_writes_as_the_most_probable_next_token_does():
    head, read = made(1)
    memory = head.read(*read)
    assert torch.equal(head.beam_search(memory, beams=1), head.write(memory))


def test_as_many_beams_as_captions_find_the_best_one():
    torch.manual_seed(3)
    head = CaptionHead(8, 6, length=3, depth=1, heads=1).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    read = (torch.randn(5, 8), torch.randn(5, 2, 8), torch.ones(5, 2, dtype=torch.bool), torch.arange(2))
    found = head.beam_search(head.read(*read), beams=216, penalty=0.0)
    everything = itertools.product(range(6), repeat=3)
    whole = {tuple(targets_of(torch.tensor([c]))[0].tolist()): torch.tensor(c) for c in everything}
    scores = torch.stack([log_probability(head, read, caption) for caption in whole.values()])
    best = scores.max(0).values
    own = torch.stack([log_probability(head, read, found[row])[row] for row in range(5)])
    torch.testing.assert_close(own, best)


def test_more_beams_do_not_find_a_less_probable_caption_than_greedy_on_average():
    head, read = made(7, rows=16)
    memory = head.read(*read)
    one, four = (head.beam_search(memory, beams=beams, penalty=0.0) for beams in (1, 4))
    means = [
        torch.stack([log_probability(head, read, caption)[row] for row, caption in enumerate(found)]).mean()
        for found in (one, four)
    ]
    assert means[1] >= means[0]


def test_losses_are_means_over_tokens_and_then_over_captions():
    torch.manual_seed(0)
    ours, theirs = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    targets = torch.tensor([[4, 5, LAST, IGNORE], [LAST, IGNORE, IGNORE, IGNORE], [IGNORE] * 4])
    ce = [torch.nn.functional.cross_entropy(ours[row, :n], targets[row, :n]).item() for row, n in ((0, 3), (1, 1))]
    assert token_cross_entropy(ours, targets) == pytest.approx(sum(ce) / 2, abs=1e-6)
    student, teacher = (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1)
    each = (teacher.exp() * (teacher - student)).sum(-1)
    kl = [each[row, :n].mean().item() for row, n in ((0, 3), (1, 1))]
    assert token_kd(ours, theirs, targets, temperature=2.0) == pytest.approx(4 * sum(kl) / 2, abs=1e-5)
    assert token_kd(ours, ours, targets) == pytest.approx(0, abs=1e-6)


TRUE = ["red heart", "a cat with wry smile", "face with tears of joy", "a cat"]
TRUE += ["grinning face with smiling eyes", "red circle"]
ALONE = [[caption] for caption in TRUE]
WRITTEN = ["red heart", "a cat with smile", "face with tears of joy", "a a cat cat", "smiling face", "blue circle"]


def test_cider_is_that_of_the_authors_code():
    """The figures were computed with cider_scorer.py of pycocoevalcap 1.2 (CIDEr-D, n = 4, sigma = 6)."""
    expected = [5.0, 4.20030877, 10.0, 2.12316566, 1.3782806, 1.50703649]
    assert 10 * captions.cider(WRITTEN, ALONE) == pytest.approx(expected, abs=1e-7)


def test_measures_of_several_true_captions_are_those_of_the_authors_code():
    """The figures were computed with pycocoevalcap 1.2: CIDEr-D as above, BLEU with the closest length."""
    cat = ["a cat with wry smile", "a smiling cat", "cat"]
    true = [
        cat,
        cat,
        ["red heart"],
        ["face with tears of joy", "a face that laughs"],
        ["red circle", "a big red circle"],
    ]
    ours = ["a smiling cat", "a cat with smile", "blue heart", "face with tears of joy", "a red circle"]
    expected = [3.36630596, 2.16016375, 1.5362427, 5.35034788, 3.5322418]
    assert 10 * captions.cider(ours, true) == pytest.approx(expected, abs=1e-7)
    assert captions.bleu(ours, true, 1) == pytest.approx(0.941176470532872, abs=1e-6)
    assert captions.bleu(ours, true, 4) == pytest.approx(0.7614269731715568, abs=1e-6)
    assert captions.exact(ours, true).tolist() == [True, False, False, True, False]


def test_rows_that_show_the_same_share_their_captions():
    task = Task(CAPTIONING, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "cat", "heart"), length=3)
    ids = np.array([[4, 5, LAST], [4, 6, LAST], [5, LAST, IGNORE]])
    assert captions.references(task, ids) == [["red cat"], ["red heart"], ["cat"]]
    together = captions.references(task, ids, np.array([7, 2, 7]))
    assert together == [["red cat", "cat"], ["red heart"], ["red cat", "cat"]]


def test_other_measures_of_captions():
    assert captions.exact(WRITTEN, ALONE).tolist() == [True, False, True, False, False, False]
    assert captions.bleu(TRUE, ALONE, 1) == 1 and 0 < captions.bleu(WRITTEN, ALONE, 1) < 1
    assert captions.cider(["", "x"], [["a b"], ["c d"]]).tolist() == [0, 0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefg"), min_size=4, max_size=7), min_size=2, max_size=6, unique_by=tuple))
def test_only_the_true_caption_has_the_highest_cider(words):
    true = [" ".join(each) for each in words]
    alone = [[each] for each in true]
    own = captions.cider(true, alone)
    turned = captions.cider(true[1:] + true[:1], alone)
    assert (own <= 1 + 1e-9).all() and (turned <= own + 1e-9).all()


def test_ids_become_words():
    task = Task(CAPTIONING, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "he", "##art", "##s"), length=5)
    assert task.text(np.array([4, 5, 6, LAST, 4])) == "red heart"
    assert task.text(np.array([5, 6, 7, IGNORE, IGNORE])) == "hearts"
    assert task.text(np.array([LAST, 4.0, 4.0])) == "" and task.text(np.array([6, PAD, 4])) == "##art"
    assert FIRST not in (PAD, LAST)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The tiny project, whose captions are written from the images alone."""
    folder = tmp_path_factory.mktemp("captioning")
    recipe = make_captioning(folder)
    answer = distill("run", recipe, f"output={folder / 'runs'}")
    assert answer.code == 0, answer.err
    return folder / "runs" / "tiny", answer


def test_a_run_writes_and_measures_captions(finished):
    folder, answer = finished
    report = read_json(folder / "report" / "report.json")
    models = {model["name"]: model["quality"]["words"] for model in report["models"]}
    for quality in models.values():
        assert {"cider", "ci95", "exact_match", "bleu1", "bleu4", "agreement_with_teacher"} <= quality.keys()
    assert models["teacher"]["bleu1"] > 0.4  # "a", and mostly "big" or "small", at the least
    assert models["onnx-fp32"]["cider"] == pytest.approx(models["pruned"]["cider"])
    assert "CIDEr-D" in answer.out
    assert report["parity"]["onnx-fp32"]["logits.words"]["agreement"] == 1
    rows = report["written"]["words"]
    assert len(rows) == 2 and {"teacher", "baseline", "student"} < rows[0]["answers"].keys()
    assert all(row["true"].startswith("a ") and row["image"].startswith("data:image/png") for row in rows)
    assert rows[1]["true"] in (folder / "report" / "report.md").read_text()
    assert "exact match" in (folder / "report" / "report.md").read_text()
    assert "token accuracy" in (folder / "report" / "report.html").read_text()


def test_taps_are_listed_before_there_are_data(finished, tmp_path):
    recipe = finished[0].parents[1] / "recipe.yaml"
    answer = distill("inspect", recipe, f"output={tmp_path}")
    assert answer.code == 0 and "encoders.image" in answer.out, answer.err


def test_prepared_captions(finished):
    data = PreparedData.open(finished[0] / "data")
    task = data.tasks["words"]
    assert task.kind == CAPTIONING and task.length == 7 and data.targets["words"].shape == (96, 7)
    written = {task.text(row) for row in data.targets["words"]}
    parts = itertools.product(("big", "small"), ("red", "green", "blue"), ("sun", "moon", "cat"))
    assert written == {f"a {' '.join(part)}" for part in parts}
    assert (data.targets["words"] == LAST).sum(1).tolist() == [1] * 96


def test_a_bundle_writes_what_its_source_writes(finished):
    folder, _ = finished
    bundle = load(folder / "export" / "onnx-fp32")
    images = sorted((folder.parents[1] / "images").iterdir())[:6]
    answers = [row["words"]["text"] for row in bundle.predict([{"image": image} for image in images])]
    assert all(answer.startswith("a ") for answer in answers)
    said = distill("predict", folder / "export" / "onnx-fp32", "--image", images[0])
    assert said.code == 0 and f"words: {answers[0]}" in said.out.splitlines()
    assert "3 closes a caption" in (folder / "export" / "onnx-fp32" / "README.md").read_text()


class Fixed(Batches):
    """One batch of rows 3, 5, 8, 9, whose captions all are token 4."""

    workers = 0

    def __len__(self):
        return 1

    def at(self, epoch, number):
        targets = {"words": torch.tensor([[4, LAST, IGNORE]] * 4), "colour": torch.arange(4)}
        return {"student": Batch(torch.tensor([3, 5, 8, 9]), torch.zeros(4).long(), {}, {}, targets)}


def test_rows_are_told_the_captions_of_their_ids_and_others_keep_theirs():
    ids, captions = np.array([5, 9, 11]), {"words": np.array([[6, 7, LAST], [8, LAST, PAD], [9, 9, 9]])}
    batch = Retold(Fixed(), ids, captions, 1.0, 0).at(0, 0)["student"]
    expected = [[4, LAST, IGNORE], [6, 7, LAST], [4, LAST, IGNORE], [8, LAST, IGNORE]]
    assert batch.targets["words"].tolist() == expected and batch.targets["colour"].tolist() == [0, 1, 2, 3]
    assert (
        Retold(Fixed(), ids[:0], {"words": captions["words"][:0]}, 1.0, 0)
        .at(0, 0)["student"]
        .targets["words"]
        .eq(Fixed().at(0, 0)["student"].targets["words"])
        .all()
    )


def test_a_share_of_rows_is_told_and_a_larger_share_holds_a_smaller_one():
    ids, captions = np.arange(1000), {"words": np.full((1000, 3), LAST)}
    told = {share: set(Retold(Fixed(), ids, captions, share, 7)._ids.tolist()) for share in (0.2, 0.5, 1.0)}
    assert told[0.2] < told[0.5] < told[1.0] == set(range(1000))
    assert 150 < len(told[0.2]) < 250
    assert set(Retold(Fixed(), ids, captions, 0.2, 8)._ids.tolist()) != told[0.2]


def test_a_teacher_writes_captions_that_the_student_learns(finished):
    folder, _ = finished
    recipe = folder.parents[1] / "recipe.yaml"
    wanted = ("cache.enabled=false", "cache.captions={beams: 3, share: 0.5}", "student.train.epochs=1")
    answer = distill("train", recipe, *wanted, f"output={folder.parent}", "--force", "cache")
    assert answer.code == 0, answer.err
    arrays = read_arrays(folder / "cache" / "captions.safetensors")
    data = PreparedData.open(folder / "data")
    assert arrays["ids"].tolist() == data.ids[data.rows("train")].tolist() and arrays["words"].shape == (72, 7)
    task = data.tasks["words"]
    assert all(task.text(row).startswith("a ") for row in arrays["words"])
    again = distill("train", recipe, *wanted, f"output={folder.parent}")
    assert again.code == 0 and "write captions" not in again.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher.members=2", "captions of several members have no mean"),
        ("student.heads.words={type: linear}", "linear is not for a captioning; use decoder"),
        ("student.heads.colour={type: decoder}", "decoder is not for a classification; use linear"),
        (
            "student.objective.0={loss: token_kd, task: colour}",
            "token_kd is for captioning, and task 'colour' is a class",
        ),
        ("student.objective.0={loss: token_cross_entropy, task: words.image}", "no task 'words.image'"),
        ("cache.captions={}", "token_kd compares under the captions that the student is told"),
        ("data.targets.words.vocab_size=20", "the characters of the training texts alone take"),
    ],
)
def test_wrong_recipes_are_told_in_a_sentence(finished, change, message, tmp_path):
    recipe = finished[0].parents[1] / "recipe.yaml"
    verb = ("run",) if change.startswith("data.") else ("validate",)
    answer = distill(*verb, recipe, change, f"output={tmp_path}")
    assert answer.code == 2 and message in " ".join(answer.err.split()), answer.err


def test_rows_with_one_image_show_the_same(finished):
    data = PreparedData.open(finished[0] / "data")
    rows = data.rows("test")
    shown = shown_alike(data, rows)
    assert len(np.unique(shown)) == len(rows)  # every drawing is another one
    twice = data.codes["image"].copy()
    twice[rows[1]] = twice[rows[0]]
    again = shown_alike(replace(data, codes={"image": twice}), rows)
    assert again[0] == again[1] and len(np.unique(again)) == len(rows) - 1
    assert shown_alike(replace(data, present={**data.present, "series": data.present["image"]}), rows) is None
