"""The packaged recipes on a part of the data: each ends with a report (``-m slow``)."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from media import sound, tone
from tiny_project import ROOT, distill

from distill.recipe import load_recipe
from distill.runs import read_json

RECIPES = ("resnet18_lstm", "resnet50_lstm", "resnet_audio", "smallest", "trimodal")
BUDGET = ["max_steps=4", "batch_size=16"]
SMALL = [
    *(f"{model}.train.{value}" for model in ("teacher", "student") for value in BUDGET),
    *(f"prune.train.{value}" for value in BUDGET),
    *("cache.views=2", "bench.repeats=10", "report.bootstrap=100", "export.min_agreement_int8=0"),
    "data.targets={category: category}",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Real drawings and names of the sample, some of each category and split; a tone stands for the spoken name."""
    rows = pa_parquet.read_table(ROOT / "distill/data/samples/emoji/twemoji.parquet").to_pylist()
    chosen: list[dict] = []
    for split, most in (("train", 10), ("valid", 3), ("test", 4)):
        for category in sorted({row["category"] for row in rows}):
            chosen += [row for row in rows if (row["split"], row["category"]) == (split, category)][:most]
    for row in chosen:
        pitch = 200 + 10 * hashlib.blake2b(row["category"].encode(), digest_size=1).digest()[0]
        row["audio"] = sound(tone(pitch, 0.5, 8000), 8000, "FLAC")
    path = tmp_path_factory.mktemp("recipes") / "rows.parquet"
    pa_parquet.write_table(pa.Table.from_pylist(chosen), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_ends_with_a_report(name, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = [f"data.source.path={table}", *SMALL]
    if name == "smallest":  # its teacher is the quick start's, which learns more than one task in several trainings
        changes += ["teacher.pretrain={}", "teacher.class_names.tasks=[]", "teacher.train.lr_scale={}"]
        changes += ["teacher.objective=[{loss: cross_entropy, task: category}]"]
    answer = distill("run", name, *changes)
    assert answer.code == 0, answer.err
    report = read_json(tmp_path / "runs" / name / "report" / "report.json")
    models = {model["name"]: model for model in report["models"]}
    assert {"teacher", "baseline", "student", "pruned", "onnx-fp32", "onnx-int8"} <= models.keys()
    modalities = len(load_recipe(name).student.encoders)
    assert len(models["student"]["subsets"]) == 2**modalities - 2
    assert all(np.isfinite(model["quality"]["category"]["accuracy"]) for model in models.values())
