"""A whole run through the command line, and what the next run of the same folder does and leaves alone."""

import csv
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from tiny_project import distill, distill_process, make_project, refusal, run_python, start_distill
from tokenizers import Tokenizer

from distill import engine, pipeline, runs
from distill.build import input_spec
from distill.contracts import UserError
from distill.predict import load
from distill.recipe import load_recipe
from distill.runs import locked, read_json

MODELS = ["teacher", "baseline", "student", "pruned", "onnx-fp32", "onnx-int8"]
NAMES = [name for name in pipeline.NAMES if name != "qat"]  # which no bundle of the recipe needs
AFTER_STUDENT = ["pruned", "export", "quantize", "evaluate", "bench", "report"]
AFTER_CACHE = ["student", *AFTER_STUDENT]
UNUSED = ("transfer", "pretrain")  # by the recipe
AFTER_DATA = [name for name in NAMES if name not in ("data", *UNUSED)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its folder and what the command printed."""
    folder = tmp_path_factory.mktemp("whole")
    make_project(folder)
    return folder, distill_process("run", "recipe.yaml", cwd=folder)


@pytest.fixture
def project(finished, monkeypatch):
    """The finished run's folder as working directory; tests leave it as it is."""
    monkeypatch.chdir(finished[0])
    return finished[0]


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of the finished run, to break."""
    shutil.copytree(finished[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def to_do(*arguments):
    """The stages that a run would do."""
    answer = distill("run", *arguments, "--dry-run", "--json")
    assert answer.code == 0, answer
    return [entry["stage"] for entry in json.loads(answer.out)["stages"] if entry["state"] == "to do"]


def manifests(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/tiny/*/manifest.json")}


def test_run_ends_well_and_prints_only_its_own_lines(finished):
    _, answer = finished
    assert answer.code == 0, answer.err
    for stage in NAMES:
        assert re.search(rf"^{stage}: done in [\d.]+ s \([\d.]+ CPU-seconds\)$", answer.out, re.MULTILINE)
    assert "report: runs/tiny/report/report.html" in answer.out
    before_the_table = answer.out[: answer.out.index("┏")].splitlines()
    assert [line.partition(": ")[0] for line in before_the_table] == [name for name in NAMES for _ in range(2)]
    for line in answer.err.splitlines():
        assert re.match(r"[a-z0-9 ]+: \d+/\d+ \([\d.]+/s, \d+ s", line), line


def test_report_keeps_its_contract(project):
    report = read_json(project / "runs/tiny/report/report.json")
    assert {"schema_version", "data", "models", "comparisons"} <= report.keys()
    assert [model["name"] for model in report["models"]] == MODELS
    for model in report["models"]:
        for task in ("colour", "shape"):
            quality = model["quality"][task]
            low, high = quality["ci95"]
            assert 0 <= low <= quality["accuracy"] <= high <= 1
            assert {"macro_f1", "ece", "agreement_with_teacher", "retention"} <= quality.keys()
        for field in ("stage", "runtime", "seeds"):
            assert model[field]
        for field in ("num_params", "flops", "size_bytes", "peak_memory_bytes"):
            assert model[field] > 0
        assert 0 < model["latency_ms"]["p50"] <= model["latency_ms"]["p95"]
    assert report["data"]["rows"] == {"train": 72, "valid": 15, "test": 9}
    assert report["data"]["test_fingerprint"] != report["data"]["fingerprint"]
    assert all(entry["step"] > 0 for epochs in report["curves"].values() for entry in epochs)


def test_report_tells_which_labels_the_teacher_doubts(project):
    folder = project / "runs/tiny/report"
    found = read_json(folder / "report.json")["doubts"]
    with open(folder / "label_doubts.csv", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    for task in ("colour", "shape"):
        splits = found[task]["splits"]
        assert {split: counts["judged"] for split, counts in splits.items()} == {"train": 72, "test": 9}
        assert sum(counts["doubted"] for counts in splits.values()) == sum(line["task"] == task for line in written)
    ids = {split: {line["id"] for line in written if line["split"] == split} for split in ("train", "test")}
    with open(project / "rows.csv", encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert all(rows[number]["split"] == split for split, numbers in ids.items() for number in numbers)
    assert written and all(rows[line["id"]][line["task"]] == line["given"] != line["answer"] for line in written)


@pytest.mark.parametrize("stage, bundle", [("export", "onnx-fp32"), ("quantize", "onnx-int8")])
def test_bundles_predict(project, stage, bundle):
    image = project / "images/005.png"
    answer = distill("predict", project / "runs/tiny" / stage / bundle, "--image", image, "--text", "a sun", "--json")
    (row,) = json.loads(answer.out)
    assert row["predictions"]["colour"]["label"] in ("red", "green", "blue")
    assert len(row["predictions"]["shape"]["top"]) == 3


def test_a_recipe_names_its_bundles(copied):
    names = ["onnx-fp16", "onnx-int8-dynamic", "onnx-int8-weights", "onnx-int4-weights"]
    change = f"export.bundles=[{','.join(names)}]"
    assert to_do("recipe.yaml", change) == ["quantize", "evaluate", "bench", "report"]
    answer = distill("run", "recipe.yaml", change, "report.bootstrap=100")
    assert answer.code == 0, answer.err
    report = read_json(Path("runs/tiny/report/report.json"))
    assert [model["name"] for model in report["models"]] == [*MODELS[:5], *names]
    assert report["parity"].keys() == {"onnx-fp32", *names}
    for name in names:
        bundle = Path("runs/tiny/quantize") / name
        assert read_json(bundle / "bundle.json")["info"]["precision"] in (bundle / "README.md").read_text()
        assert distill("predict", bundle, "--text", "a red cat").code == 0
    assert not Path("runs/tiny/quantize/onnx-int8").exists()
    said = refusal(distill("run", "recipe.yaml", "export.bundles=[onnx-fp61]"))
    assert "there is no bundle 'onnx-fp61'; did you mean 'onnx-fp16'" in said


def test_bundles_without_embeddings_answer_the_same_and_say_that_they_have_none(copied):
    before = load(Path("runs/tiny/export/onnx-fp32"))
    rows = [{"text": text, "image": copied / "images/005.png"} for text in ("a red cat", "a sun")]
    expected = before.run(before.feeds(rows))
    assert distill("quantize", "recipe.yaml", "export.embeddings=false").code == 0
    for stage, bundle in (("export", "onnx-fp32"), ("quantize", "onnx-int8")):
        found = load(Path("runs/tiny") / stage / bundle)
        assert set(found.outputs) == {"colour", "shape"} and set(before.outputs) > set(found.outputs)
        nodes = [node.name for node in onnx.load(Path("runs/tiny") / stage / bundle / "model.onnx").graph.node]
        assert not any("embedders" in name for name in nodes)
        with pytest.raises(
            UserError, match=r"tiny onnx-.* gives no embeddings; export it with export\.embeddings=true"
        ):
            found.embed(rows)
        if bundle == "onnx-fp32":
            for name, values in found.run(found.feeds(rows)).items():
                np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-6)


def test_predict_prints_a_line_a_task_and_names_rows(project):
    bundle = project / "runs/tiny/quantize/onnx-int8"
    one = distill("predict", bundle, "--text", "a red cat", "--top-k", "1")
    assert re.fullmatch(r"colour: \w+ [\d.]+%\nshape: \w+ [\d.]+%\n", one.out)
    two = distill("predict", bundle, "--text", "a red cat", "--text", "a moon")
    assert two.out.splitlines()[0] == "a red cat" and two.out.splitlines()[3] == "a moon"


def test_predict_imports_no_torch(project):
    arguments = ["predict", str(project / "runs/tiny/quantize/onnx-int8"), "--text", "a red cat"]
    code = f"import sys; from distill.cli import main\ntry: main({arguments!r})\nfinally: print('torch' in sys.modules)"
    out = run_python(code)
    assert out.splitlines()[-1] == "False"
    assert out.startswith("colour: ")


def test_second_run_does_nothing(project):
    before, began = manifests(project), time.monotonic()
    answer = distill("run", "recipe.yaml")
    assert answer.code == 0 and "done in" not in answer.out and answer.err == ""
    assert "report: " in answer.out
    assert manifests(project) == before and len(before) == len(NAMES)
    assert time.monotonic() - began < 10


def test_json_stands_alone_on_standard_output(project):
    answer = distill("run", "recipe.yaml", "--json")
    found = json.loads(answer.out)
    assert found["run"] == "runs/tiny"
    assert [model["name"] for model in found["models"]] == MODELS


def test_json_of_a_run_that_works_sends_its_lines_to_standard_error(copied):
    answer = distill("cache", "recipe.yaml", "--force", "towers", "--json")
    assert json.loads(answer.out)["rows"] == 72
    assert "cache: done in" in answer.err and "fill teacher cache: 144/144" in answer.err


@pytest.mark.parametrize(
    "verb, stage",
    [
        ("train", "student"),
        ("cache", "cache"),
        ("prune", "pruned"),
        ("export", "export"),
        ("quantize", "quantize"),
        ("evaluate", "evaluate"),
        ("bench", "bench"),
    ],
)
def test_each_verb_ends_at_its_stage(project, verb, stage):
    assert distill(verb, "recipe.yaml").out == f"{verb}: runs/tiny/{stage}\n"
    found = json.loads(distill(verb, "recipe.yaml", "--json").out)
    assert found["path"] == f"runs/tiny/{stage}" and found["cost"]["seconds"] > 0


def test_compare(project, tmp_path):
    other = tmp_path / "tiny"
    shutil.copytree("runs/tiny/report", other / "report")
    answer = distill("compare", "runs/tiny", other, "--json")
    assert answer.code == 0 and json.loads(answer.out)
    assert "onnx-int8" in distill("compare", "runs/tiny", other, "--markdown", "table.md").out
    assert Path("table.md").read_text().startswith("# Comparison of runs\n")
    assert "no report in nowhere/report" in refusal(distill("compare", "runs/tiny", "nowhere"))
    (other / "report/report.json").write_text("{")
    assert "a report is damaged" in refusal(distill("compare", "runs/tiny", other))


@pytest.mark.parametrize(
    "override, expected",
    [
        ("seed=0", []),
        ("report.bootstrap=200", ["report"]),
        ("bench.repeats=11", ["bench", "report"]),
        ("export.quantize.method=entropy", ["quantize", "evaluate", "bench", "report"]),
        ("export.embeddings=false", AFTER_STUDENT[1:]),
        ("prune.ratio=0.3", AFTER_STUDENT),
        ("student.objective.2.weight=2", AFTER_CACHE),
        ("student.train.epochs=3", ["baseline", *AFTER_CACHE]),
        ("student.dropout=0.1", ["baseline", "inherit", *AFTER_CACHE]),
        ("student.inherit.text.freeze=false", ["inherit", *AFTER_CACHE]),
        ("student.encoders.text.vocab_size=70", ["vocabulary", "baseline", "inherit", *AFTER_CACHE]),
        ("cache.dtype=float32", ["cache", *AFTER_CACHE]),
        ("teacher.train.epochs=4", ["towers", "teacher", "cache", "inherit", *AFTER_CACHE]),
        ("transfer.texts=20", ["transfer", "cache", *AFTER_CACHE]),
        ("transfer.ratio=2", ["report"]),
        ("data.augment.image.flip=0.1", [name for name in AFTER_DATA if name != "vocabulary"]),
        ("data.working_size=16", NAMES),
    ],
)
def test_an_option_reruns_what_depends_on_it(project, override, expected):
    assert to_do("recipe.yaml", override) == expected


def test_bundles_read_words_as_the_student_does(project):
    """Its vocabulary has fewer rows than tokens, so some share an id, in the bundle as in training."""
    student = Tokenizer.from_file("runs/tiny/inherit/tokenizer.json")
    rows = student.get_vocab()
    assert len({*rows.values()}) <= 64 < len(rows)
    for name in ("onnx-fp32", "onnx-int8"):
        (file,) = Path("runs/tiny").glob(f"*/{name}/tokenizer.json")
        bundled = Tokenizer.from_file(str(file))
        assert bundled.get_vocab() == rows
        assert len(bundled.encode("a " * 50).ids) == 12 == bundled.truncation["max_length"]


def test_force_reruns_a_stage_and_its_descendants(project):
    assert to_do("recipe.yaml", "--force", "cache") == ["cache", *AFTER_CACHE]
    assert to_do("recipe.yaml", "--force", "bench", "--force", "baseline") == [
        "baseline", "export", "quantize", "evaluate", "bench", "report"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "stage", "changed"),
    [
        ("transfer.texts=20", "cache", "transfer.texts"),
        ("seed=3", "teacher", "seed"),
        ("teacher.train.lr=0.5", "cache", "teacher.train.lr"),
        ("data.augment.image.flip=0.1", "cache", "data.augment.image.flip"),
        ("data.working_size=16", "report", "data.working_size"),
        ("cache.dtype=float32", "student", "cache.dtype"),
    ],
)
def test_a_plan_says_why_a_stage_is_made_again(project, override, stage, changed):
    stages = json.loads(distill("run", "recipe.yaml", override, "--dry-run", "--json").out)["stages"]
    (about,) = (entry["about"] for entry in stages if entry["stage"] == stage)
    assert about.endswith(f"what lies there was made with another {changed}")


def test_changed_data_is_named(copied):
    shutil.copy(copied / "images/001.png", copied / "images/000.png")
    stages = json.loads(distill("run", "recipe.yaml", "--dry-run", "--json").out)["stages"]
    reasons = {entry["about"].partition("; ")[2] for entry in stages}
    assert reasons == {"what lies there was made with another source.files"}


def test_a_run_says_what_it_replaces_and_a_forced_one_does_not(copied):
    words = "what lies there was made with another transfer.texts"
    assert words in distill("cache", "recipe.yaml", "transfer.texts=20").out
    assert "what lies there" not in distill("cache", "recipe.yaml", "transfer.texts=20", "--force", "cache").out


def test_long_work_of_other_settings_is_not_replaced_unasked(copied):
    manifest = copied / "runs/tiny/teacher/manifest.json"
    content = json.loads(manifest.read_text())
    content["info"]["cost"]["seconds"] = 4000.0
    manifest.write_text(json.dumps(content))
    assert distill("run", "recipe.yaml").code == 0
    refused = distill("run", "recipe.yaml", "teacher.train.lr=0.5")
    assert refused.code == 2 and manifest.exists()
    assert refused.err.strip() == (
        "error: runs/tiny holds teacher (1 h 6 min of work) that this run would replace, as what lies there was made "
        "with another teacher.train.lr; choose another name=... to keep it, or replace it with --force teacher"
    )
    assert distill("run", "recipe.yaml", "teacher.train.lr=0.5", "name=other", "--dry-run").code == 0
    assert distill("train", "recipe.yaml", "teacher.train.lr=0.5", "--force", "teacher").code == 0


@pytest.mark.parametrize("change", ["student.train.lr=0.5", "teacher.train.lr=0.5"])
def test_what_was_made_from_a_forced_stage_goes_with_it_and_other_work_stays(copied, change):
    runs = copied / "runs/tiny"
    assert distill("train", "recipe.yaml", change).code == 0  # before that, all were of one recipe
    assert distill("cache", "recipe.yaml", "--force", "teacher").code == 0
    kept = {name for name in ("student", "pruned", "report") if (runs / name / "manifest.json").exists()}
    same_teacher = change.startswith("student")
    assert kept == (set() if same_teacher else {"student"})  # it has another teacher


def test_unfinished_long_work_counts_too(copied):
    folder = copied / "runs/tiny/student"
    (folder / "manifest.json").unlink()
    os.utime(folder / "model.safetensors", (time.time() + 4000,) * 2)
    refused = distill("run", "recipe.yaml", "student.train.lr=0.5")
    assert refused.code == 2 and "student (1 h" in refused.err and "another student.train.lr" in refused.err
    assert (folder / "model.safetensors").exists()


def test_damage_to_a_large_cache_is_found_when_it_is_read_and_mended_by_the_same_command(copied, monkeypatch):
    monkeypatch.setattr(runs, "LARGE", 0)  # so that a start reads no file that was not touched
    shards = sorted((copied / "runs/tiny/cache").glob("shard-*.safetensors"))
    bad, times = shards[1], (shards[1].stat().st_atime_ns, shards[1].stat().st_mtime_ns)
    whole, others = bad.read_bytes(), {path: path.stat().st_ino for path in shards if path != bad}
    bad.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(bad, ns=times)
    assert to_do("recipe.yaml") == []
    refused = distill("train", "recipe.yaml", "--force", "student")
    assert refused.code == 2 and f"{bad.name} has changed since it was written" in refused.err
    again = distill("train", "recipe.yaml")
    assert again.code == 0 and "cache: done" in again.out and "teacher: done" not in again.out
    assert bad.read_bytes() == whole and {path: path.stat().st_ino for path in others} == others
    bad.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(bad, ns=tuple(getattr(bad.stat(), name) for name in ("st_atime_ns", "st_mtime_ns")))
    assert distill("cache", "verify", "runs/tiny").code == 1  # finds it too, and so the next run makes it again
    assert distill("cache", "recipe.yaml").code == 0 and bad.read_bytes() == whole


def test_the_resolved_recipe_is_the_same_run_from_anywhere(project, tmp_path, monkeypatch):
    resolved, runs = project / "runs/tiny/recipe.resolved.yaml", project / "runs"
    monkeypatch.chdir(tmp_path)
    assert to_do(resolved, f"output={runs}") == []
    assert to_do(project / "recipe.yaml", f"output={runs}") == []


def test_a_moved_project_is_up_to_date(copied):
    assert to_do("recipe.yaml") == []


def test_changed_data_reruns_everything(copied):
    shutil.copy(copied / "images/001.png", copied / "images/000.png")
    assert to_do("recipe.yaml") == NAMES


def test_changed_weights_rerun_all_but_the_data(copied):
    file = copied / "bert/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert to_do("recipe.yaml") == AFTER_DATA


@pytest.mark.parametrize("name", ["cache/shard-view1-00000.safetensors", "teacher/model.safetensors"])
def test_a_damaged_file_reruns_its_stage_and_is_made_again(copied, name):
    file = copied / "runs/tiny" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    stage = name.partition("/")[0]
    assert to_do("recipe.yaml") == [stage]
    before = manifests(copied)
    assert distill("cache", "recipe.yaml").code == 0
    assert file.read_bytes() == whole
    assert [path.parent.name for path, changed in manifests(copied).items() if before[path] != changed] == [stage]


def identities(folder):
    """File -> what changes when it is written again."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if path.name != "index.safetensors"]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    "name, kept",
    [
        ("cache/shard-view1-00000.safetensors", {"shard-view0-00000.safetensors"}),
        ("cache/shard-view1-00000.json", {"shard-view0-00000.safetensors"}),
        ("cache/cache.json", {"shard-view0-00000.safetensors", "shard-view1-00000.safetensors"}),
        ("towers/text/index.safetensors", {"text/shard-00000.safetensors"}),
    ],
)
def test_cache_and_towers_make_only_damaged_files_again(copied, name, kept):
    file = copied / "runs/tiny" / name
    stage = copied / "runs/tiny" / name.partition("/")[0]
    before, whole = identities(stage), {path: path.read_bytes() for path in stage.rglob("*.safetensors")}
    file.write_bytes(file.read_bytes()[:-7])
    assert distill("train", "recipe.yaml").code == 0
    after = identities(stage)
    assert {name for name in after if after[name] == before[name]} >= kept
    assert {path: path.read_bytes() for path in stage.rglob("*.safetensors")} == whole
    if name.endswith("view1-00000.safetensors"):
        assert after["shard-view1-00000.safetensors"] != before["shard-view1-00000.safetensors"]
    assert to_do("recipe.yaml") == []


