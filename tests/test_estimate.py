"""The estimate of a plan against what a fill takes."""

import json

import numpy as np
import pytest
import torch
from tiny_project import distill, make_project, refusal

from distill import estimate
from distill.cache import TeacherCache
from distill.contracts import CLEAN_VIEW, Outputs


def on_disk(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("overrides", [[], ["transfer.texts=300"], ["data.augment={}"], ["cache.dtype=float32"]])
def test_the_estimated_cache_is_what_a_run_takes(tmp_path, monkeypatch, overrides):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = json.loads(distill("run", "recipe.yaml", "--dry-run", "--json", *overrides).out)
    assert distill("cache", "recipe.yaml", *overrides).code == 0
    assert found["disk_bytes"]["cache"] == pytest.approx(on_disk(tmp_path / "runs/tiny/cache"), rel=0.1)


def test_a_tap_that_the_teacher_lacks_is_refused_by_the_plan(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    term = '{loss: fitnet, taps: {student: "encoders.image.stages:mean", teacher: "encoders.image.stagez:mean"}}'
    found = refusal(distill("run", "recipe.yaml", "--dry-run", f"student.objective=[{term}]"))
    assert "stagez" in found and "stages" in found


def test_time_of_the_transfer_set_is_part_of_the_estimate(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "_least_seconds", lambda work: [work(), 64.0][1])  # a second a row, whatever it does
    found = []
    alone = "teacher.pretrain.image={epochs: 5, batch_size: 10, max_steps: 7}"
    for overrides in ([], ["transfer.texts=40", "transfer.ratio=2", alone]):
        answer = distill("run", "recipe.yaml", "--dry-run", "--json", *overrides)
        assert answer.code == 0, answer.err
        found.append(json.loads(answer.out)["seconds"])
    plain, mixed = found
    assert plain["student"] == plain["baseline"] == mixed["baseline"] == 72 * 2
    assert mixed["student"] == 3 * plain["student"] and mixed["pruned"] == 3 * plain["pruned"] == 3 * 72
    assert mixed["pretrain"] == 70 and "pretrain" not in plain
    assert plain["cache"] == 72 * 2 and mixed["cache"] >= 72 * 2 + 40


@pytest.mark.parametrize("rows, views", [(5_500, [0, 1, 2]), (3_000, [CLEAN_VIEW])])
def test_the_estimate_at_the_shapes_of_the_quick_start(tmp_path, rows, views):
    heads = ("", ".fused", ".image", ".text")
    logits = {f"{task}{head}": size for task, size in (("category", 10), ("subcategory", 98)) for head in heads}

    def answer(ids, view):
        count = len(ids)
        return Outputs(
            {name: torch.zeros(count, size) for name, size in logits.items()},
            {name: torch.zeros(count, 128) for name in ("image", "text", "fused")},
            {"encoders.image.stages:mean": torch.zeros(count, 128)},
        )

    TeacherCache.fill(
        tmp_path, rows=np.arange(rows) * 2, views=views, produce=answer, key={}, dtype="float16", batch_size=1024
    )
    size = estimate._store_bytes(answer(np.arange(64), 0), rows, len(views), "float16")
    assert size == pytest.approx(on_disk(tmp_path), rel=0.02)
