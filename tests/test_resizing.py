"""Progressive resizing: training begins with small images, and ends with those of the data."""

import pytest
import torch
from tiny import SIZE, make_batch, make_model, terms
from tiny_job import assert_same, stopped_and_continued, weights

from distill.config import TrainConfig
from distill.data.transforms import resize_images
from distill.engine import fit
from distill.optimize import image_size

SMALL = {"progressive_resizing": {"size": 8, "until": 0.5}}


@pytest.mark.parametrize("kind", ["constant", "blocks", "noise"])
def test_a_smaller_pixel_is_the_mean_of_what_it_covers(kind):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)
    if kind == "constant":
        images[:] = 201
    if kind == "blocks":
        images = images[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)
    before = images.clone()
    small = resize_images(images, 8)
    assert small.shape == (4, 3, 8, 8) and small.dtype == torch.uint8 and torch.equal(images, before)
    assert (small.float().mean(dim=(2, 3)) - images.float().mean(dim=(2, 3))).abs().max() < 6
    if kind == "constant":
        assert torch.equal(small, torch.full_like(small, 201))
    if kind == "blocks":  # the outer corner of a block sees nothing else
        assert torch.equal(small[:, :, ::7, ::7], images[:, :, ::15, ::15])


def test_the_size_follows_the_step():
    config = TrainConfig.model_validate({"progressive_resizing": {"size": 8, "until": 0.6}})
    assert [image_size(step, 10, config) for step in range(10)] == [8] * 6 + [None] * 4
    assert image_size(0, 10, TrainConfig()) is None


def seen_sizes(job):
    """The sizes of images in training and in evaluation, in order."""
    found = {True: [], False: []}
    encoder = job.tapped.model.encoders["image"]
    encoder.register_forward_pre_hook(lambda module, args: found[module.training].append(args[0]["image"].shape[-1]))
    fit(job)
    return found


def test_training_sees_small_images_first_and_validation_whole_ones(make_job):
    sizes = seen_sizes(make_job(**SMALL, epochs=2))
    half = len(sizes[True]) // 2
    assert sizes[True] == [8] * half + [SIZE] * half and half and set(sizes[False]) == {SIZE}


def test_a_stopped_run_goes_on_with_the_size_it_would_have(make_job):
    whole = make_job("whole", **SMALL)
    fit(whole)
    assert_same(weights(stopped_and_continued(make_job, 4, **SMALL)), weights(whole))
    plain = make_job("plain")
    fit(plain)
    assert any(not torch.equal(value, weights(whole)[name]) for name, value in weights(plain).items())


def test_the_teacher_sees_whole_images(make_job, wordpiece_file):
    """It is asked with the batch as it was made, before the student's images are shrunk."""
    model, seen = make_model(wordpiece_file, seed=1).eval().requires_grad_(False), []

    def teacher(batches):
        seen.append(batches["student"].inputs["image"].shape[-1])
        return model(batches["student"])

    example = model(make_batch())
    sizes = seen_sizes(
        make_job(**SMALL, epochs=1, objective=terms({"loss": "kd", "task": "kind"}), teacher=teacher, example=example)
    )
    assert 8 in sizes[True] and set(seen) == {SIZE}