def test_training_does_not_go_on_in_a_damaged_folder(copied):
    assert [stage.name for stage in pipeline.STAGES if stage.mends] == ["towers", "cache"]
    before = identities(copied / "runs/tiny/teacher")
    (copied / "runs/tiny/teacher/metrics.jsonl").write_text("")
    assert distill("cache", "recipe.yaml").code == 0
    after = identities(copied / "runs/tiny/teacher")
    assert before.keys() == after.keys() and not [name for name in after if after[name] == before[name]]
    assert (copied / "runs/tiny/teacher/metrics.jsonl").read_text()


def test_damage_found_while_training_is_mended_by_the_same_command(copied, monkeypatch):
    shard, plan = copied / "runs/tiny/cache/shard-view1-00000.safetensors", pipeline.plan
    weights = (copied / "runs/tiny/student/model.safetensors").read_bytes()

    def damaging(*arguments, **options):
        planned = plan(*arguments, **options)
        shard.write_bytes(shard.read_bytes()[:-1])
        return planned

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "plan", damaging)
        sentence = refusal(distill("train", "recipe.yaml", "--force", "student"))
    assert "shard-view1-00000.safetensors is absent or has another size" in sentence
    assert "run the same command again" in sentence
    before = identities(copied / "runs/tiny/cache")
    answer = distill("train", "recipe.yaml")
    assert answer.code == 0 and "cache: done" in answer.out and "student: done" in answer.out
    after = identities(copied / "runs/tiny/cache")
    assert [name for name in after if after[name] != before[name]] == [shard.name]
    assert (copied / "runs/tiny/student/model.safetensors").read_bytes() == weights


