"""Recipes with published settings: models of the published size, plans, and two steps on a shrunken copy."""

from __future__ import annotations

import json
import shlex
import shutil

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny_project import distill, refusal

from distill.build import build_model
from distill.contracts import UserError
from distill.optimize import lr_factor
from distill.pipeline import ENCODERS, check
from distill.recipe import load_recipe, packaged_configs
from distill.schedules import at
from distill.targets import unnamed
from teachers import TimmEncoder

CLASSES = ("n01440764", "n01443537", "n01484850")
CIFAR, IMAGENET = ("cifar100_kd", "cifar100_dkd"), ("imagenet_kd", "imagenet_dkd", "imagenet_dist")
MILLION = {"cifar100": (7.434, 1.234), "imagenet": (21.798, 11.690)}
"""Parameters of teacher and student as published, with heads of 100 and 1,000 classes."""
SHORT = ["student.train.max_steps=2", "student.train.batch_size=4", "data.hold_out=0.3", "workers=0"]
SMALL = {
    "cifar100": [
        "teacher.encoders.image={type: resnet_cifar, depth: 8, widths: [4, 4, 8, 8]}",
        "student.encoders.image={type: resnet_cifar, depth: 8, widths: [4, 4, 4, 8]}",
        "teacher.train.max_steps=2",
        "teacher.train.batch_size=4",
    ],
    "imagenet": [
        "teacher.encoders.image={type: timm, name: test_resnet, pretrained: true, classifier: true, size: 32}",
        "student.encoders.image={type: timm, name: test_resnet, size: 32}",
        "data.working_size=40",
    ],
}


