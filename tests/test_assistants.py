"""Students of other runs as teachers: assistants and born-again students, what is copied, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_project import distill, make_project, refusal

from distill import pipeline
from distill.cache import TeacherCache
from distill.contracts import TRAIN
from distill.fitted import find_fitted
from distill.other_teachers import Teachers
from distill.recipe import RECIPES, load_recipe, packaged_configs
from distill.runs import read_json
from distill.stages import cache_key
from distill.workspace import TEACHER

DATA = (
    "data={source: {type: table, path: rows.csv}, modalities: {image: image, text: caption}, group: family, id: id, "
    "targets: {category: colour, subcategory: shape}, working_size: 32, augment: {image: {flip: 0.5}}}"
)
SMALL_TEACHER = (
    "teacher={encoders: {image: {type: convnet, widths: [8, 16], blocks: [0, 1]}, text: {type: pretrained_text, "
    "weights: 'path:bert', max_length: 12, freeze: true}}, fusion: {type: concat, dim: 16}, train: {epochs: 1, "
    "batch_size: 16}, objective: [{loss: cross_entropy, task: category}, {loss: cross_entropy, task: subcategory}]}"
)
STEPS = ["student.train.max_steps=3", "student.train.batch_size=16", "prune.train.max_steps=2", "trackers=[]"]
COMMON = [DATA, SMALL_TEACHER, *STEPS]
COPIED = ["data", "vocabulary", "pretrain", "towers", "transfer", "teacher"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the whole run of the packaged recipe ``assistant``, for a few steps on a few drawings."""
    folder = tmp_path_factory.mktemp("assistants")
    make_project(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        pipeline.run(load_recipe("assistant", COMMON), until="pruned", quiet=True)
        pipeline.run(load_recipe("assistant", COMMON), until="baseline", quiet=True)
    return folder


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """A copy of that folder as working directory."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def run(name, *overrides, until="student"):
    """The finished stages, and what was said."""
    said = []
    return pipeline.run(load_recipe(name, [*COMMON, *overrides]), until=until, quiet=True, say=said.append), said


def copied(said):
    return [line.partition(":")[0] for line in said if "copied from" in line]


@pytest.mark.parametrize("name", ["assisted", "born_again"])
def test_the_packaged_recipes_go_on_from_the_assistant(project, name):
    answer = distill("run", name, *COMMON, "--dry-run", "--json")
    states = {entry["stage"]: entry["state"] for entry in json.loads(answer.out)["stages"]}
    twins = ["baseline", "inherit"] if name == "born_again" else []  # it is the same student
    assert [stage for stage, state in states.items() if state == "to copy"] == [*COPIED, *twins]
    done, said = run(name)
    assert copied(said) == [*COPIED, *twins[1:]] and not any(line.startswith("teacher: fit") for line in said)
    assert all(artifact.path.parent.name == name for artifact in done.values())
    for stage in COPIED:
        ours, theirs = (read_json(project / "runs" / run / stage / "manifest.json") for run in (name, "assistant"))
        assert ours == theirs
    line = json.loads((done["student"].path / "metrics.jsonl").read_text().splitlines()[-1])
    teacher = "assistant" if name == "assisted" else "parent"
    assert line[f"train/kd/category@{teacher}"] >= 0
    assert run(name)[1] == []


def test_other_runs_of_a_packaged_recipe_lie_where_its_own_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("assisted").teachers["assistant"].run == str(tmp_path / "runs/assistant")
    (tmp_path / "mine").mkdir()
    shutil.copy(packaged_configs() / RECIPES / "assisted.yaml", tmp_path / "mine")
    assert load_recipe("mine/assisted.yaml").teachers["assistant"].run == str(tmp_path / "mine/runs/assistant")


def test_born_again_is_the_assistants_student():
    first, second = (load_recipe(name).student for name in ("assistant", "born_again"))
    for field in ("encoders", "fusion", "embedding_dim", "unimodal_heads", "dropout", "train", "baseline"):
        assert getattr(first, field) == getattr(second, field)
    small = load_recipe("assisted").student.encoders["image"].params["widths"]
    assert all(one < other for one, other in zip(small, first.encoders["image"].params["widths"], strict=True))


@pytest.mark.parametrize("stage", ["baseline", "student", "pruned"])
def test_a_teacher_says_what_the_model_of_that_stage_says(project, stage):
    first = load_recipe("assistant", COMMON)
    planned = pipeline.plan(first, until="pruned") + pipeline.plan(first, until="baseline")
    there = pipeline.workspace(first, {item.stage.name: item.artifact for item in planned})
    done, _ = run("assisted", f"teachers.assistant.stage={stage}", until="cache")
    work = pipeline.workspace(load_recipe("assisted", [*COMMON, f"teachers.assistant.stage={stage}"]), done)
    teachers = Teachers(work.recipe, work.encoders, work.tasks(), work.teacher())
    loader = work.towers(work.train_loader(teachers.specs, work.recipe.student.train), teachers.own)
    batches = loader.batch(loader.row_positions, torch.full((len(loader.row_positions),), 1))
    with torch.no_grad():
        expected = there.model(stage)(batches[f"{TEACHER}@assistant"]).logits
    cache = TeacherCache.open(work.path("cache"), cache_key(work))
    for said in (teachers(batches), cache(batches[TEACHER])):
        for task in ("category", "subcategory"):
            torch.testing.assert_close(said.logits[f"{task}@assistant"], expected[task], rtol=1e-2, atol=1e-2)
    assert len(work.data().rows(TRAIN)) == len(batches[TEACHER].ids)
    assert not any(p.requires_grad for p in find_fitted("assistant", work.recipe).model(work.encoders).parameters())


def test_a_student_that_reads_a_vocabulary_of_its_own_teaches_too(project):
    """The recipe of the tiny project: static embeddings, whose tokenizer the run has made."""
    overrides = ["trackers=[]", *STEPS]
    pipeline.run(load_recipe("recipe.yaml", overrides), until="student", quiet=True)
    term = "{loss: kd, task: colour, teacher: elder}"
    elder = "teachers={elder: {run: runs/tiny, stage: student}}"
    again = [*overrides, "name=again", elder, f"student.objective=[{term}]"]
    done = pipeline.run(load_recipe("recipe.yaml", again), until="student", quiet=True)
    inherited = load_file(done["inherit"].path / "model.safetensors")
    assert inherited.keys() == load_file("runs/tiny/student/model.safetensors").keys()
    path = Path("runs/tiny/inherit/tokenizer.json")
    path.write_text(path.read_text() + "\n")
    for change in (path.unlink, lambda: None):
        found = refusal(distill("cache", "recipe.yaml", *again, "name=other"))
        assert "its tokenizer has changed or gone since it was fitted; run its recipe again (`distill train" in found
        change()


def to_do():
    planned = pipeline.plan(load_recipe("assisted", COMMON), until="student")
    return [item.stage.name for item in planned if not item.artifact]


def test_another_student_there_fills_another_cache(project):
    run("assisted")
    assert to_do() == []
    pipeline.run(load_recipe("assistant", [*COMMON, "student.train.lr=0.01"]), until="student", quiet=True)
    assert to_do() == ["cache", "student"]


def test_nothing_is_copied_that_differs_or_is_damaged(project):
    path = project / "runs/assistant/towers/manifest.json"
    path.write_text("{}")
    _, said = run("assisted", "teacher.train.epochs=2", until="teacher")
    assert copied(said) == ["data", "pretrain"]
    path = project / "runs/assistant/data/rows.npy"
    path.write_bytes(path.read_bytes()[:-1])
    _, said = run("assisted", "name=other", until="data")
    assert copied(said) == []


def test_force_copies_nothing(project):
    recipe, said = load_recipe("assisted", COMMON), []
    pipeline.run(recipe, until="teacher", force=["teacher"], quiet=True, say=said.append)
    assert copied(said) == ["data", "pretrain", "towers"] and any(line.startswith("teacher: fit") for line in said)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("teachers.assistant.stage=studnet", "'teachers.assistant.stage' is 'studnet': did you mean 'student'?"),
        ("teachers.assistant.run=runs/none", "holds no finished student; give the folder OUTPUT/NAME of a run"),
        ("student.objective.2={loss: clip_fd, embedding: 'image,fused', teacher: assistant}", None),
    ],
)
def test_what_cannot_teach_is_refused(project, override, sentence):
    answer = distill("validate", "assisted", *COMMON, override)
    if sentence is None:  # embeddings of 64 numbers on both sides
        assert answer.code == 0, answer
    else:
        assert sentence in refusal(answer)


def test_changes_behind_the_student_are_refused(project):
    weights = project / "runs/assistant/student/model.safetensors"
    found = load_file(weights)
    save_file({name: value + 1 for name, value in found.items()}, weights)
    sentence = refusal(distill("validate", "assisted", *COMMON))
    assert "runs/assistant/student have changed since they were written" in sentence and "`distill train" in sentence
    manifest = project / "runs/assistant/pruned/manifest.json"
    content = read_json(manifest)
    del content["info"]["origin"]
    manifest.write_text(json.dumps(content))
    sentence = refusal(distill("validate", "assisted", *COMMON, "teachers.assistant.stage=pruned"))
    assert "the pruned student in" in sentence and "earlier version" in sentence and "with --force pruned" in sentence