def test_force_starts_afresh_and_marks_descendants_of_other_verbs(copied):
    shard = copied / "runs/tiny/cache/shard-view0-00000.safetensors"
    before = shard.stat().st_mtime_ns
    answer = distill("cache", "recipe.yaml", "--force", "teacher")
    assert "teacher: done" in answer.out and "cache: done" in answer.out
    assert shard.stat().st_mtime_ns > before
    assert to_do("recipe.yaml") == ["inherit", *AFTER_CACHE]


def same_weights(first, second):
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_killed_process_goes_on_to_the_same_weights(copied):
    arguments = ("cache", "recipe.yaml", "teacher.train.epochs=8")
    process = start_distill(*arguments, "name=stopped", cwd=copied)
    metrics = copied / "runs/stopped/teacher/metrics.jsonl"
    while not metrics.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("error: stopped by SIGINT; state saved in ")
    assert (copied / "runs/stopped/teacher/checkpoint").is_dir()
    again = distill(*arguments, "name=stopped")
    assert again.code == 0 and "data: done" not in again.out and "teacher: done" in again.out
    assert distill(*arguments, "name=whole").code == 0
    assert same_weights("runs/stopped/teacher/model.safetensors", "runs/whole/teacher/model.safetensors")


@pytest.mark.parametrize("step", [7, 10, 15])  # inside an epoch, at its end, at the end of training
def test_a_run_stopped_at_any_step_goes_on_to_the_same_weights(copied, monkeypatch, step):
    def note(state):
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return ""

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_note", note)
        answer = distill("train", "recipe.yaml", "name=stopped")
    assert answer.code == 143 and "error: stopped by SIGTERM; state saved in" in answer.err
    assert distill("train", "recipe.yaml", "name=stopped").code == 0
    for stage in ("teacher", "student"):
        assert same_weights(f"runs/stopped/{stage}/model.safetensors", f"runs/tiny/{stage}/model.safetensors")


