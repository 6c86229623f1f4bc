"""A student of three teachers: its run's own, one of images alone, and one with another tokenizer and width."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import terms, write_clip
from tiny_project import distill, make_project, refusal

from distill import pipeline, stages
from distill.cache import TeacherCache, flatten
from distill.contracts import CLEAN_VIEW, Batch, Outputs, UserError
from distill.data.mixed import LABELLED
from distill.data.transforms import resize_images
from distill.fitted import find_fitted
from distill.losses.objective import Objective
from distill.losses.terms import tap_paths
from distill.multimodal import MultimodalModel, evaluating
from distill.other_teachers import Teachers, _listed
from distill.recipe import load_recipe
from distill.runs import read_json
from distill.stages import cache_key
from distill.workspace import STUDENT, TEACHER

CODES = {"red": 2, "green": 10, "blue": 33}  # sorted in one way as numbers and in another as texts
WITHOUT_IMAGE = (0, 5, 11)  # training rows
TAP = "encoders.image.stages:mean"
STUDENT_OF_IMAGES = [
    "student.encoders={image: {type: convnet, widths: [8], blocks: [0]}}",
    "student.inherit={}",
]
EYE = [
    "name=eye",
    "data.source.path=numbers.jsonl",
    "data.modalities={image: image}",
    "data.targets={colour: number}",
    "data.working_size=40",
    "teacher.encoders={image: {type: convnet, widths: [8, 12], blocks: [0, 0]}}",
    "teacher.fusion={type: concat, dim: 20}",
    "teacher.members=1",
    "teacher.unimodal_heads=false",
    "teacher.objective=[{loss: cross_entropy, task: colour}]",
    *STUDENT_OF_IMAGES,
    "student.baseline=[{loss: cross_entropy, task: colour}]",
    "student.objective=[{loss: kd, task: colour}]",
]
READER = [
    "name=reader",
    "data.source.path=texts.jsonl",
    "data.targets={shape: shape, colour: shape}",
    "teacher.encoders.text={type: pretrained_text, weights: 'path:clip', max_length: 20}",
    "teacher.fusion={type: cross_attention, dim: 24, heads: 2, depth: 1}",
    "teacher.embedding_dim=10",
    "teacher.objective=[{loss: cross_entropy, task: shape}]",
    *STUDENT_OF_IMAGES,
    "student.baseline=[{loss: cross_entropy, task: shape}]",
    "student.objective=[{loss: kd, task: shape}]",
]
OBJECTIVE = [
    {"loss": "cross_entropy", "task": "colour"},
    {"loss": "kd", "task": "colour"},
    {"loss": "kd", "task": "colour", "teacher": "eye"},
    {"loss": "fitnet", "taps": {"student": TAP, "teacher": TAP}, "teacher": "eye"},
    {"loss": "kd", "task": "shape.text", "teacher": "reader"},
    {"loss": "cosine", "embedding": "fused", "teacher": "reader"},
    {"loss": "dkd", "task": "colour", "teacher": ["teacher", "eye"], "mix": "confidence"},
    {"loss": "kd", "task": "colour", "teacher": ["eye", "teacher"], "mix": "learned"},
    {"loss": "dist", "task": "shape", "teacher": ["teacher", "reader"], "mix": {"average": "probabilities"}},
]
TEACHERS = "teachers={eye: {run: runs/eye}, reader: {run: runs/reader}}"
MAIN = [
    "data.source.path=texts.jsonl",
    "data.targets={colour: text, shape: shape}",
    TEACHERS,
    f"student.objective={json.dumps(OBJECTIVE)}",
    "transfer.texts=30",
    "cache.dtype=float32",
]
AFTER_CACHE = ["student", "pruned", "export", "quantize", "evaluate", "bench", "report"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the two other runs up to their teachers, and a whole run of the student."""
    folder = tmp_path_factory.mktemp("teachers")
    make_project(folder)
    write_clip(folder / "clip")
    with open(folder / "rows.csv", encoding="utf-8") as file:
        rows = [{**row, "id": int(row["id"]), "number": CODES[row["colour"]]} for row in csv.DictReader(file)]
    for row in rows:
        row["text"] = str(row["number"])
    lacking = [{**row, "image": None} if at in WITHOUT_IMAGE else row for at, row in enumerate(rows)]
    for name, table in (("numbers", rows), ("texts", lacking)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, table)))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for overrides in (EYE, READER):
            pipeline.run(load_recipe("recipe.yaml", overrides), until="teacher", quiet=True)
        answer = distill("run", "recipe.yaml", *MAIN)
    assert answer.code == 0, answer
    return folder


