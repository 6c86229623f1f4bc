"""Operations on images: torchvision's values, each image by itself, and draws that are distributed as papers say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.v2 import functional as reference

from distill.contracts import CLEAN_VIEW
from distill.data import image_ops
from distill.data.randaugment import LARGEST, OPERATIONS, randaugment
from distill.data.transforms import augment_images, erased_boxes
from distill.data_config import ImageAugment
from distill.data_config import RandAugment as Config

SIZE, MIDDLE = 24, 100


def images_of(count, size=SIZE, seed=0):
    """Smooth pictures with some noise, in parts of the range of values."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    return (30 + 180 * smooth + 10 * torch.rand(smooth.shape, generator=generator)).to(torch.uint8)


def differ_by(one, other):
    return (one.int() - other.int()).abs().max().item()


@pytest.mark.parametrize("degrees", [-90, -30, 0, 12.5, 90])
def test_rotation_is_torchvisions(degrees):
    images = images_of(5)
    turned = image_ops.warp(images, image_ops.turning(np.full(5, degrees)), 255)
    wanted = reference.rotate(images, degrees, InterpolationMode.BILINEAR, fill=[255.0] * 3)
    assert differ_by(turned[:, :, 6:-6, 6:-6], wanted[:, :, 6:-6, 6:-6]) <= 1  # edges fade into the fill here
    if degrees in (-90, 0, 90):
        assert torch.equal(turned, torch.rot90(images, round(degrees / 90), (2, 3)))


def test_what_a_warp_uncovers_is_the_fill():
    images = torch.full((1, 3, SIZE, SIZE), MIDDLE, dtype=torch.uint8)
    for fill in (0, 255):
        turned = image_ops.warp(images, image_ops.turning(np.array([45.0])), fill)
        assert (turned[0, :, 0, 0] == fill).all() and (turned[0, :, 12, 12] == MIDDLE).all()


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7])
def test_colours_are_torchvisions(factor):
    images, factors = images_of(6), np.full(6, factor)
    colour = image_ops.recolour(images, image_ops.colour_matrices(factors, 0 * factors))
    assert differ_by(colour, reference.adjust_saturation(images, factor)) <= 2  # torchvision rounds grey down
    assert differ_by(image_ops.sharpen(images, factors), reference.adjust_sharpness(images, factor)) <= 2


def test_tables_are_torchvisions():
    images = torch.cat([images_of(6), torch.full((1, 3, SIZE, SIZE), 7, dtype=torch.uint8)])
    assert torch.equal(image_ops.equalize(images), reference.equalize(images))
    assert differ_by(image_ops.autocontrast(images), reference.autocontrast(images)) <= 1
    for bits in (4, 7, 8):
        assert torch.equal(image_ops.posterize(images, bits), reference.posterize(images, bits))
    for threshold in (0.0, 178.5, 255.0):
        assert torch.equal(image_ops.solarize(images, threshold), reference.solarize(images, threshold))


def test_a_turned_hue_keeps_the_luma_and_comes_around():
    images, zero = images_of(4) // 3 + 85, np.zeros(4)  # no pixel leaves the range
    turned = image_ops.recolour(images, image_ops.colour_matrices(zero + 1, zero + 0.3))
    assert differ_by(turned, images) > 10
    assert image_ops.mean_luma(turned) == pytest.approx(image_ops.mean_luma(images), abs=1)
    around = image_ops.recolour(images, image_ops.colour_matrices(zero + 1, zero + 1))
    assert differ_by(around, images) <= 1


def test_the_list_is_torchvisions_with_its_ranges():
    space = RandAugment()._augmentation_space(LARGEST + 1, (331, 331))
    names = {name.lower().replace("color", "colour") for name in space}
    assert names == {name.replace("_", "") for name in OPERATIONS}
    images, ones, nine = images_of(3, 331), np.ones(3), np.full(3, 9 / LARGEST)
    assert torch.equal(
        OPERATIONS["posterize"](images, nine, 0), reference.posterize(images, int(space["Posterize"][0][9]))
    )
    threshold = float(space["Solarize"][0][9])
    assert torch.equal(OPERATIONS["solarize"](images, nine, 0), reference.solarize(images, threshold))
    moved = int(space["TranslateX"][0][LARGEST])
    assert torch.equal(OPERATIONS["translate_x"](images, ones, 0)[..., :-moved], images[..., moved:])
    assert torch.equal(OPERATIONS["translate_y"](images, -ones, 0)[..., moved:, :], images[..., :-moved, :])
    for name, other in (("brightness", "Brightness"), ("contrast", "Contrast")):
        adjust = getattr(reference, f"adjust_{name}")
        for sign in (1, -1):
            wanted = adjust(images, 1 + sign * float(space[other][0][9]))
            assert differ_by(OPERATIONS[name](images, sign * nine, 0), wanted) <= 2


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_each_operation_changes_images_one_by_one(name):
    images, sign = images_of(6), np.array([[1, -1, 1, -1, 1, 1]])
    chosen = np.full((1, 6), list(OPERATIONS).index(name))
    chosen[0, 2] = 0
    before = images.clone()
    found = randaugment(images, chosen, sign, 15, 255)
    assert torch.equal(images, before) and torch.equal(found[2], images[2])
    for row in (0, 1, 3, 4, 5):
        assert not torch.equal(found[row], images[row])
        one = slice(row, row + 1)
        assert torch.equal(randaugment(images[one], chosen[:, one], sign[:, one], 15, 255), found[one])


def test_operations_are_drawn_alike_and_strength_counts():
    images = images_of(1).repeat(1500, 1, 1, 1)
    ids = torch.arange(1500)
    mild, strong = (
        augment_images(images, ids, ids * 0, 0, ImageAugment(randaugment=Config(ops=1, magnitude=magnitude)))
        for magnitude in (3, 20)
    )
    changed = (strong != images).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(13 / 14, abs=0.02)
    assert (strong.int() - images.int()).abs().float().mean() > 2 * (mild.int() - images.int()).abs().float().mean()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), size=st.integers(8, 200))
def test_erased_boxes_lie_in_the_image(seed, size):
    ids = torch.arange(50)
    top, left, height, width = erased_boxes(ids, ids * 0, seed, size)
    assert (np.stack([top, left]) >= 0).all() and (top + height <= size).all() and (left + width <= size).all()
    slack = 0.5  # sides are whole pixels
    assert ((height - slack) * (width - slack) <= 0.33 * size**2 + 1e-6).all()
    assert ((height + slack) * (width + slack) >= 0.02 * size**2 - 1e-6)[height > 0].all()


def test_erasing_is_as_frequent_as_asked_and_noise():
    images, ids = torch.full((400, 3, 32, 32), MIDDLE, dtype=torch.uint8), torch.arange(400)
    found = augment_images(images, ids, ids * 0, 0, ImageAugment(erase=0.3))
    erased = (found != MIDDLE).flatten(1).any(1)
    assert erased.float().mean().item() == pytest.approx(0.3, abs=0.06)
    noise = found[found != MIDDLE].float()
    assert noise.mean().item() == pytest.approx(127.5, abs=3) and noise.std().item() == pytest.approx(73.9, abs=3)
    assert noise.min() == 0 and noise.max() == 255
    clean = augment_images(images, ids, torch.full_like(ids, CLEAN_VIEW), 0, ImageAugment(erase=1.0))
    assert torch.equal(clean, images)