def test_an_encoder_that_learns_alone_first_goes_on_where_it_was_stopped(copied, monkeypatch):
    alone = (
        "{epochs: 2, batch_size: 16, lr_scale: {encoders.image: 0}}"  # its heads alone: what is frozen must not stay so
    )
    arguments = ("cache", "recipe.yaml", f"teacher.pretrain.image={alone}")
    assert distill(*arguments, "name=whole").code == 0
    for step in (3, 12):  # in the pretraining, and behind it: 10 steps alone come first
        seen = []

        def note(state, seen=seen, step=step):
            seen.append(state.step)
            if len(seen) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return ""

        with monkeypatch.context() as patched:
            patched.setattr(engine, "_note", note)
            assert distill(*arguments, f"name=stopped{step}").code == 143
        assert distill(*arguments, f"name=stopped{step}").code == 0
        for file in ("teacher/model.safetensors", "pretrain/image/model.safetensors"):
            assert same_weights(f"runs/stopped{step}/{file}", f"runs/whole/{file}")
    assert not same_weights("runs/whole/teacher/model.safetensors", "runs/tiny/teacher/model.safetensors")


def test_an_encoder_that_had_learnt_when_it_was_killed_leaves_no_checkpoint(copied, monkeypatch):
    settings = ["teacher.pretrain.image={epochs: 2, batch_size: 16, checkpoint_minutes: 1e-9}", "name=killed"]
    recipe = load_recipe("recipe.yaml", settings)

    def die(place):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(engine.checkpoint, "remove", die)
        with pytest.raises(MemoryError):
            pipeline.run(recipe, until="pretrain", quiet=True)
    folder = Path("runs/killed/pretrain/image")
    assert (folder / "checkpoint").is_dir()
    learnt = load_file(folder / "model.safetensors")
    pipeline.run(recipe, until="pretrain", quiet=True)
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "model.safetensors"}
    again = load_file(folder / "model.safetensors")
    assert all((again[name] == value).all() for name, value in learnt.items())


