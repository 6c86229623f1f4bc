"""Recalls against hand-counted ranks, with several captions an image, shared captions and ties; zero-shot classes."""

import numpy as np
import pytest

from distill import retrieval
from distill.retrieval import DIRECTIONS, pairs_of, scores, search, zero_shot_logits


def pairs(image, text, present=None):
    there = np.ones(len(image), bool) if present is None else np.array(present)
    return pairs_of({"image": np.array(image), "text": np.array(text)}, {"image": there, "text": np.ones_like(there)})


def on_circle(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_two_captions_an_image_any_of_which_is_right():
    given = pairs([0, 0, 1, 1], [0, 1, 2, 3])
    assert [len(given.first_rows[name]) for name in ("image", "text")] == [2, 4]
    rows = {"image": on_circle(0, 0, 90, 90), "text": on_circle(80, 30, 20, 70)}
    # image 0 at 0°: captions at 80° and 30°, others at 20° and 70°: one other is nearer than its nearest
    # image 1 at 90°: captions at 20° and 70°, others at 80° and 30°: the one at 80° is nearer
    found = search(rows, given, "image_to_text")
    assert found.rank.tolist() == [2, 2]
    # of image 0 the matches come 2nd and 4th, of image 1 too: (1/2 + 2/4) / 2
    np.testing.assert_allclose(found.average_precision, [0.5, 0.5])
    # captions at 80° and 20° are nearer to the other image, those at 30° and 70° to their own
    assert search(rows, given, "text_to_image").rank.tolist() == [2, 1, 2, 1]
    assert scores(rows, given)["image_to_text"] == {"recall@1": 0.0, "recall@5": 1.0, "recall@10": 1.0}
    assert scores(rows, given)["text_to_image"]["recall@1"] == 0.5


def test_a_caption_of_two_images_is_one_text_that_finds_either():
    given = pairs([0, 1, 2], [7, 7, 8])
    assert given.first_rows["text"].tolist() == [0, 2]
    rows = {"image": on_circle(10, 50, 90), "text": on_circle(0, 0, 60)}
    found = search(rows, given, "text_to_image")
    # the text at 0° finds 10° first and 50° second; the one at 60° has 50° before its own at 90°
    assert found.rank.tolist() == [1, 2]
    np.testing.assert_allclose(found.average_precision, [1.0, 0.5])


def test_rows_without_an_image_are_left_out():
    given = pairs([0, 1, 2], [0, 1, 2], present=[True, False, True])
    assert given.first_rows["image"].tolist() == [0, 2]


@pytest.mark.parametrize("constant", [0.0, 1.0, np.nan, np.inf])
def test_ties_never_count_in_favour(constant):
    count = 5
    rows = {name: np.full((count, 3), constant, np.float32) for name in ("image", "text")}
    for direction in DIRECTIONS:
        assert (search(rows, pairs(range(count), range(count)), direction).rank >= count).all()


def test_a_match_that_only_rounding_lifts_is_a_tie():
    rows = {"image": on_circle(0, 90), "text": np.array([[1, 0], [1, 1e-4]], np.float32)}
    assert search(rows, pairs([0, 1], [0, 1]), "image_to_text").rank.tolist() == [2, 1]


def random_rows(seed, count=60):
    random = np.random.default_rng(seed)
    image, text = random.integers(0, 20, count), random.integers(0, 25, count)
    centres = {"image": random.normal(size=(20, 8)), "text": random.normal(size=(25, 8))}
    return {"image": centres["image"][image], "text": centres["text"][text]}, image, text


@pytest.mark.parametrize("seed", range(4))
def test_recall_does_not_depend_on_the_order_of_rows(seed):
    rows, image, text = random_rows(seed)
    order = np.random.default_rng(seed + 100).permutation(len(image))
    moved = {name: values[order] for name, values in rows.items()}
    assert scores(moved, pairs(image[order], text[order])) == scores(rows, pairs(image, text))


def test_recall_is_that_of_plain_loops_and_of_any_chunk(monkeypatch):
    rows, image, text = random_rows(9)
    given = pairs(image, text)
    for direction, (asking, sought) in DIRECTIONS.items():
        codes = {"image": image, "text": text}
        queries, gallery = np.unique(codes[asking]), np.unique(codes[sought])
        ranks, precisions = [], []
        for query in queries:
            one = rows[asking][codes[asking] == query][0]
            cosine = {}
            for item in gallery:
                other = rows[sought][codes[sought] == item][0]
                cosine[item] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            right = sorted((cosine[item] for item in set(codes[sought][codes[asking] == query])), reverse=True)
            wrong = [cosine[item] for item in gallery if cosine[item] not in right]
            places = [sum(value > match for value in wrong) + number for number, match in enumerate(right, start=1)]
            ranks.append(places[0])
            precisions.append(np.mean([number / place for number, place in enumerate(places, start=1)]))
        for cells in (8_000_000, 60, 1):
            monkeypatch.setattr(retrieval, "CELLS", cells)
            found = search(rows, given, direction)
            assert found.rank.tolist() == ranks
            np.testing.assert_allclose(found.average_precision, precisions)


def test_zero_shot_is_the_mean_of_prompts_of_length_one():
    prompts = np.array([[2, 0], [0, 5], [-1, 0], [-3, 0]], np.float32)
    found = zero_shot_logits(np.array([[0, 7], [-2, 0]], np.float32), prompts, 2, 10.0)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[10 * half, 0], [-10 * half, 10]], atol=1e-6)
