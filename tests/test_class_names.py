"""Names of classes as texts: what they say, and that a teacher with a frozen tower learns from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_project import distill, make_project, refusal

from distill import pipeline
from distill.build import input_spec
from distill.contracts import IGNORE
from distill.data.class_names import class_names
from distill.recipe import load_recipe
from distill.stages import _teachers_rows

NAMES = "teacher.class_names={tasks: [shape], ratio: 0.25}"


def renamed(data, task, *names):
    """The data with other names of the first classes."""
    info = data.tasks[task]
    return replace(data, tasks=data.tasks | {task: replace(info, names=(*names, *info.names[len(names) :]))})


def test_each_name_has_its_label_and_no_other(prepared):
    task, other = list(prepared.labels)[:2]
    rows = class_names(renamed(prepared, task, "face-hand_left"), [task])
    assert list(rows.texts) == ["face hand left", *prepared.labels[task][1:]]
    assert rows.targets[task].tolist() == list(range(len(prepared.labels[task])))
    assert set(rows.targets[other].tolist()) == {IGNORE}
    assert rows.present["text"].all() and not rows.present["image"].any()
    assert rows.ids.min() > np.max(prepared.ids) and len({*rows.ids.tolist()}) == len(rows.ids)


def test_a_name_without_words_is_never_an_empty_text(prepared):
    task = next(iter(prepared.labels))
    rows = class_names(renamed(prepared, task, "-", " "), [task])
    assert rows.texts[0] == "-" and all(text.strip() for text in rows.texts)
    assert rows.targets[task].tolist() == [0, *range(2, len(prepared.labels[task]))]


def test_a_teacher_reads_them_in_every_batch_from_its_kept_tower(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipe.yaml", [NAMES])
    work = pipeline.workspace(recipe, pipeline.run(recipe, until="teacher", quiet=True))
    model = work.teacher()
    names = work.data().labels["shape"]
    shown = []
    for batches in _teachers_rows(work, model, recipe.teacher.train, repeat=False).epoch(0):
        batch = batches["teacher"]
        read = batch.ids > int(work.data().ids.max())
        assert int(read.sum()) in (len(names) % 4 or 4, 4) and not batch.present["image"][read].any()
        shown += batch.targets["shape"][read].tolist()
        assert "text" not in batch.inputs
        live = work.class_names_loader({"teacher": input_spec(model)}, 400)
        (whole,) = (made["teacher"] for made in live.epoch(0))
        with torch.no_grad():
            kept = model(batch).logits["shape.text"][read]
            wanted = model(whole).logits["shape.text"]
        order = {row: place for place, row in enumerate(whole.ids.tolist())}
        assert torch.allclose(kept, wanted[[order[row] for row in batch.ids[read].tolist()]], atol=2e-2)
    assert {*shown} == {*range(len(names))}
    plain = load_recipe("recipe.yaml", ["name=plain"])
    other = pipeline.workspace(plain, pipeline.run(plain, until="teacher", quiet=True)).teacher()
    assert any(
        not torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["teacher.class_names.tasks=[shap]"], "the data has no task 'shap'; did you mean 'shape'"),
        (["teacher.class_names.tasks=shape"], "teacher.class_names.tasks"),
        (["teacher.class_names.ratio=0"], "teacher.class_names.ratio"),
    ],
)
def test_mistakes_are_refused(tmp_path, monkeypatch, overrides, message):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert message in refusal(distill("run", "recipe.yaml", *overrides))