def test_a_frozen_tower_that_learns_alone_is_kept_as_it_is_then(copied):
    tuned = ["teacher.pretrain.text={epochs: 1, batch_size: 16, lr: 0.003, group_by_length: true}"]
    tuned += ["teacher.objective.2.task=shape.text", "name=tuned"]
    recipe = load_recipe("recipe.yaml", tuned)
    work = pipeline.workspace(recipe, pipeline.run(recipe, until="cache", quiet=True))
    begun, fitted, blank = work.pretrained_teacher().eval(), work.teacher(), work.blank("teacher")
    before, after, never = (model.encoders["text"].tower.state_dict() for model in (begun, fitted, blank))
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = [name for name in before if not torch.equal(before[name], never[name])]
    assert any("layer.0" in name for name in changed) and any("word_embeddings" in name for name in changed)
    spec = {"teacher": input_spec(fitted)}
    loader = work.clean_loader("test", spec["teacher"], "teacher")
    for raw, kept in zip(loader.epoch(0), work.towers(loader, fitted).epoch(0), strict=True):
        live = fitted(raw["teacher"]).logits["shape.text"]
        assert torch.allclose(live, fitted(kept["teacher"]).logits["shape.text"], atol=2e-2)
        assert not torch.allclose(live, begun(raw["teacher"]).logits["shape.text"], atol=2e-2)  # its head learnt on