@pytest.fixture
def project(finished, monkeypatch):
    """That folder as working directory; tests leave it as it is."""
    monkeypatch.chdir(finished)
    return finished


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of that folder, to break."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def workspace(run=MAIN):
    """The finished stages of a run, by default of the student's."""
    recipe = load_recipe("recipe.yaml", run)
    planned = pipeline.plan(recipe)
    return pipeline.workspace(recipe, {item.stage.name: item.artifact for item in planned if item.artifact})


def to_do(*overrides):
    answer = distill("run", "recipe.yaml", *MAIN, *overrides, "--dry-run", "--json")
    assert answer.code == 0, answer
    return [entry["stage"] for entry in json.loads(answer.out)["stages"] if entry["state"] == "to do"]


def asked(work):
    """All teachers, and a batch of each for one view of every training row, in order of id."""
    teachers = Teachers(work.recipe, work.encoders, work.tasks(), work.teacher())
    loader = work.towers(work.train_loader(teachers.specs, work.recipe.student.train), teachers.own)
    rows = loader.row_positions
    return teachers, loader.batch(rows, torch.full((len(rows),), 1))


def test_the_cache_holds_what_all_teachers_say_live(project):
    work = workspace()
    teachers, batches = asked(work)
    live = flatten(teachers(batches))
    names = {
        f"{kind}.{name}@{teacher}"
        for teacher, kinds in {
            "eye": {"logits": ["colour"], "embeddings": ["image", "fused"], "features": [TAP]},
            "reader": {
                "logits": ["shape", "shape.fused", "shape.image", "shape.text"],
                "embeddings": ["image", "text", "fused"],
            },
        }.items()
        for kind, outputs in kinds.items()
        for name in outputs
    }
    assert {name for name in live if "@" in name} == names
    assert {"logits.colour", "logits.shape.text"} <= live.keys() and f"features.{TAP}" not in live
    cache = TeacherCache.open(work.path("cache"), cache_key(work))
    stored = flatten(cache(batches[TEACHER]))
    assert stored.keys() == live.keys()
    for name, value in live.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-3, atol=1e-4, msg=name)
    transfer = TeacherCache.open(work.path("cache") / "transfer", cache_key(work)).info["tensors"]
    assert {name.partition("@")[2] for name in transfer} == {"", "reader"}


@pytest.mark.fault
def test_teachers_without_memory_say_the_same_of_parts_of_a_batch(project, monkeypatch, caplog):
    teachers, batches = asked(workspace())
    whole, forward, sizes = flatten(teachers(batches)), MultimodalModel.forward, []

    def limited(self, batch, *rest):
        sizes.append(len(batch.ids))
        if len(batch.ids) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, batch, *rest)

    monkeypatch.setattr(MultimodalModel, "forward", limited)
    parts = flatten(teachers(batches))
    assert min(sizes) <= 10 < max(sizes) and "the teacher: it now reads batches in" in caplog.text
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_each_teacher_reads_inputs_of_its_own(project):
    work = workspace()
    teachers, batches = asked(work)
    eye, reader = (batches[f"{TEACHER}@{name}"] for name in ("eye", "reader"))
    assert list(eye.inputs) == ["image"] and {"image", "text", "text_mask"} == set(reader.inputs)
    assert reader.inputs["text"].shape != batches[TEACHER].inputs["text_mask"].shape  # byte pairs, not word pieces
    assert [tuple(teachers.specs[name].max_length for name in teachers.specs)] == [(12, 0, 20)]
    assert teachers(batches).embeddings["fused@reader"].shape[1] == 2 * 10  # two members


