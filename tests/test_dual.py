"""Encoders of one embedding space: the model, what a recipe of it may not say, and a whole run of it."""

import json
import shutil

import numpy as np
import pytest
import stand_in_runtime
import tiny
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from tiny_project import distill, distill_process, make_project, refusal

from distill import estimate, pipeline
from distill.contracts import UserError
from distill.data.prepared import PreparedData
from distill.dual import DualEncoder
from distill.evaluate import only
from distill.predict import load
from distill.recipe import load_recipe
from distill.retrieval import pairs_of, search
from distill.runs import read_json
from distill.runtimes import RUNTIMES
from distill.verification import verify_answers
from distill.workspace import STUDENT
from students import ConvNet, StaticEmbeddings

RECIPE = """\
version: 1
name: dual
data:
  source: {type: table, path: rows.csv}
  modalities: {image: image, text: caption}
  targets: {colour: colour}
  group: family
  id: id
  working_size: 32
  augment: {image: {flip: 0.5, shift: 2}, text: {word_dropout: 0.1}}
teacher:
  encoders:
    image: {type: convnet, widths: [8, 16], blocks: [0, 1]}
    text: {type: pretrained_text, weights: "path:bert", max_length: 12}
  fusion: null
  embedding_dim: 16
  train: {epochs: 6, batch_size: 16, lr: 0.003, ema: 0.9}
  objective:
    - {loss: clip_infonce, embedding: "image,text", positives: [text], params: {logit_scale: learned}}
student:
  encoders:
    image: {type: convnet, widths: [8, 8], blocks: [0, 1]}
    text: {type: static_embeddings, vocab_size: 64, dim: 8, max_length: 12}
  fusion: null
  embedding_dim: 16
  inherit: {text: {type: token_embeddings}}
  train: {epochs: 2, batch_size: 16, lr: 0.003, accumulate: 2}
  baseline:
    - {loss: siglip, embedding: "image,text", params: {logit_scale: learned, logit_bias: learned}}
  objective:
    - {loss: clip_infonce, embedding: "image,text", positives: [text, image], params: {logit_scale: learned}}
    - {loss: clip_relational_kl, embedding: "image,text", params: {student_scale: learned, teacher_scale: own}}
    - {loss: clip_fd, embedding: "image,text"}
    - {loss: cosine, embedding: text}
retrieval: {prompts: {colour: ["a {} sun", "{}"]}}
transfer: {texts: 32}
cache: {views: 2}
prune: {ratio: 0.25, round_to: 2, train: {epochs: 1, batch_size: 16}}
export: {min_agreement_int8: 0.9, quantize: {calibration_rows: 16}}
bench: {repeats: 10}
report: {bootstrap: 100, examples: 2}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its folder and what the command printed."""
    folder = tmp_path_factory.mktemp("dual")
    make_project(folder)
    (folder / "dual.yaml").write_text(RECIPE, encoding="utf-8")
    return folder, distill_process("run", "dual.yaml", cwd=folder)


@pytest.fixture
def run(finished, monkeypatch):
    """The finished run's folder; tests leave it as it is."""
    folder, answer = finished
    assert answer.code == 0, answer.err
    monkeypatch.chdir(folder)
    return folder / "runs" / "dual"


@pytest.fixture
def model(wordpiece_file):
    torch.manual_seed(0)
    text = StaticEmbeddings(tokenizer_file=wordpiece_file, vocab_size=60, dim=8)
    return DualEncoder({"image": ConvNet(widths=[4, 8], blocks=[0, 1]), "text": text}, 6).eval()


def test_embeddings_have_length_one_and_each_encoder_answers_alone(model):
    batch = tiny.make_batch()
    said = model(batch)
    assert said.logits == {} and set(said.embeddings) == {"image", "text"}
    for name, vectors in said.embeddings.items():
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(batch.ids)))
        alone = model(only(batch, name)).embeddings
        torch.testing.assert_close(alone[name], vectors)
        assert all(not other.any() for key, other in alone.items() if key != name)


def test_the_model_of_one_encoder_says_the_same(model):
    batch = tiny.make_batch()
    for name, vectors in model(batch).embeddings.items():
        said = model.alone(name)(only(batch, name)._replace(present={name: batch.present[name]})).embeddings
        assert set(said) == {name}
        torch.testing.assert_close(said[name], vectors)


def test_rows_without_a_modality_send_no_gradient(model):
    batch = only(tiny.make_batch(), "text")
    model.train()(batch).embeddings["image"].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.embedders["image"].parameters())