def data_of(name):
    return name.partition("_")[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a few images of other shapes, where the recipes look for theirs."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for number, name in enumerate(CLASSES):
            place = tmp_path / "data" / "cifar100" / split / name
            place.mkdir(parents=True)
            for image in range(count):
                pixels = random.integers(60 * number, 60 * number + 60, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{image}.png")
    shutil.copytree(tmp_path / "data" / "cifar100", tmp_path / "data" / "imagenet")
    return tmp_path


@pytest.fixture
def weights(monkeypatch):
    """What timm calls pretrained is random and has as many classes as the tests' images."""
    made = timm.create_model

    def create(name, *, pretrained=False, **options):
        torch.manual_seed(len(name))
        return made(name, **{"num_classes": len(CLASSES), **options})

    monkeypatch.setattr(timm, "create_model", create)


@pytest.mark.parametrize("name", [*CIFAR, *IMAGENET])
def test_models_have_the_published_size(name):
    recipe = load_recipe(name, ["teacher.encoders.image.pretrained=false"] if name in IMAGENET else [])
    classes = {"label": unnamed(100 if name in CIFAR else 1000)}
    for model, published in zip(("teacher", "student"), MILLION[data_of(name)], strict=True):
        built = build_model(getattr(recipe, model), ENCODERS, classes, model)
        assert sum(p.numel() for p in built.parameters()) / 1e6 == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("name", [*CIFAR, *IMAGENET])
def test_recipes_are_valid_and_say_where_their_numbers_come_from(name):
    recipe = load_recipe(name)
    check(recipe)
    train = recipe.student.train
    total = 7 * train.epochs
    drops = [step / 7 for step in range(1, total) if lr_factor(step, total, train) != lr_factor(step - 1, total, train)]
    assert drops == ([150, 180, 210] if name in CIFAR else [30, 60, 90])
    assert lr_factor(0, total, train) == 1.0 and lr_factor(total - 1, total, train) == pytest.approx(1e-3)
    assert train.clip_norm is None and train.ema is None and recipe.cache.views == train.epochs


def test_the_weight_of_dkd_rises_as_in_the_authors_code():
    recipe = load_recipe("cifar100_dkd")
    for epoch in range(240):
        weight = at(recipe.student.objective[1].weight, epoch / 240)
        assert weight == pytest.approx(min((epoch + 1) / 20, 1.0), abs=1e-5)


@pytest.mark.parametrize("name", [*CIFAR, *IMAGENET])
def test_a_plan_counts_rows_and_parameters(name, folder, weights):
    small = [word for word in SMALL[data_of(name)] if "max_steps" not in word]
    answer = distill("run", name, *small, "data.hold_out=0.3", "--dry-run")
    assert answer.code == 0, answer.err
    assert "parameters: " in answer.out and "12 test" in answer.out and "cache 0.0 MB" in answer.out
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("name", [*CIFAR, *IMAGENET])
def test_two_steps_of_a_shrunken_copy(name, folder, weights):
    overrides = [*SMALL[data_of(name)], *SHORT]
    answer = distill("train", name, *overrides)
    assert answer.code == 0, answer.err
    run = folder / "runs" / name
    entry = json.loads((run / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert entry["step"] == 2 and all(np.isfinite(value) for value in entry.values())
    assert not list((run / "cache").rglob("*.safetensors"))  # 240 views of all rows are not stored


def test_the_teacher_of_one_recipe_is_copied_by_the_other_as_its_header_says(folder):
    overrides = [*SMALL["cifar100"], *SHORT]
    assert distill("train", "cifar100_kd", *overrides).code == 0
    again = ["teachers.kd.run=runs/cifar100_kd", "student.objective.1.teacher=kd"]
    plan = distill("run", "cifar100_dkd", *overrides, *again, "--dry-run")
    states = {line.split()[0]: line for line in plan.out.splitlines() if line.strip()}
    assert plan.code == 0, plan.err
    assert all("to copy" in states[stage] for stage in ("data", "teacher")) and "to do" in states["student"]


def test_data_may_be_a_copy_that_save_to_disk_wrote(folder):
    random = np.random.default_rng(0)
    features = Features({"img": ImageFeature(), "fine_label": ClassLabel(names=list(CLASSES))})

    def rows(count):
        pictures = [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        return Dataset.from_dict({"img": pictures, "fine_label": [n % 3 for n in range(count)]}, features=features)

    DatasetDict(train=rows(60), test=rows(12)).save_to_disk(folder / "copy")
    header = (packaged_configs() / "data" / "cifar100.yaml").read_text().splitlines()
    (line,) = (line for line in header if line.startswith("#   "))
    given = shlex.split(line.removeprefix("#").replace("FOLDER", "copy"))
    answer = distill("run", "cifar100_kd", *given, *SMALL["cifar100"], "data.hold_out=0.3", "--dry-run")
    assert answer.code == 0, answer.err
    assert "12 test" in answer.out


def test_a_teacher_with_its_own_classifier_answers_as_its_weights_do(folder, weights):
    model = build_model(
        load_recipe("imagenet_kd", SMALL["imagenet"]).teacher, ENCODERS, {"label": unnamed(len(CLASSES))}, "teacher"
    ).eval()
    whole = timm.create_model("test_resnet", pretrained=True).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    encoder = model.encoders["image"]
    with torch.no_grad():
        said = model.heads["label"](encoder({"image": pixels}).pooled)
        torch.testing.assert_close(said, whole((pixels / 255 - encoder.mean) / encoder.std))


def test_a_classifier_of_other_classes_is_refused(folder, weights):
    with pytest.raises(UserError, match=r"classifier: it tells 3 classes of one task, and the data has 5 of task 'x'"):
        build_model(load_recipe("imagenet_kd", SMALL["imagenet"]).teacher, ENCODERS, {"x": unnamed(5)}, "teacher")


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "mobilenetv3_small_050"])
def test_a_classifier_that_reads_something_else_is_refused(name, weights):
    with pytest.raises(UserError, match=f"{name}' has more than a mean over positions before its classifier"):
        TimmEncoder(name=name, pretrained=True, classifier=True)


def test_a_classifier_without_pretrained_weights_is_none(weights):
    assert TimmEncoder(name="test_resnet", classifier=True).own_classifier is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.fusion={type: concat, dim: 8}"], "classifier reads the encoder's own vector, which concat changes"),
        (["teacher.encoders.image.classifier=false"], "teacher.objective is empty, and the teacher has something"),
        (["data.hold_out=0.0"], "has no usable row of split 'valid'"),
    ],
)
def test_mistakes(overrides, message, folder, weights):
    assert message in refusal(distill("run", "imagenet_kd", *SMALL["imagenet"], *overrides, "--dry-run"))


def test_pooled_is_for_one_modality():
    overrides = ["teacher.fusion={type: pooled}"]
    assert "pooled is for models of one modality" in refusal(distill("validate", "quickstart", *overrides))