def test_logits_have_this_runs_order_of_classes_and_images_the_size_of_the_other_run(project):
    work = workspace()
    teachers, batches = asked(work)
    ours, theirs = list(work.tasks()["colour"].names), read_json(Path("runs/eye/data/labels.json"))["colour"]
    assert ours == ["10", "2", "33"] and theirs == ["2", "10", "33"]
    fitted = find_fitted("eye", work.recipe)
    assert fitted.columns(work.tasks()) == {"colour": [1, 0, 2]}
    batch = batches[f"{TEACHER}@eye"]
    assert batch.inputs["image"].shape[-1] == 32
    resized = batch._replace(inputs={"image": resize_images(batch.inputs["image"], 40)})
    with torch.no_grad():
        plain = fitted.model(work.encoders)(resized).logits["colour"]
    said = teachers(batches).logits["colour@eye"]
    for row, name in enumerate(ours):
        torch.testing.assert_close(said[:, row], plain[:, theirs.index(name)])
    there, truth = batch.present["image"], batch.targets["colour"]
    accuracy = [(logits.argmax(1) == truth)[there].float().mean() for logits in (said, plain)]
    assert accuracy[0] > accuracy[1]


def test_live_teachers_give_the_student_that_cached_ones_give(project):
    answer = distill("train", "recipe.yaml", *MAIN, "name=live", "cache.enabled=false")
    assert answer.code == 0, answer.err
    weights = [load_file(f"runs/{name}/student/model.safetensors") for name in ("tiny", "live")]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_terms_are_logged_apart_and_the_report_names_the_teachers(project):
    lines = [json.loads(line) for line in Path("runs/tiny/student/metrics.jsonl").read_text().splitlines()]
    names = ("kd/colour", "kd/colour@eye", f"fitnet/{TAP}@eye", "kd/shape.text@reader", "cosine/fused@reader")
    mixed = ("dkd/colour@teacher+eye", "kd/colour@eye+teacher", "dist/shape@teacher+reader")
    assert {f"train/{name}" for name in (*names, *mixed)} <= lines[-1].keys()
    shares = [lines[-1][f"train/mix/kd/colour@eye+teacher/{name}"] for name in ("eye", "teacher")]
    assert sum(shares) == pytest.approx(1) and shares[0] != 0.5
    report = read_json(Path("runs/tiny/report/report.json"))
    fingerprint = read_json(Path("runs/eye/teacher/manifest.json"))["fingerprint"]
    assert report["teachers"]["eye"] == {"run": "eye", "stage": "teacher", "fingerprint": fingerprint}
    assert [model["name"] for model in report["models"]][:2] == ["teacher", "baseline"]
    for file in ("report.html", "report.md"):
        assert f"teacher of run eye, {fingerprint}" in Path("runs/tiny/report", file).read_text()


def test_cache_info_tells_whose_outputs_it_holds(project):
    text = distill("cache", "info", "runs/tiny").out
    for words in ("logits.colour@eye: [3] float32", "embeddings.fused@reader: [20] float32", f"outputs@eye: ['{TAP}']"):
        assert words in text
    for name in ("eye", "reader"):
        assert f"  teacher@{name}: {read_json(Path(f'runs/{name}/teacher/manifest.json'))['fingerprint']}" in text
    assert "logits.colour@eye" not in text[text.index("transfer set") :]