def test_a_projected_encoder_keeps_its_width():
    encoders = {name: ConvNet(widths=[4, 8], blocks=[0, 1]) for name in ("image", "text")}
    encoders["image"].projected = True
    with pytest.raises(UserError, match="the encoder of image projects to 8 numbers and embedding_dim is 6"):
        DualEncoder(encoders, 6)
    assert not list(DualEncoder(encoders, 8).embedders["image"].parameters())


def test_the_report_tells_recall_and_zero_shot_accuracy_of_every_model(run):
    report = read_json(run / "report" / "report.json")
    models = ["teacher", "baseline", "student", "pruned", "onnx-fp32", "onnx-int8"]
    assert list(report["tasks"]) == ["colour, zero-shot"]
    for direction in ("image_to_text", "text_to_image"):
        found = report["retrieval"][direction]
        assert list(found["models"]) == models and found["queries"] == 9
        for measures in found["models"].values():
            shares = [measures[f"recall@{k}"]["value"] for k in (1, 5, 10)]
            assert 0 <= shares[0] <= shares[1] <= shares[2] == 1  # there are nine to find
            assert 1 <= measures["median_rank"] <= 9
        against = {(c["model"], c["reference"]) for c in found["comparisons"]}
        assert {("student", "baseline"), ("onnx-int8", "pruned"), ("pruned", "teacher")} <= against
    assert [model["name"] for model in report["models"] if model["quality"]["colour, zero-shot"]] == models
    assert "of the teacher's recall@1" in report["headline"]["title"]
    for name in ("report.md", "report.html"):
        content = (run / "report" / name).read_text(encoding="utf-8")
        assert "Retrieval" in content and "Image to text" in content


def test_each_encoder_is_a_bundle_that_runs_alone_and_says_the_same(run):
    rows = [{"image": str(path)} for path in sorted((run.parents[1] / "images").glob("*.png"))[:5]]
    texts = [{"text": text} for text in ("a red sun", "a small blue cat")]
    for stage, name in (("export", "onnx-fp32"), ("quantize", "onnx-int8")):
        image, text = (load(run / stage / f"{name}-{modality}") for modality in ("image", "text"))
        assert image.inputs == ["image", "image_present"] and image.outputs == ["embedding_image"]
        found = image.embed(rows, batch_size=2)["image"]
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
        both = load(run / stage / name).embed([{**row, "text": "a red sun"} for row in rows])
        np.testing.assert_allclose(both["image"], found, atol=1e-5)
        np.testing.assert_allclose(both["text"][0], text.embed(texts)["text"][0], atol=1e-5)
        with pytest.raises(UserError, match="gives embeddings and has no classes to predict"):
            image.predict(rows)
    gate = read_json(run / "export" / "manifest.json")["info"]["parity"]["onnx-fp32"]
    assert set(gate) == {"embedding.image", "embedding.text"} and gate["embedding.text"]["agreement"] > 0.9999


