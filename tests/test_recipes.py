"""The packaged recipes on a part of the data: each ends with a report (``-m slow``)."""

import hashlib
import io
from collections import Counter

import numpy as np
import pytest
import tiny
from animate_emoji import SIZE, animated, encoded
from ask_emoji import questions
from emoji_table import chance, read_sample, write_rows
from label_sentiment import labelled
from make_listings import listings
from media import sound, tone
from PIL import Image
from tiny_project import distill

from distill.recipe import load_recipe
from distill.runs import read_json

BUDGET = ["max_steps=4", "batch_size=16"]
SMALL = [
    *(f"{model}.train.{value}" for model in ("teacher", "student") for value in BUDGET),
    *(f"prune.train.{value}" for value in BUDGET),
    *("cache.views=2", "bench.repeats=10", "report.bootstrap=100", "export.min_agreement_int8=0"),
]
CATEGORY = ["data.targets={category: category}"]
QUICK_TEACHER = [  # it learns more than one task, in several trainings
    *("teacher.pretrain={}", "teacher.class_names.tasks=[]", "teacher.train.lr_scale={}"),
    "teacher.objective=[{loss: cross_entropy, task: category}]",
]
TINY_CLIP = [
    *(f"teacher.encoders.{tower}.weights=path:clip" for tower in ("image", "text")),
    "teacher.encoders.text.max_length=32",
]


def few(rows, column, train=10, valid=3, test=4):
    """Some rows of each split and class; classes that training lacks are left out."""
    most, counts, kept = {"train": train, "valid": valid, "test": test}, Counter(), []
    for row in sorted(rows, key=lambda row: chance(row["id"])):
        counts[row["split"], row[column]] += 1
        if counts[row["split"], row[column]] <= most[row["split"]]:
            kept.append(row)
    known = {row[column] for row in kept if row["split"] == "train"}
    return [row for row in kept if row[column] in known]


def spoken(rows):
    """Drawings, names, and a tone that stands for the spoken name."""
    found = few([row for row in rows if row["style"] == "twemoji"], "category")
    for row in found:
        pitch = 200 + 10 * hashlib.blake2b(row["category"].encode(), digest_size=1).digest()[0]
        row["audio"], row["spoken"] = sound(tone(pitch, 0.5, 8000), 8000, "FLAC"), row["text"].split(",")[0]
    return found


def turning(rows, folder):
    """Animations of drawings that turn around, as the script reads a package's."""
    folder.mkdir()
    for row in few([row for row in rows if row["style"] == "noto"], "category", 6, 2, 2):
        with Image.open(io.BytesIO(row["image"])) as drawing:
            turned = [drawing.rotate(30 * step, fillcolor="white").resize((SIZE, SIZE)) for step in range(12)]
        (folder / f"{row['codepoints'].lower()}.webp").write_bytes(encoded(np.stack([np.asarray(t) for t in turned])))
    return animated(folder, rows)


def labels_for_all(rows):
    """Drawings whose subcategory occurs in training too."""
    return few(few(rows, "category", 20, 8, 8), "subcategory", 20, 8, 8)


def studies(rows):
    """Drawings of which some have findings: their category and their style; several drawings are of one patient."""
    found = few([row for row in rows if row["style"] != "fluent"], "category", 20, 5, 5)
    return [
        {
            "image": row["image"],
            "report": row["text"],
            "findings": ";".join([row["category"], row["style"]] if chance(row["id"], "sick") < 0.8 else []),
            "patient": row["family"],
            "id": row["id"],
        }
        for row in found
    ]


TABLES = {
    "spoken": lambda rows, folder: spoken(rows),
    "sentiment": lambda rows, folder: few(labelled(rows), "sentiment", 30, 10, 10),
    "questions": lambda rows, folder: few(questions(few(rows, "category")), "answer", 30, 10, 10),
    "listings": lambda rows, folder: few(listings(few(rows, "category", 40, 12, 12)), "verdict", 90, 20, 20),
    "animated": lambda rows, folder: turning(rows, folder / "animations"),
    "emoji": lambda rows, folder: labels_for_all(rows),
    "findings": lambda rows, folder: studies(rows),
}
"""Tables of real drawings, made by the functions of the scripts that make the recipes' own."""

RECIPES = {
    "resnet18_lstm": ("spoken", CATEGORY),
    "resnet50_lstm": ("spoken", CATEGORY),
    "resnet_audio": ("spoken", CATEGORY),
    "smallest": ("spoken", [*CATEGORY, *QUICK_TEACHER]),
    "trimodal": ("spoken", CATEGORY),
    "vgg_lstm_sentiment": ("sentiment", []),
    "vqa": ("questions", []),
    "image_series": ("animated", []),
    "video_text": ("animated", []),
    "listing_fraud": ("listings", ["student.inherit={}"]),  # a table of 29,528 tokens takes half a minute
    "clip_mobile": ("emoji", TINY_CLIP),
    "medical_findings": ("findings", ["data.working_size=32", "data.random_split={valid: 0.2, test: 0.2}"]),
    "caption": ("spoken", []),
    "speech_to_text": ("spoken", []),
    "early_fusion": ("emoji", []),
    "middle_fusion": ("emoji", []),
    "late_fusion": ("emoji", []),
}
"""Recipe -> the table that stands for its own, and what else is changed."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")

    class Tables(dict):
        def __missing__(self, name):
            write_rows(TABLES[name](read_sample(), folder), folder / f"{name}.parquet")
            self[name] = folder / f"{name}.parquet"
            return self[name]

    return Tables()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_ends_with_a_report(name, tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, changes = RECIPES[name]
    if changes is TINY_CLIP:
        tiny.write_clip(tmp_path / "clip")
    answer = distill("run", name, f"data.source.path={tables[table]}", *SMALL, *changes)
    assert answer.code == 0, answer.err
    report = read_json(tmp_path / "runs" / name / "report" / "report.json")
    models = {model["name"]: model for model in report["models"]}
    assert {"teacher", "baseline", "student", "pruned", "onnx-fp32", "onnx-int8"} <= models.keys()
    recipe = load_recipe(name)
    assert len(models["student"]["subsets"]) == 2 ** len(recipe.student.encoders) - 2
    tasks = models["student"]["quality"]
    assert tasks.keys() == (
        {"category"} if "data.targets={category: category}" in changes else recipe.data.targets.keys()
    )
    measures = {"classification": "macro_f1", "multilabel": "auroc", "captioning": "cider"}
    kinds = {task: measures[entry["kind"]] for task, entry in report["tasks"].items()}
    qualities = [model["quality"] for model in models.values()]
    assert all(np.isfinite(quality[task][measure]) for quality in qualities for task, measure in kinds.items())