def test_a_term_leaves_out_rows_of_which_its_teacher_could_read_nothing():
    """Rows of texts alone, as of a transfer set: a teacher of images has zeros there, of which nothing is learnt."""
    rows, images = 6, torch.tensor([True, True, True, True, False, False])
    present = {"image": images, "text": torch.ones(rows, dtype=torch.bool)}
    batch = Batch(torch.arange(rows), torch.full((rows,), CLEAN_VIEW), {}, present, {"kind": torch.arange(rows) % 3})
    generator = torch.Generator().manual_seed(0)

    def random(width):
        return torch.randn(rows, width, generator=generator)

    student = Outputs({"kind": random(3)}, {"fused": random(4)}, {"fusion": random(4)})
    theirs = {"kind": random(3), "fused": random(4), "encoders.image": random(4)}
    items = terms(
        {"loss": "kd", "task": "kind", "teacher": "eye"},
        {"loss": "dkd", "task": "kind", "teacher": "eye"},
        {"loss": "cosine", "embedding": "fused", "teacher": "eye"},
        {"loss": "fitnet", "taps": {"student": "fusion", "teacher": "encoders.image"}, "teacher": "eye"},
    )

    def losses(filler, reads):
        said = {f"{name}@eye": torch.where(images[:, None], value, filler) for name, value in theirs.items()}
        teacher = Outputs(said, said, said)
        objective = Objective(items, student, teacher, reads=reads)
        values = objective(student, teacher, batch)[1]
        return objective.num_rows(batch).tolist(), {name: value.item() for name, value in values.items()}

    counts, values = losses(0.0, {"eye": ["image"]})
    assert (counts, values) == losses(100.0, {"eye": ["image"]})
    assert counts == [4, 4, 4, 4]
    assert list(values) == ["kd/kind@eye", "dkd/kind@eye", "cosine/fused@eye", "fitnet/fusion@eye"]
    assert losses(0.0, {"eye": ["image", "text"]})[0] == [6, 6, 6, 4]  # the tap needs an image in any case
    assert losses(0.0, {})[1]["kd/kind@eye"] != values["kd/kind@eye"]
    own = Objective(terms({"loss": "kd", "task": "kind"}), student, student, reads={None: ["image"]})
    assert own.num_rows(batch).tolist() == [4]


def test_what_stands_in_rows_without_an_image_changes_no_term(project):
    """In the run itself, whose last rows of a batch are the transfer set's."""
    work = workspace()
    job = stages.student_job(work, work.path("student"))
    batches = job.loader.at(0, 0)
    batch, said = batches[STUDENT], job.teacher(batches)
    blind = ~batch.present["image"]
    transfer = slice(len(batches[STUDENT + LABELLED].ids), None)
    assert blind[transfer].all() and not said.logits["colour@eye"][transfer].any()
    assert said.logits["shape@reader"][transfer].any()

    def filled(name, value):
        rows = blind.view(-1, *[1] * (value.ndim - 1))
        return torch.where(rows, 50.0, value) if name.endswith("@eye") else value

    other = Outputs(*({name: filled(name, value) for name, value in part.items()} for part in said))
    with evaluating(job.tapped.model):
        answer = job.tapped(batch)
    values = [job.objective(answer, teacher, batch)[1] for teacher in (said, other)]
    torch.testing.assert_close(*values, rtol=0, atol=0)