def test_each_encoder_runs_alone_on_other_runtimes_too(run, tmp_path, monkeypatch):
    shutil.copytree(run.parents[1], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    with stand_in_runtime.installed():
        changes = ("export.bundles=[executorch-fp32,executorch-int8]", "export.quantize.keep_float=[encoders.image]")
        answer = distill("evaluate", "dual.yaml", *changes)
        assert answer.code == 0, answer.err
        folder = tmp_path / "copy" / "runs" / "dual"
        texts = [{"text": text} for text in ("a red sun", "a small blue cat")]
        expected = load(folder / "export" / "onnx-fp32-text").embed(texts)["text"]
        for name in ("executorch-fp32", "executorch-int8"):
            text, image = (load(folder / "quantize" / f"{name}-{modality}") for modality in ("text", "image"))
            assert text.info["runtime"] == "executorch" and text.info["inputs"]["text"]["shape"] == ["batch", 12]
            np.testing.assert_allclose(text.embed(texts)["text"], expected, atol=1e-5)
            assert image.inputs == ["image", "image_present"] and image.outputs == ["embedding_image"]
        said, torch_said = (load_file(folder / f"evaluate/{n}.safetensors") for n in ("executorch-int8", "pruned"))
        for name in ("embedding.image", "embedding.text", "logits.colour, zero-shot"):
            np.testing.assert_allclose(said[name], torch_said[name], atol=1e-3)


def test_encoders_that_run_elsewhere_alone_bring_rows_of_their_own(run, tmp_path, monkeypatch):
    class Elsewhere(stand_in_runtime.StandIn):
        @classmethod
        def elsewhere(cls):
            return "it runs on the moon alone"

    shutil.copytree(run.parents[1], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    with stand_in_runtime.installed() as patch:
        patch.setitem(RUNTIMES, "executorch", Elsewhere)
        answer = distill("evaluate", "dual.yaml", "export.bundles=[executorch-fp32]")
        assert answer.code == 0, answer.err
        patch.setitem(RUNTIMES, "executorch", stand_in_runtime.StandIn)
        for name, outputs in (("", ["image", "text"]), ("-image", ["image"]), ("-text", ["text"])):
            bundle = tmp_path / "copy/runs/dual/quantize" / f"executorch-fp32{name}"
            assert "moon" in load(bundle).info["info"]["not_run"]
            found = verify_answers(bundle)
            assert found["rows"] > 0 and [*found["outputs"]] == [f"embedding_{each}" for each in outputs]
            assert all(entry["relative"] < 1e-4 for entry in found["outputs"].values())


def test_the_example_of_a_card_runs(run, monkeypatch, capsys):
    folder = run / "quantize" / "onnx-int8-text"
    example = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(example)
    assert "array" in capsys.readouterr().out


def test_scales_are_learnt_left_behind_and_the_teachers_is_known(run):
    info = read_json(run / "teacher" / "manifest.json")["info"]
    assert info["own_scale"]["logit_scale"] != pytest.approx(1 / 0.07, abs=1e-4)
    from safetensors import safe_open

    with safe_open(run / "student" / "model.safetensors", framework="np") as tensors:
        assert not [name for name in tensors.keys() if "scale" in name or "keys" in name]  # noqa: SIM118
    last = json.loads((run / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"valid/recall@1", "valid/image_to_text_recall@5"} <= last.keys()


def test_a_second_run_has_nothing_to_do(run):
    answer = distill("run", "dual.yaml", "--dry-run", "--json")
    states = {entry["stage"]: entry["state"] for entry in json.loads(answer.out)["stages"]}
    assert set(states.values()) == {"up to date"}


def test_a_run_without_any_target_reaches_its_teacher(run):
    changes = ("name=plain", "data.targets={}", "retrieval={}", "teacher.train.epochs=1")
    done = pipeline.run(load_recipe("dual.yaml", changes), until="teacher", quiet=True)
    data = done["data"].info
    assert data["rows"] == data["labelled"] and data["num_classes"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("retrieval=null", "teacher.fusion is null, and such a model is measured by retrieval; add 'retrieval: {}'"),
        ("student.dropout=0.2", "student.dropout is for models with fusion, and student.fusion is null; leave it out"),
        ("retrieval.prompts.shape=['a {}']", "retrieval.prompts.shape: the data has no task 'shape'"),
        ("retrieval.prompts.colour=['a sun']", "give texts in which '{}' stands once for the name of a class"),
        (
            "student.baseline=[{loss: cross_entropy, task: colour}]",
            "no task 'colour', as there is no task or no fusion",
        ),
        ("student.baseline=[{loss: cosine, embedding: fused}]", "a term reads a teacher, and this stage has none"),
        ("teacher.objective=[]", "teacher.objective is empty, and the teacher has something to learn; add a term"),
        ("teacher.objective.0.params={}", "no term of teacher.objective learns a logit_scale; set it to 'learned'"),
        ("student.objective.2.positives=[text]", "clip_fd takes no positives; leave them out, or use clip_infonce"),
        ("student.objective.1.params.student_scale=own", "student_scale is 'own': Input should be a valid number"),
        (
            "student.objective.1.params.teacher_scale=learned",
            "teacher_scale is 'learned': Input should be a valid number",
        ),
        ("student.objective.0.positives=[group]", ""),
        ("data.labelled=0.5", ""),
        ("student.fusion={type: concat, dim: 8}", ""),
    ],
)
def test_mistakes_are_refused_in_a_sentence(run, change, message):
    answer = distill("validate", "dual.yaml", change)
    if not message:
        assert answer.code == 0, answer.err
    else:
        assert message in refusal(answer)


def test_positives_by_group_need_a_group(run):
    answer = distill("validate", "dual.yaml", "data.group=null", "student.objective.0.positives=[group]")
    assert "student.objective[0].positives: the data names no group column; set data.group" in refusal(answer)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [("teacher", ""), ("ema", "teacher_scale: only of the run's own teacher is it known"), ("other", "teacher_scale:")],
)
def test_the_scale_of_the_runs_own_teacher_alone_is_known(run, teacher, message):
    other = "teachers={other: {run: runs/dual}}" if teacher == "other" else "teachers={}"
    changes = ["name=second", other, f"student.objective.1.teacher={teacher}"]
    answer = distill("validate", "dual.yaml", *changes, "student.train.ema=0.9", "prune.train.ema=0.9")
    assert answer.code == 0 if not message else message in refusal(answer)


def test_the_estimate_counts_the_rows_that_each_model_reads(run, monkeypatch):
    monkeypatch.setattr(estimate, "_seconds_a_row", lambda model, batch: 1.0)
    few = ["data.labelled=0.2", "name=few"]
    found = estimate.estimate(load_recipe("dual.yaml", few), pipeline.ENCODERS)
    rows = found["rows"]["train"]
    assert found["labelled"] < rows
    assert [found["seconds"][name] for name in ("teacher", "baseline")] == [6 * rows, 2 * rows]


def test_its_taps_are_listed(run):
    answer = distill("inspect", "dual.yaml", "--json")
    assert answer.code == 0, answer
    found = json.loads(answer.out)
    paths = {name: {tap["path"]: tap["shape"] for tap in model["taps"]} for name, model in found.items()}
    for taps in paths.values():
        assert taps["embedders.image"] == taps["embedders.text"] == [16] and "encoders.image" in taps
        assert not [path for path in taps if path.startswith(("fusion", "heads", "unimodal_heads"))]
    assert not [note for model in found.values() for note in model["notes"] if "classes" in note]


def test_dual_models_of_another_run_and_the_own_average_teach(run):
    terms = [
        '{loss: clip_relational_kl, embedding: "image,text", teacher: earlier, params: {student_scale: learned}}',
        '{loss: clip_relational_kl, embedding: "image,text", teacher: ema}',
        "{loss: cosine, embedding: text, teacher: earlier}",
    ]
    changes = [f"student.objective=[{', '.join(terms)}]", "student.train.ema=0.9", "prune.train.ema=0.9"]
    changes += ["name=again", "transfer.texts=0", "teachers={earlier: {run: runs/dual, stage: pruned}}"]
    said = []
    done = pipeline.run(load_recipe("dual.yaml", changes), until="student", quiet=True, say=said.append)
    assert any(line.startswith("teacher: copied from") for line in said)
    history = [json.loads(line) for line in (done["student"].path / "metrics.jsonl").read_text().splitlines()]
    assert {f"train/clip_relational_kl/image,text@{name}" for name in ("earlier", "ema")} <= history[0].keys()
    assert all(np.isfinite(value) for entry in history for value in entry.values())


def test_no_labels_can_be_hidden_where_there_are_none(run):
    changes = ("name=hidden", "data.targets={}", "retrieval={}", "data.labelled=0.5")
    with pytest.raises(UserError, match="hides labels, and data"):
        pipeline.run(load_recipe("dual.yaml", changes), until="data", quiet=True)


def test_validation_reads_the_recall_of_the_kept_weights(run):
    recipe = load_recipe("dual.yaml")
    done = {item.stage.name: item.artifact for item in pipeline.plan(recipe)}
    assert all(done.values())
    work = pipeline.workspace(recipe, done)
    measure, select = work.validator(work.model(STUDENT), STUDENT)
    assert select == "valid/recall@1"
    assert measure(work.model(STUDENT))[select] == pytest.approx(done["student"].info["best"])


def test_repeated_images_are_one_query(tmp_path, monkeypatch):
    """Two captions an image: as in COCO, its file occurs in a row for each."""
    make_project(tmp_path)
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    second = [
        line.replace(",a ", ",the ", 1).replace(line.split(",")[0], f"9{line.split(',')[0]}", 1) for line in lines[1:]
    ]
    (tmp_path / "rows.csv").write_text("\n".join([*lines, *second]) + "\n")
    (tmp_path / "dual.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    pipeline.run(load_recipe("dual.yaml"), until="data", quiet=True)
    data = PreparedData.open(tmp_path / "runs" / "dual" / "data")
    rows = data.rows("test")
    codes = {"image": data.codes["image"][rows], "text": data.texts.numbers[rows]}
    pairs = pairs_of(codes, {name: data.present[name][rows] for name in codes})
    assert len(rows) == 18 and len(pairs.first_rows["image"]) == 9 and len(pairs.first_rows["text"]) == 18
    near = F.normalize(torch.randn(len(data), 8, generator=torch.Generator().manual_seed(0)), dim=1).numpy()
    ideal = {"image": near[codes["image"]], "text": near[codes["image"]]}
    assert set(search(ideal, pairs, "image_to_text").rank) == {1}


@pytest.mark.slow
def test_models_with_fusion_and_heads_are_measured_beside_their_tasks(tmp_path, monkeypatch):
    recipe = make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = pipeline.run(load_recipe(recipe, ["retrieval={prompts: {shape: ['a {}']}}", "bench.repeats=10"]), quiet=True)
    report = read_json(done["report"].path / "report.json")
    assert list(report["tasks"]) == ["colour", "shape", "shape, zero-shot"]
    for model in report["models"]:
        assert set(model["quality"]) == set(report["tasks"])
        assert model["name"] in report["retrieval"]["image_to_text"]["models"]
    assert "colour accuracy" in report["headline"]["title"]
