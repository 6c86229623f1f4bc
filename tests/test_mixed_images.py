"""mixup, CutMix and balanced classes: what loaders make, what objectives make of it, and what a plan refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_project import RECIPE, make_project

import students
from distill import pipeline
from distill.check import check_recipe
from distill.config import ClassBalance, MixImages, TermConfig
from distill.contracts import IGNORE, SHARE, Outputs, UserError
from distill.data.loader import InputSpec, Loader
from distill.data.prepared import PreparedData
from distill.data_config import AugmentConfig
from distill.losses import objective as objectives
from distill.losses.logits import cross_entropy, kd
from distill.other_teachers import Teachers
from distill.recipe import load_recipe
from distill.targets import CLASSIFICATION, MULTILABEL, Task

NUM, SIZE = 43, 12
CLASSES = np.repeat([0, 1, 2, IGNORE], [30, 8, 2, 3])
AUGMENT = AugmentConfig.model_validate({"image": {"flip": 0.5, "shift": 2}})
MIXUP, CUTMIX = MixImages(mixup=1.0), MixImages(cutmix=1.0)
SPECS = {"teacher": InputSpec(("image",)), "student": InputSpec(("image",))}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    random = np.random.default_rng(0)
    labels = np.zeros((NUM, 3), np.float32)
    labels[:, 0], labels[:5, 1], labels[3:9, 2] = 1, 1, 1
    labels[20:25], labels[40:] = 0, np.nan
    return PreparedData(
        folder=tmp_path_factory.mktemp("data"),
        ids=np.arange(NUM) * 2,
        split=np.full(NUM, "train"),
        groups=np.arange(NUM),
        texts=[""] * NUM,
        codes={"image": np.arange(NUM)},
        arrays={"image": random.integers(0, 256, (NUM, 3, SIZE, SIZE), dtype=np.uint8)},
        present={"image": np.arange(NUM) != 4, "text": np.zeros(NUM, bool)},
        targets={"label": CLASSES, "tags": labels},
        tasks={"label": Task(CLASSIFICATION, tuple("abc")), "tags": Task(MULTILABEL, tuple("xyz"))},
    )


def make(data, mix=None, **options):
    given = {"batch_size": 10, "seed": 0, "augment": AUGMENT, "shuffle": True} | options
    return Loader(data, "train", SPECS, mix_images=mix, **given)


def joined(parts):
    """The slices of ranks as one batch."""
    return type(parts[0])(
        *(
            torch.cat(values)
            if isinstance(values[0], torch.Tensor)
            else {name: torch.cat([value[name] for value in values]) for name in values[0]}
            for values in zip(*parts, strict=True)
        )
    )


def assert_equal(one, other):
    for first, second in zip(one, other, strict=True):
        if isinstance(first, torch.Tensor):
            assert torch.equal(first, second)
        else:
            assert list(first) == list(second)
            for name in first:
                assert torch.equal(first[name].nan_to_num(-7.0), second[name].nan_to_num(-7.0)), name


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.integers(1, 6),
    epoch=st.integers(0, 3),
    mix=st.sampled_from([None, MIXUP, CUTMIX, MixImages(mixup=0.2, cutmix=1.0, probability=0.6)]),
    balance=st.sampled_from([None, ClassBalance(task="label")]),
)
def test_slices_of_the_ranks_are_the_batch_of_one(data, ranks, epoch, mix, balance):
    options = {"class_balance": balance, "views": 3}
    alone = make(data, mix, **options)
    slices = [make(data, mix, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
    for number in range(len(alone)):
        parts = [loader.at(epoch, number)["student"] for loader in slices]
        assert_equal(joined([part for part in parts if len(part.ids)]), alone.at(epoch, number)["student"])


@pytest.mark.parametrize("mix", [MIXUP, CUTMIX])
def test_images_are_of_two_rows_of_the_batch_by_their_share(data, mix):
    plain, mixed, shares = make(data), make(data, mix), []
    for number in range(4):
        before, after = plain.at(1, number)["student"], mixed.at(1, number)["student"]
        assert torch.equal(before.ids, after.ids) and torch.equal(before.targets["label"], after.targets["label"])
        assert_equal(mixed.at(1, number)["teacher"], after)
        shares.append(share := after.mixed[SHARE][0].item())
        images, found = before.inputs["image"].float(), after.inputs["image"].float()
        for row in range(len(after.ids)):
            labels = after.mixed["target.label"][row]
            if mix is MIXUP:
                wrong = [(share * images[row] + (1 - share) * other - found[row]).abs().max() for other in images]
            else:
                own, theirs = found[row] == images[row], found[row] == images
                wrong = [(~own & ~part).sum() for part in theirs]  # pixels of neither
                changed = (~own).any(0).float().mean().item()
                assert changed <= 1 - share + 1e-6 and (changed == 0 or changed > 0.8 * (1 - share))
            partners = [at for at, value in enumerate(wrong) if value <= 0.51]
            assert partners and any(labels == before.targets["label"][at] for at in partners)
    assert len(set(shares)) == 4 and min(shares) > 0 and max(shares) <= 1


def test_rows_mix_only_where_both_have_an_image_and_labels_of_the_same_tasks(data):
    loader, whole = make(data, MIXUP, batch_size=NUM), make(data, batch_size=NUM)
    for epoch in range(5):
        batch, before = loader.at(epoch, 0)["student"], whole.at(epoch, 0)["student"]
        assert ((batch.targets["label"] == IGNORE) == (batch.mixed["target.label"] == IGNORE)).all()
        absent = ~batch.present["image"]
        assert absent.sum() == 1 and not batch.inputs["image"][absent].any()
        changed = (batch.inputs["image"] != before.inputs["image"]).flatten(1).any(1)
        assert changed.sum() > 25


def test_a_share_of_the_batches_is_mixed_in_each_way(data):
    loader = make(data, MixImages(mixup=0.4, cutmix=1.0, probability=0.5), batch_size=1)
    mixed = [bool(loader.at(epoch, number)["student"].mixed) for epoch in range(10) for number in range(NUM)]
    assert np.mean(mixed) == pytest.approx(0.5, abs=0.08)


def test_exact_rows_and_other_loaders_are_not_mixed(data):
    batch = make(data, MIXUP).batch(np.arange(5), torch.zeros(5, dtype=torch.int64))["student"]
    assert not batch.mixed and not make(data).at(0, 0)["student"].mixed


def test_terms_on_labels_count_both_rows_by_their_share_and_others_the_image(data):
    batch = make(data, MIXUP).at(0, 0)["student"]
    random = torch.Generator().manual_seed(0)
    student, teacher = (Outputs({"label": torch.randn(len(batch.ids), 3, generator=random)}, {}, {}) for _ in range(2))
    terms = [TermConfig(loss="cross_entropy", task="label"), TermConfig(loss="kd", task="label")]
    objective = objectives.Objective(terms, student, teacher)
    _, values = objective(student, teacher, batch)
    share, logits = batch.mixed[SHARE][0], student.logits["label"]
    own, other = (cross_entropy(logits, labels) for labels in (batch.targets["label"], batch.mixed["target.label"]))
    assert values["cross_entropy/label"].item() == pytest.approx((share * own + (1 - share) * other).item())
    assert own.item() != pytest.approx(other.item())
    assert values["kd/label"].item() == pytest.approx(kd(logits, teacher.logits["label"]).item())


def label_counts(data, **options):
    loader = make(data, **options)
    seen = [loader.order(epoch)[:] for epoch in range(200)]
    assert all(len(rows) == NUM for rows in seen)
    return np.concatenate(seen)


def test_classes_come_equally_often_and_unlabelled_rows_as_before(data):
    rows = label_counts(data, class_balance=ClassBalance(task="label"))
    shares = [np.mean(CLASSES[rows] == label) for label in (0, 1, 2, IGNORE)]
    assert shares == pytest.approx([40 / NUM / 3] * 3 + [3 / NUM], abs=0.015)


def test_of_several_labels_the_rarest_counts(data):
    rows = label_counts(data, class_balance=ClassBalance(task="tags"))
    often = np.bincount(rows, minlength=NUM) / 200
    tags = data.targets["tags"]
    counts = np.nansum(tags, 0)  # of each label
    rarest = [min((counts[held == 1]), default=5) for held in tags[:40]]  # 5 rows have none of them
    weights = 1 / np.array(rarest)
    assert often[:40] == pytest.approx(weights / weights.sum() * 40, abs=0.45)
    assert often[40:] == pytest.approx([1, 1, 1], abs=0.3)
    assert (often[:5] > 2 * often[30:40].mean()).all()


def test_a_run_goes_on_at_any_batch_and_draws_vary_their_views(data):
    loader = make(data, MIXUP, class_balance=ClassBalance(task="label", power=1), views=4)
    whole = [batch["student"] for batch in loader.epoch(2)]
    again = make(data, MIXUP, class_balance=ClassBalance(task="label"), views=4)
    for one, other in zip(whole[2:], again.epoch(2, 2), strict=True):
        assert_equal(one, other["student"])
    assert {view for batch in whole for view in batch.views.tolist()} == {0, 1, 2, 3}
    fresh = make(data, class_balance=ClassBalance(task="label")).at(7, 0)["student"]
    assert (fresh.views == 7).all()


IMAGES_ALONE = [
    "data.modalities={image: image}",
    "teacher.encoders={image: {type: convnet, widths: [8], blocks: [0]}}",
    "student.encoders={image: {type: convnet, widths: [8], blocks: [0]}}",
    "teacher.objective=[{loss: cross_entropy, task: shape}]",
    "student.objective=[{loss: cross_entropy, task: shape}, {loss: kd, task: shape}]",
    "student.inherit={}",
    "teacher.fusion={type: concat, dim: 16}",
]
LIVE, MIXED = "cache.enabled=false", "student.train.mix_images={mixup: 0.2, cutmix: 1.0}"


@pytest.fixture
def recipe_of(tmp_path):
    """A recipe with overrides, checked."""
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def make_recipe(*overrides):
        recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
        check_recipe(recipe, pipeline.ENCODERS, students.INHERITANCES)
        return recipe

    return make_recipe


def test_images_are_mixed_where_models_read_them_alone_and_live(recipe_of):
    recipe = recipe_of(*IMAGES_ALONE, LIVE, MIXED, "student.train.class_balance={task: shape}")
    assert recipe.student.train.mix_images == MixImages(mixup=0.2, cutmix=1.0)
    assert recipe.student.train.class_balance.power == 1.0
    recipe_of(*IMAGES_ALONE, MIXED, "student.objective=[{loss: cross_entropy, task: shape}]")  # nobody is asked


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ([LIVE, MIXED], "the student reads text, which does not mix"),
        ([*IMAGES_ALONE, MIXED], "set cache.enabled to false"),
        ([*IMAGES_ALONE, LIVE, "teacher.train.mix_images={mixup: 1}"], "teacher.train.mix_images: only students"),
        ([*IMAGES_ALONE, LIVE, "prune.train.mix_images={mixup: 0}"], "mixup and cutmix are both 0"),
        (
            [*IMAGES_ALONE, LIVE, MIXED, "student.objective=[{loss: queue_kl, embedding: image}]"],
            r"student.objective\[0\]: queue_kl remembers rows",
        ),
        (["student.train.class_balance={task: size}"], "the data has no task 'size'"),
        (
            ["data.targets.size={column: size, kind: regression}", "prune.train.class_balance={task: size}"],
            "prune.train.class_balance.task: task 'size' is a regression, whose rows have no class to balance",
        ),
    ],
)
def test_what_cannot_be_mixed_or_balanced_is_refused_before_a_run(recipe_of, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe_of(*overrides)


def test_a_student_learns_from_a_live_teacher_that_sees_mixed_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    balanced = [f"{where}.train.class_balance={{task: shape}}" for where in ("teacher", "student")]
    small = ["teacher.train.epochs=1", "student.train.epochs=2", "trackers=[]", *balanced]
    recipe = load_recipe(make_project(tmp_path), [*IMAGES_ALONE, LIVE, MIXED, *small])
    asked = []
    answer = Teachers.__call__
    monkeypatch.setattr(
        Teachers, "__call__", lambda self, batches, *a: asked.append(batches) or answer(self, batches, *a)
    )
    done = pipeline.run(recipe, until="student", quiet=True)
    assert done["student"].info["num_params"] > 0
    assert len(asked) > 4 and all(batches["teacher"].mixed for batches in asked)
    for batches in asked:
        assert torch.equal(batches["teacher"].inputs["image"], batches["student"].inputs["image"])