def test_a_stage_counts_no_rows_that_its_model_cannot_read(project, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(stages, "fit_model", lambda work, job, *names: jobs.append(job) or {})
    stages.train_baseline(workspace(READER), tmp_path)
    batches = [batches[STUDENT] for batches in jobs[0].loader.epoch(0)]
    there = sum(int((batch.present["image"] & (batch.targets["shape"] >= 0)).sum()) for batch in batches)
    counted = sum(jobs[0].objective.num_rows(batch) for batch in batches)
    assert counted.tolist() == [there] and there < sum(int((batch.targets["shape"] >= 0).sum()) for batch in batches)


def test_taps_are_those_of_each_teacher():
    items = terms(*OBJECTIVE, {"loss": "fitnet", "taps": {"student": TAP, "teacher": "encoders.text"}})
    assert tap_paths(items, "teacher") == ["encoders.text"] and tap_paths(items, "teacher", "eye") == [TAP]
    assert tap_paths(items, "teacher", "reader") == [] and tap_paths(items, "student") == [TAP]


def test_a_run_is_up_to_date_wherever_the_other_runs_lie(copied):
    assert to_do() == []
    (copied / "runs/eye").rename(copied / "elsewhere")
    assert to_do("teachers.eye.run=elsewhere") == []
    pipeline.run(load_recipe("recipe.yaml", [*EYE, "output=.", "name=elsewhere", "student.dropout=0.1"]), until="data")
    assert to_do("teachers.eye.run=elsewhere") == []


def test_another_teacher_of_that_name_is_refused_by_the_old_cache_and_fills_a_new_one(copied):
    pipeline.run(load_recipe("recipe.yaml", [*EYE, "teacher.train.epochs=1"]), until="teacher", quiet=True)
    assert to_do() == ["cache", *AFTER_CACHE]
    work = workspace()
    with pytest.raises(UserError, match=r"was made with another teacher@eye, weights@eye \(teacher@eye: "):
        TeacherCache.open(copied / "runs/tiny/cache", cache_key(work))
    assert to_do(*only("reader", run="runs/reader", task="shape"), "transfer.texts=30") == ["cache", *AFTER_CACHE]
    assert distill("cache", "recipe.yaml", *MAIN).code == 0
    assert to_do() == AFTER_CACHE


def test_the_estimate_counts_all_teachers(project):
    found = json.loads(distill("run", "recipe.yaml", *MAIN, "--dry-run", "--json").out)
    size = sum(path.stat().st_size for path in Path("runs/tiny/cache").rglob("*") if path.is_file())
    assert found["disk_bytes"]["cache"] == pytest.approx(size, rel=0.1)
    assert {"teacher", "teacher@eye", "teacher@reader", "student"} == set(found["num_params"])


EARLIER = b'{"fingerprint": "a", "info": {}, "files": {"model.safetensors": {"sha256": "b"}}}'
TEXTS_ALONE = [
    "data.modalities={text: caption}",
    "teacher.encoders={text: {type: pretrained_text, weights: 'path:bert'}}",
    "teacher.objective=[{loss: cross_entropy, task: shape}]",
    "student.encoders={text: {type: static_embeddings, vocab_size: 64, dim: 8}}",
]


def only(name, run="runs/eye", loss="kd", task="colour", target=None):
    """Overrides for one further teacher, and one term that reads it."""
    term = json.dumps({"loss": loss, **(target or {"task": task}), "teacher": name})
    return [f"teachers={{{name}: {{run: {run}}}}}", f"student.objective=[{term}]", "transfer.texts=0"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["student.objective.2.teacher=eyes"],
            "[2]: no teacher 'eyes' under 'teachers'; did you mean",
        ),
        (["teachers={}"], "student.objective[2]: no teacher 'eye' under 'teachers'; there are none: add it"),
        (["student.objective=[{loss: kd, task: colour}]"], "teachers.eye: no term of student.objective reads it; add"),
        (["student.objective.0.teacher=eye"], "cross_entropy reads no teacher; leave out its key 'teacher'"),
        (["student.baseline.0.teacher=eye"], "student.baseline[0]: cross_entropy reads no teacher"),
        (only("eye", task="shape"), "student.objective[0]: teacher 'eye' has no task 'shape'; choices: colour"),
        (only("eye", task="colour.image"), "teacher 'eye' has no task 'colour.image'; did you mean 'colour'"),
        (
            only("eye", loss="cosine", target={"embedding": "text"}),
            "teacher 'eye' has no embedding 'text'; choices: fused, image",
        ),
        (only("teacher"), "'teacher' cannot name a teacher; use letters, digits"),
        (only("a-b"), "'a-b' cannot name a teacher; use letters, digits"),
        (only("eye", run="runs/none"), "runs/none holds no finished teacher; give the folder OUTPUT/NAME"),
        (only("eye", run="runs/tiny"), "teachers.eye.run is this run's own folder"),
        (["teachers.eye.runs=a"], "unknown key 'teachers.eye.runs'; did you mean 'run'"),
        (TEXTS_ALONE, "teachers.eye: it reads 'image', and the data has no such modality; choices: text"),
        (
            only("reader", run="runs/reader"),
            "student.objective[0]: teacher 'reader' has other classes of 'colour' than this run's data: "
            "it lacks '10', '2', '33' and has besides 'cat', 'moon', 'sun'; fit it",
        ),
        ([*only("eye"), "transfer.texts=30"], "no term of student.objective learns from the teacher without labels"),
    ],
)
def test_what_cannot_teach_is_refused_by_validate(project, overrides, sentence):
    found = refusal(distill("validate", "recipe.yaml", *MAIN, *overrides))
    assert sentence in found, found
    if "classes" in sentence:  # known as soon as the data is
        for command in (["run", "--dry-run"], ["cache"]):
            assert sentence in refusal(distill(command[0], "recipe.yaml", *MAIN, *overrides, *command[1:]))


