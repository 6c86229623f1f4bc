"""Augmentation is a function of (seed, row id, view): golden values, ranges, and no influence of the batch."""

import hashlib
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from distill.contracts import CLEAN_VIEW
from distill.data.transforms import augment_images, crop_boxes, drop_words, hash_uniform, resize_images
from distill.data_config import ImageAugment, RandAugment

FULL = ImageAugment(flip=0.5, shift=3, brightness=0.3, contrast=0.3)
CROPPED = FULL.model_copy(update={"crop": 0.3, "fill": "black"})
STRONG = CROPPED.model_copy(
    update={"rotate": 30.0, "randaugment": RandAugment(ops=3), "saturation": 0.5, "hue": 0.2, "erase": 0.5}
)
DIGESTS = ["6a615f185072", "39b598f60372", "fdaf8bff39ad"]
INT64 = st.integers(-(2**63), 2**63 - 1)


def images_of(count: int, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def splitmix(value: int) -> int:
    """The same mixing in Python's unbounded integers."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


@given(seed=st.integers(0, 2**31 - 1), row=INT64, view=INT64, salt=st.integers(0, 2**62))
def test_hash_is_splitmix_in_exact_arithmetic(seed, row, view, salt):
    state = splitmix(seed)
    for part in (salt, row, view):
        state = splitmix(state ^ part % 2**64)
    value = hash_uniform(seed, torch.tensor([row]), torch.tensor([view]), salt)
    assert value.dtype == torch.float32
    assert value.item() == (state >> 40) / 2**24


def test_hash_is_uniform_and_uncorrelated():
    ids, views = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    first = hash_uniform(0, ids, views, "a")
    assert first.min() >= 0 and first.max() < 1
    counts = torch.histc(first, 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi squared, 19 degrees of freedom, p = 0.001
    others = [hash_uniform(0, ids, views, "b"), hash_uniform(1, ids, views, "a"), hash_uniform(0, ids, views + 1, "a")]
    others.append(hash_uniform(0, ids + 1, views, "a"))
    for other in others:
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.03


def test_golden_values_never_change():
    ids, views = torch.tensor([0, 1, 7, -1]), torch.tensor([0, 0, 3, 2])
    expected = [0.4203488230705261, 0.9073178768157959, 0.9132033586502075, 0.04623675346374512]
    assert hash_uniform(0, ids, views, "flip").tolist() == expected


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    order=st.permutations(range(6)),
    size=st.integers(1, 6),
    config=st.sampled_from([FULL, CROPPED, STRONG]),
)
def test_augmentation_does_not_depend_on_the_batch(seed, order, size, config):
    images, ids, views = images_of(6), torch.arange(6) * 11, torch.tensor([0, 1, 2, 3, CLEAN_VIEW, 0])
    whole = augment_images(images, ids, views, seed, config)
    part = torch.tensor(order[:size])
    assert torch.equal(augment_images(images[part], ids[part], views[part], seed, config), whole[part])


@pytest.mark.parametrize("config", [FULL, CROPPED, STRONG])
def test_clean_rows_are_not_touched(config):
    images, ids = images_of(8), torch.arange(8)
    views = torch.tensor([0, CLEAN_VIEW] * 4)
    result = augment_images(images, ids, views, 0, config)
    assert torch.equal(result[1::2], images[1::2])
    assert not torch.equal(result[::2], images[::2])
    assert torch.equal(augment_images(images, ids, torch.full((8,), CLEAN_VIEW), 0, config), images)


@pytest.mark.parametrize("config", [FULL, CROPPED, STRONG])
def test_input_is_not_modified(config):
    images = images_of(8)
    before = images.clone()
    augment_images(images, torch.arange(8), torch.zeros(8, dtype=torch.int64), 0, config)
    assert torch.equal(images, before)


def test_augmented_images_never_change():
    images, ids = images_of(16), torch.arange(16)
    digests = [
        hashlib.sha256(augment_images(images, ids, ids % 3, 0, config).numpy().tobytes()).hexdigest()[:12]
        for config in (ImageAugment(flip=0.5, shift=3), ImageAugment(flip=0.5, shift=3, fill="black"), FULL)
    ]
    assert digests == DIGESTS


def test_what_is_off_changes_nothing():
    images, ids = images_of(8), torch.arange(8)
    assert augment_images(images, ids, ids, 0, ImageAugment()) is images
    named = {"rotate": 0, "randaugment": None, "saturation": 0, "hue": 0, "erase": 0}
    for config in (FULL, CROPPED):
        spelled = ImageAugment(**(config.model_dump() | named))
        assert torch.equal(augment_images(images, ids, ids, 0, config), augment_images(images, ids, ids, 0, spelled))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), row=INT64, least=st.floats(0.01, 1), size=st.integers(1, 300))
def test_crops_lie_in_the_image_and_are_nearly_square(seed, row, least, size):
    ids, views = torch.full((20,), row), torch.arange(20)
    top, left, height, width = crop_boxes(ids, views, seed, least, size)
    assert (np.stack([top, left]) >= 0).all() and (np.stack([height, width]) >= 1).all()
    assert (top + height <= size).all() and (left + width <= size).all()
    slack = 0.5  # sides are whole pixels
    assert ((height + slack) * (width + slack) >= least * size**2 - 1e-6).all()
    assert (np.maximum(height, width) - slack <= 4 / 3 * (np.minimum(height, width) + slack)).all()
    assert np.array_equal(
        crop_boxes(ids[7:8], views[7:8], seed, least, size)[:, 0], [top[7], left[7], height[7], width[7]]
    )


def test_crops_have_every_area_and_place():
    ids = torch.arange(4000)
    top, left, height, width = crop_boxes(ids, torch.zeros_like(ids), 0, 0.08, 224)
    area = height * width / 224**2
    stats = pytest.importorskip("scipy.stats")
    assert 0.079 < area.min() < 0.1 and 0.95 < area.max() <= 1
    torch.manual_seed(0)
    image = torch.zeros(3, 224, 224)
    drawn = np.array([RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)]).T
    for ours, theirs in ((area, drawn[2] * drawn[3] / 224**2), (width / height, drawn[3] / drawn[2]), (top, drawn[0])):
        assert stats.ks_2samp(ours, theirs).pvalue > 0.01  # the distribution of the code that papers use
    free = np.maximum(height, width) < 200
    shares = [corner[free] / (224 - side[free]) for corner, side in ((top, height), (left, width))]
    assert np.mean(shares, axis=1) == pytest.approx([0.5, 0.5], abs=0.02) and abs(np.corrcoef(*shares)[0, 1]) < 0.05


def test_a_crop_is_brought_back_to_the_images_size():
    images, ids = images_of(12, 32), torch.arange(12)
    views = torch.zeros_like(ids)
    boxes = crop_boxes(ids, views, 3, 0.2, 32).T.tolist()
    result = augment_images(images, ids, views, 3, ImageAugment(crop=0.2))
    for before, after, (top, left, height, width) in zip(images, result, boxes, strict=True):
        part = before[None, :, top : top + height, left : left + width]
        assert torch.equal(after, resize_images(part, 32)[0])
    plain = torch.full_like(images, 77)
    assert torch.equal(augment_images(plain, ids, views, 3, ImageAugment(crop=0.2)), plain)


def test_flip_alone():
    images, ids = images_of(64), torch.arange(64)
    result = augment_images(images, ids, torch.zeros_like(ids), 0, ImageAugment(flip=0.5))
    flipped = [torch.equal(after, before.flip(-1)) for before, after in zip(images, result, strict=True)]
    kept = [torch.equal(after, before) for before, after in zip(images, result, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True)) and 20 <= sum(flipped) <= 44


@pytest.mark.parametrize(("fill", "value"), [("white", 255), ("black", 0)])
def test_shift_moves_whole_pixels_and_uncovers_the_fill(fill, value):
    images, ids = images_of(400), torch.arange(400)
    result = augment_images(images, ids, torch.zeros_like(ids), 0, ImageAugment(shift=2, fill=fill))
    seen = set()
    for before, after in zip(images, result, strict=True):
        padded = torch.full((3, 12, 12), value, dtype=torch.uint8)
        padded[:, 2:10, 2:10] = before
        steps = [(y, x) for y in range(5) for x in range(5) if torch.equal(after, padded[:, y : y + 8, x : x + 8])]
        assert len(steps) == 1
        seen.add(steps[0])
    assert len(seen) == 25


def test_a_shift_beyond_the_image_leaves_white():
    images, ids = images_of(50), torch.arange(50)
    result = augment_images(images, ids, torch.zeros_like(ids), 0, ImageAugment(shift=1000))
    assert result.shape == images.shape and (result == 255).all(dim=(1, 2, 3)).any()


def test_brightness_and_contrast_stay_in_their_range():
    ids = torch.arange(200)
    zeros = torch.zeros_like(ids)
    grey = torch.full((200, 3, 4, 4), 100, dtype=torch.uint8)
    bright = augment_images(grey, ids, zeros, 0, ImageAugment(brightness=0.2))[:, 0, 0, 0].int()
    assert bright.min() >= 80 and bright.max() <= 120 and bright.max() - bright.min() > 30
    assert (augment_images(grey * 0 + 255, ids, zeros, 0, ImageAugment(brightness=0.2)) >= 204).all()
    middle = torch.full((200, 3, 4, 4), 128, dtype=torch.uint8)
    assert (augment_images(middle, ids, zeros, 0, ImageAugment(contrast=0.5)) == 128).all()


def test_empty_batch():
    empty = torch.zeros(0, dtype=torch.int64)
    assert augment_images(images_of(0), empty, empty, 0, FULL).shape == (0, 3, 8, 8)
    assert drop_words(torch.zeros(0, 4, dtype=torch.int64), empty, empty, 0, 0.5).shape == (0, 4)


WORDS = torch.tensor([[-1, 0, 1, 1, 2, -1], [-1, 0, 0, -1, -1, -1]])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), row=INT64, view=st.integers(0, 10), p=st.floats(0, 0.99))
def test_dropping_keeps_special_tokens_one_word_and_whole_words(seed, row, view, p):
    ids, views = torch.tensor([row, row]), torch.tensor([view, view])
    keep = drop_words(WORDS, ids, views, seed, p)
    assert keep[WORDS < 0].all()
    assert keep[0, 1:5].any() and keep[0, 2] == keep[0, 3]
    assert keep[1].all()  # its only word


def test_two_tokenizers_drop_the_same_words():
    other = torch.tensor([[-1, 0, 0, 0, 1, 2, 2, -1]], dtype=torch.int32)
    for view in range(50):
        ids, views = torch.tensor([5]), torch.tensor([view])
        first, second = drop_words(WORDS[:1], ids, views, 0, 0.5), drop_words(other, ids, views, 0, 0.5)
        assert set(WORDS[:1][first].tolist()) == set(other[second].tolist())


def test_words_go_as_often_as_asked():
    words = torch.arange(20).repeat(500, 1)
    keep = drop_words(words, torch.arange(500), torch.zeros(500, dtype=torch.int64), 0, 0.3)
    assert keep.float().mean().item() == pytest.approx(0.7, abs=0.02)


def test_clean_rows_keep_every_word():
    assert drop_words(WORDS, torch.arange(2), torch.full((2,), CLEAN_VIEW), 0, 0.99).all()


def test_a_batch_at_training_size_is_fast():
    images, ids = images_of(128, 64), torch.arange(128)
    seconds = []
    for view in range(5):
        start = time.thread_time()
        augment_images(images, ids, torch.full_like(ids, view), 0, FULL)
        seconds.append(time.thread_time() - start)
    assert np.median(seconds) < 0.05  # measured: 2.5 ms; a gather over the batch or a loop over pixels would show
