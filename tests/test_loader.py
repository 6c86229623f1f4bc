"""Batches: the order, the slices of ranks, resumption, views, and inputs equal to what ``predict`` feeds."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FileTokenizer
from tokenizers import models, pre_tokenizers, processors

from distill.contracts import CLEAN_VIEW, IGNORE, Batch, UserError
from distill.data import tokens
from distill.data.loader import InputSpec, Loader
from distill.data.order import TwoLevelOrder
from distill.data.prepared import PreparedData
from distill.data_config import AugmentConfig
from distill.formats.image import ImageFormat
from distill.preprocess import Preprocessor, Tokenizer
from distill.targets import CLASSIFICATION, Task

WORDS = ["red", "green", "blue", "cat", "dog", "sun", "moon"]
AUGMENT = AugmentConfig.model_validate({"image": {"flip": 0.5, "shift": 2}, "text": {"word_dropout": 0.4}})
NUM_TRAIN, NUM_TEST = 37, 5


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    vocab = {word: code for code, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = FileTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    random = np.random.default_rng(0)
    total = NUM_TRAIN + NUM_TEST
    texts = [" ".join(random.choice(WORDS, random.integers(1, 6))) for _ in range(total)]
    texts[3] = ""
    images = random.integers(0, 256, (total, 3, 8, 8), dtype=np.uint8)
    images[4] = 0
    return PreparedData(
        folder=tmp_path_factory.mktemp("data"),
        ids=random.permutation(total).astype(np.int64) * 3,
        split=np.array(["train"] * NUM_TRAIN + ["test"] * NUM_TEST),
        groups=np.arange(total),
        texts=texts,
        codes={"image": np.arange(total)},
        arrays={"image": images},
        present={"image": np.arange(total) != 4, "text": np.array([text != "" for text in texts])},
        targets={"label": np.where(np.arange(total) == 6, IGNORE, np.arange(total) % 3)},
        tasks={"label": Task(CLASSIFICATION, ("a", "b", "c"))},
    )


@pytest.fixture(scope="module")
def specs(tokenizer_file):
    return {
        "teacher": InputSpec(("image",), tokenizer_file, 8),
        "student": InputSpec(("image",), tokenizer_file, 4, pad_id=3),
    }


def make(data, specs, split="train", **options):
    defaults = {"batch_size": 8, "seed": 0, "augment": AUGMENT, "shuffle": True}
    return Loader(data, split, specs, **(defaults | options))


def ids_of(batches) -> list[int]:
    return [row for batch in batches for row in batch["teacher"].ids.tolist()]


def assert_equal(one: Batch, other: Batch) -> None:
    assert torch.equal(one.ids, other.ids) and torch.equal(one.views, other.views)
    for name in ("inputs", "present", "targets"):
        first, second = getattr(one, name), getattr(other, name)
        assert list(first) == list(second)
        assert all(torch.equal(first[key], second[key]) for key in first), name


GROUPING = st.booleans()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000), batch_size=st.integers(1, 50), grouped=GROUPING)
def test_an_epoch_is_a_permutation_of_the_split(data, specs, seed, epoch, batch_size, grouped):
    loader = make(data, specs, seed=seed, batch_size=batch_size, group_by_length=grouped)
    assert sorted(ids_of(loader.epoch(epoch))) == sorted(data.ids[:NUM_TRAIN].tolist())
    assert len(list(loader.epoch(epoch))) == len(loader)


def test_order_depends_on_seed_and_epoch_only(data, specs):
    orders = [make(data, specs, seed=seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert make(data, specs, batch_size=3, rank=1, world_size=2).order(0).tolist() == orders[0]


def test_grouped_batches_have_texts_of_like_length(data, specs):
    lengths = {}
    for grouped in (False, True):
        batches = make(data, specs, batch_size=4, augment=None, group_by_length=grouped).epoch(3)
        lengths[grouped] = [batch["teacher"].inputs["text_mask"].sum(1) for batch in batches]
    assert len(lengths[True][-1]) == len(lengths[False][-1]) == NUM_TRAIN % 4
    padded = {grouped: sum(int(row.max() * len(row)) for row in rows) for grouped, rows in lengths.items()}
    assert padded[True] < padded[False]  # a window holds them all here: sorted, their padding is the least there is
    assert [int(row.max()) for row in lengths[True]] != sorted(int(row.max()) for row in lengths[True])  # but shuffled


def test_grouping_without_texts_is_refused(data):
    with pytest.raises(UserError, match="group_by_length: student read no text"):
        make(data, {"student": InputSpec(("image",))}, group_by_length=True)


@settings(max_examples=15, deadline=None)
@given(world_size=st.integers(1, 4), batch_size=st.integers(1, 20), start=st.integers(0, 3))
def test_orders_of_two_levels_are_orders(data, specs, world_size, batch_size, start):
    few = {"batch_size": batch_size, "two_level_rows": NUM_TRAIN - 1}
    loader = make(data, specs, **few)
    order = loader.order(2)[:].tolist()
    assert isinstance(loader.order(2), TwoLevelOrder) and sorted(order) == sorted(loader.row_positions.tolist())
    start = min(start, len(loader) - 1)
    ranks = [make(data, specs, **few, rank=rank, world_size=world_size).epoch(2, start) for rank in range(world_size)]
    read = [row for parts in zip(*ranks, strict=True) for part in parts for row in part["teacher"].ids.tolist()]
    assert read == data.ids[order[start * batch_size :]].tolist()


def test_order_does_not_depend_on_how_the_source_was_sorted(data, specs):
    back = np.arange(len(data.ids))[::-1]
    turned = PreparedData(
        folder=data.folder,
        ids=data.ids[back],
        split=data.split[back],
        groups=data.groups[back],
        codes={"image": data.codes["image"][back]},
        texts=[data.texts[row] for row in back],
        arrays={"image": data.arrays["image"][back]},
        present={key: values[back] for key, values in data.present.items()},
        targets={key: values[back] for key, values in data.targets.items()},
        tasks=data.tasks,
    )
    for one, other in zip(make(data, specs).epoch(2), make(turned, specs).epoch(2), strict=True):
        assert_equal(one["student"], other["student"])


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 6), epoch=st.integers(0, 5), batch_size=st.integers(5, 20), grouped=GROUPING)
def test_starting_at_a_batch_is_skipping_those_before(data, specs, start, epoch, batch_size, grouped):
    loader = make(data, specs, batch_size=batch_size, group_by_length=grouped)
    expected = list(loader.epoch(epoch))[start:]
    resumed = list(loader.epoch(epoch, start))
    assert len(resumed) == len(expected)
    for one, other in zip(resumed, expected, strict=True):
        assert_equal(one["student"], other["student"])


@settings(max_examples=15, deadline=None)
@given(world_size=st.integers(1, 6), batch_size=st.integers(1, 40), epoch=st.integers(0, 3), grouped=GROUPING)
def test_slices_of_the_ranks_are_the_batch_of_one(data, specs, world_size, batch_size, epoch, grouped):
    options = {"batch_size": batch_size, "group_by_length": grouped}
    alone = list(make(data, specs, **options).epoch(epoch))
    ranks = [
        list(make(data, specs, **options, rank=rank, world_size=world_size).epoch(epoch)) for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        sizes = [len(part["teacher"].ids) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for name in ("ids", "views"):
            joined = torch.cat([getattr(part["teacher"], name) for part in parts])
            assert torch.equal(joined, getattr(whole["teacher"], name))
        joined = torch.cat([part["teacher"].inputs["image"] for part in parts])
        assert torch.equal(joined, whole["teacher"].inputs["image"])
        tokens = [row[mask].tolist() for part in parts for row, mask in zip(*texts_of(part["teacher"]), strict=True)]
        assert tokens == [row[mask].tolist() for row, mask in zip(*texts_of(whole["teacher"]), strict=True)]


def test_tokenizing_in_chunks_changes_nothing(data, specs, monkeypatch):
    whole = list(make(data, specs).epoch(1))
    monkeypatch.setattr(tokens, "CHUNK", 3)
    for one, other in zip(whole, make(data, specs).epoch(1), strict=True):
        for name in specs:
            assert_equal(one[name], other[name])


def texts_of(batch: Batch):
    return batch.inputs["text"], batch.inputs["text_mask"]


def test_shapes_and_types(data, specs):
    batches = next(make(data, specs).epoch(0))
    for batch in batches.values():
        length = batch.inputs["text"].shape[1]
        assert batch.ids.shape == batch.views.shape == (8,) and batch.ids.dtype == batch.views.dtype == torch.int64
        assert batch.inputs["image"].shape == (8, 3, 8, 8) and batch.inputs["image"].dtype == torch.uint8
        assert batch.inputs["text"].dtype == torch.int64 and batch.inputs["text_mask"].shape == (8, length)
        assert batch.inputs["text_mask"].dtype == batch.present["image"].dtype == torch.bool
        assert batch.targets["label"].dtype == torch.int64
        assert batch.inputs["text_mask"].any(dim=0).all()  # no column of padding alone
    assert batches["student"].inputs["text"].shape[1] <= 4


def test_models_share_rows_and_images(data, specs):
    for batches in make(data, specs).epoch(1):
        teacher, student = batches["teacher"], batches["student"]
        assert teacher.ids is student.ids and teacher.inputs["image"] is student.inputs["image"]
        assert teacher.targets is student.targets and teacher.present is student.present


def test_rows_carry_their_own_values(data, specs):
    for batches in make(data, specs, augment=None).epoch(0):
        batch = batches["teacher"]
        rows = [data.ids.tolist().index(row) for row in batch.ids.tolist()]
        assert np.array_equal(batch.inputs["image"].numpy(), data.arrays["image"][rows])
        assert batch.targets["label"].tolist() == data.targets["label"][rows].tolist()
        assert batch.present["text"].tolist() == data.present["text"][rows].tolist()


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_clean_batches_are_what_predict_feeds(data, specs, name):
    loader = make(data, specs, shuffle=False, batch_size=64)
    [batches] = loader.epoch(0)
    spec, rows = specs[name], loader.row_positions
    preprocess = Preprocessor({"image": ImageFormat(8)}, Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id))
    present = data.present["image"]
    feeds = preprocess(
        [{"image": data.arrays["image"][r] if present[r] else None, "text": data.texts[r]} for r in rows]
    )
    batch = batches[name]
    assert (batch.views == CLEAN_VIEW).all()
    for key in ("image", "text", "text_mask"):
        assert np.array_equal(batch.inputs[key].numpy(), feeds[key]), key
    for modality in ("image", "text"):
        assert np.array_equal(batch.present[modality].numpy(), feeds[f"{modality}_present"])


def test_without_shuffling_rows_come_in_order_of_id(data, specs):
    assert ids_of(make(data, specs, shuffle=False).epoch(3)) == sorted(data.ids[:NUM_TRAIN].tolist())


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"views": 3}, [0, 1, 2, 0, 1]),
        ({"view": 2}, [2] * 5),
        ({"view": 0, "shuffle": False}, [0] * 5),
        ({"shuffle": False}, [CLEAN_VIEW] * 5),
        ({"augment": None}, [CLEAN_VIEW] * 5),
        ({"augment": AugmentConfig()}, [CLEAN_VIEW] * 5),
        ({"augment": None, "views": 3}, [CLEAN_VIEW] * 5),
    ],
)
def test_views(data, specs, options, views):
    loader = make(data, specs, **options)
    assert [loader.view(epoch) for epoch in range(5)] == views
    assert next(loader.epoch(4))["student"].views.tolist() == [views[4]] * 8


def test_absent_modalities_are_zeros_in_every_view(data, specs):
    for batches in make(data, specs).epoch(5):
        for batch in batches.values():
            assert not batch.inputs["image"][~batch.present["image"]].any()
            assert not batch.inputs["text_mask"][~batch.present["text"]].any()
            assert batch.inputs["text_mask"][batch.present["text"]].any(dim=1).all()


def test_word_dropout_is_the_same_for_both_tokenizers_and_keeps_the_order(data, tokenizer_file):
    specs = {
        "teacher": InputSpec(("image",), tokenizer_file, 8),
        "student": InputSpec((), tokenizer_file, 20, pad_id=9),
    }
    dropped = 0
    for batches in make(data, specs).epoch(0):
        for number, row in enumerate(batches["teacher"].ids.tolist()):
            kept = [
                batch.inputs["text"][number][batch.inputs["text_mask"][number]].tolist() for batch in batches.values()
            ]
            assert kept[0] == kept[1]
            words = data.texts[data.ids.tolist().index(row)].split()
            remaining = iter(words)
            stays = [WORDS[token - 4] for token in kept[0] if token > 3]
            assert all(word in remaining for word in stays)  # a subsequence of the text
            dropped += len(words) - len(stays)
    assert dropped > 20


def test_exact_rows_are_replayed(data, specs):
    loader = make(data, specs, views=2)
    first = next(loader.epoch(3))["teacher"]
    rows = loader.order(3)[:8]
    again = loader.batch(rows[::-1].copy(), torch.full((8,), 1))["teacher"]
    assert torch.equal(again.inputs["image"].flip(0), first.inputs["image"])
    assert torch.equal(again.inputs["text"].flip(0), first.inputs["text"])


def test_mixed_views_in_one_batch(data, specs):
    loader = make(data, specs)
    rows = np.repeat(loader.row_positions[:1], 6)
    batch = loader.batch(rows, torch.tensor([0, 1, 2, 3, CLEAN_VIEW, 0]))["teacher"]
    assert np.array_equal(batch.inputs["image"][4].numpy(), data.arrays["image"][rows[0]])
    assert torch.equal(batch.inputs["image"][0], batch.inputs["image"][5])


def test_a_model_gets_only_what_it_reads(data, tokenizer_file):
    specs = {"eyes": InputSpec(("image",)), "ears": InputSpec((), tokenizer_file, 8)}
    batches = next(make(data, specs).epoch(0))
    assert list(batches["eyes"].inputs) == ["image"] and list(batches["ears"].inputs) == ["text", "text_mask"]


def test_reading_an_absent_modality_is_refused(data, specs):
    class Silent(PreparedData):
        pass

    silent = Silent(**{**vars(data), "present": {"image": data.present["image"]}})
    with pytest.raises(UserError, match="model 'teacher' reads text"):
        make(silent, specs)


def test_rows_of_another_split_are_a_mistake(data, specs):
    with pytest.raises(AssertionError, match="another split"):
        make(data, specs).batch(data.rows("test"), torch.zeros(NUM_TEST, dtype=torch.int64))


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_do_not_depend_on_the_number_of_workers(data, specs, workers, start):
    """Augmented, for two models, and from a batch in the middle of an epoch on."""
    one, other = make(data, specs, batch_size=3), make(data, specs, batch_size=3, workers=workers)
    for epoch in (0, 5):
        pairs = list(zip(one.epoch(epoch, start), other.epoch(epoch, start), strict=True))
        assert len(pairs) == len(one) - start
        for expected, found in pairs:
            assert list(found) == list(specs)
            for name in specs:
                assert_equal(found[name], expected[name])


def test_workers_make_batches_at_the_same_time(data, specs, monkeypatch):
    loader = make(data, specs, batch_size=2, workers=3)
    together, inner = threading.Barrier(3, timeout=30), loader.batch

    def batch(rows, views):
        if len(rows) == 2:
            together.wait()
        return inner(rows, views)

    monkeypatch.setattr(loader, "batch", batch)
    assert sorted(ids_of(loader.epoch(0))) == sorted(data.ids[:NUM_TRAIN].tolist())


def test_without_workers_there_are_no_threads(data, specs):
    loader = make(data, specs, workers=0)
    seen, inner = set(), loader.batch
    loader.batch = lambda *some: seen.add(threading.current_thread()) or inner(*some)
    list(loader.epoch(0))
    assert seen == {threading.current_thread()}


def test_the_background_thread_ends_with_the_iterator(data, specs):
    batches = make(data, specs, batch_size=2, workers=1).epoch(0)
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_exceptions_of_the_background_thread_are_raised(data, specs, monkeypatch):
    loader = make(data, specs, workers=1)
    monkeypatch.setattr(loader, "_media", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loader.epoch(0))


def test_dropped_words_depend_on_the_seed(data, specs):
    loaders = [make(data, specs, seed=seed) for seed in (1, 2)]
    rows = loaders[0].row_positions
    one, two = (loader.batch(rows, torch.zeros(len(rows), dtype=torch.int64))["teacher"] for loader in loaders)
    assert not torch.equal(one.inputs["text"], two.inputs["text"])