def test_many_names_of_classes_are_told_in_part():
    assert _listed({"b", "a"}) == "'a', 'b'"
    assert _listed(set("abcdefg")) == "'a', 'b', 'c', 'd', 'e' and 2 more"


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("teacher/model.safetensors", b"x", "have changed since they were written"),
        ("teacher/manifest.json", b"[]", "manifest.json is damaged"),
        ("teacher/manifest.json", EARLIER, "was fitted by an earlier version"),
        ("data/labels.json", b'{"colour": ["10", "2", "33"]}', "labels.json has changed since the teacher there was"),
        ("data/labels.json", None, "recipe.resolved.json, data/labels.json or data/formats.json in"),
        ("recipe.resolved.json", b"{}", "recipe.resolved.json, data/labels.json or data/formats.json in"),
        ("data/formats.json", b'{"image": {"size": 9}}', "formats.json has changed since the teacher there was"),
    ],
)
def test_a_folder_that_changed_behind_its_teacher_is_refused(copied, file, content, sentence):
    path = copied / "runs/eye" / file
    path.unlink() if content is None else path.write_bytes(content)
    found = refusal(distill("validate", "recipe.yaml", *MAIN))
    assert found.startswith("teachers.eye.run: ") and sentence in found and "run its recipe again" in found


def test_another_recipe_in_the_folder_than_that_of_its_teacher_is_refused(copied):
    """Weights would fit: the same shapes, another reading of them."""
    pipeline.run(load_recipe("recipe.yaml", [*READER, "teacher.head_weights={text: 2}"]), until="data", quiet=True)
    sentence = refusal(distill("validate", "recipe.yaml", *MAIN))
    assert "runs/reader/recipe.resolved.json has changed since the teacher there was fitted" in sentence


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("tokenizer.json", "teachers.reader.run: its tokenizer has changed or gone since it was fitted"),
        ("config.json", "pretrained weights are not there"),
    ],
)
def test_pretrained_parts_that_changed_since_the_fit_are_refused(project, file, sentence):
    path = project / "clip" / file
    whole = path.read_text()
    try:
        path.write_text(whole + "\n") if file == "tokenizer.json" else path.unlink()
        found = refusal(distill("cache", "recipe.yaml", *MAIN, "name=other"))
    finally:
        path.write_text(whole)
    assert not (project / "runs/other/teacher").exists()  # nobody waited for the fit
    assert found.startswith("teachers.reader.run: ") and sentence in found


def test_paths_start_from_the_recipe(project, tmp_path, monkeypatch):
    text = Path("recipe.yaml").read_text() + "teachers: {eye: {run: runs/eye}}\n"
    (tmp_path / "with.yaml").write_text(text)
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "with.yaml").teachers["eye"].run == str(tmp_path / "runs/eye")
    assert load_recipe(tmp_path / "with.yaml", ["teachers.eye.run=tmp"]).teachers["eye"].run == "/tmp"