@pytest.mark.parametrize("settings, expected", [([], 0), (["data.decode_once=false"], 1), (["workers=3"], 3)])
def test_a_cpu_makes_its_own_batches_unless_images_are_to_be_decoded(project, settings, expected):
    assert pipeline.workspace(load_recipe("recipe.yaml", settings), {}).workers == expected


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_of_training_unlocks_and_says_so(project, monkeypatch, number, code):
    handler = signal.getsignal(number)
    monkeypatch.setattr(pipeline, "plan", lambda *_, **__: os.kill(os.getpid(), number))
    answer = distill("run", "recipe.yaml")
    assert answer.code == code
    assert answer.err == f"error: stopped by {number.name}; run the same command again to go on\n"
    assert signal.getsignal(number) is handler
    with locked(project / "runs/tiny"):
        pass


def test_a_run_folder_in_use_is_refused(project):
    with locked(project / "runs/tiny"):
        assert "runs/tiny is in use by another process" in refusal(distill("run", "recipe.yaml"))


def test_dry_run_tells_rows_parameters_disk_and_time(project):
    found = json.loads(distill("run", "recipe.yaml", "--dry-run", "--json").out)
    assert found["rows"] == {"train": 72, "valid": 15, "test": 9}
    report = {model["name"]: model for model in read_json(project / "runs/tiny/report/report.json")["models"]}
    assert found["num_params"] == {name: report[name]["num_params"] for name in ("student", "teacher")}
    cache = sum(file.stat().st_size for file in (project / "runs/tiny/cache").iterdir())
    assert found["disk_bytes"]["cache"] == pytest.approx(cache, rel=0.1)
    assert found["disk_bytes"]["data"] == 96 * 3 * 32 * 32
    assert all(seconds > 0 for seconds in found["seconds"].values())
    lines = distill("run", "recipe.yaml", "--dry-run").out
    assert "time, roughly" in lines and "rows: 72 train, 15 valid, 9 test" in lines and "up to date" in lines


def test_dry_run_without_the_weights_says_what_is_missing(project):
    answer = distill("run", "recipe.yaml", "teacher.encoders.text.weights=path:nowhere", "--dry-run")
    assert answer.code == 0
    assert "not estimated: pretrained weights are not there" in answer.out and "teacher" not in answer.err
