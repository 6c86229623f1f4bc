"""What a user can get wrong: each ends in one sentence that says what, where and what was near, and exit code 2."""

import csv
import re

import pytest
from tiny_project import distill, distill_process, make_project, refusal

from distill.runs import locked, read_json


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


@pytest.fixture
def project(shared, monkeypatch):
    """A project that tests leave as it is."""
    monkeypatch.chdir(shared)
    return shared


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A project to break."""
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_rows(folder, change):
    """Rewrite the table, row by row; rows for which ``change`` returns None are dropped."""
    with open(folder / "rows.csv", encoding="utf-8", newline="") as file:
        rows = [change(row) for row in csv.DictReader(file)]
    kept = [row for row in rows if row is not None]
    with open(folder / "rows.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, kept[0].keys())
        table.writeheader()
        table.writerows(kept)


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("student.trian.lr=1", r"recipe\.yaml: unknown key 'student\.trian'; did you mean 'train'\? choices: baseline"),
        ("data.augment.image.flop=1", r"unknown key 'data\.augment\.image\.flop'; did you mean 'flip'\?"),
        ("student.objective.0.weigth=1", r"unknown key 'student\.objective\.0\.weigth'; did you mean 'weight'\?"),
        ("student.train.lr=fast", r"recipe\.yaml: 'student\.train\.lr' is 'fast': Input should be a valid number"),
        ("student.train.lr=-1", r"'student\.train\.lr' is -1: Input should be greater than 0"),
        ("student.train.optimizer=adm", r"'student\.train\.optimizer' is 'adm': did you mean 'adam'\? choices: ada"),
        ("trackers=[tensorbord]", r"'trackers\.0' is 'tensorbord': did you mean 'tensorboard'\? choices: mlflow, te"),
        (
            "student.train.optimizer_params={beta: 1}",
            r"student\.train\.optimizer_params: adamw has no parameter 'beta'; did you mean 'betas'\?",
        ),
        (
            "prune.train.optimizer_params.eps=-1.0",
            r"prune\.train\.optimizer_params: adamw cannot be built: Invalid epsilon value: -1\.0",
        ),
        (
            "teacher.train.optimizer_params.eps=small",
            r"train\.optimizer_params\.eps is 'small': Input should be a valid",
        ),
        ("student.train.lr_scale={fusion: -1}", r"'student\.train\.lr_scale\.fusion' is -1: Input should be greater"),
        ("student.train.milestones=[0.5,2]", r"'student\.train\.milestones\.1' is 2: Input should be less than 1"),
        ("teacher.encoders=3", r"'teacher\.encoders' is 3: Input should be a mapping of keys"),
        ("teacher.objective=kd", r"'teacher\.objective' is 'kd': Input should be a list"),
        ("version=2", r"'version' is 2: Input should be 1"),
        ("name=a/b", r"'name' is 'a/b': String should match pattern"),
        ("teacher=nope", r"no teacher file 'nope' in .+ or among the packaged ones; choices: .*minilm_fusion"),
        ("data=emji", r"no data file 'emji' in .+; did you mean 'emoji'\?"),
        ("student=emoji_smal", r"no student file 'emoji_smal' in .+; did you mean 'emoji_small'\?"),
        ("epochs", r"override 'epochs' is not an assignment; write it as a\.b=value"),
        ("=3", r"override '=3' is not an assignment"),
        ("student..dropout=3", r"override 'student\.\.dropout=3' is not an assignment"),
        ("prune.modules=[a", r"override 'prune\.modules=\[a' cannot be applied to .+recipe\.yaml: while parsing"),
        ("student.objective.9.weight=1", r"override .+ cannot be applied to .+: list index out of range"),
        ("name=${nope}", r"recipe\.yaml: a reference cannot be resolved: Interpolation key 'nope' not found"),
        (
            "teacher.encoders.image.type=convnte",
            r"teacher\.encoders\.image: unknown type 'convnte'; did you mean 'conv",
        ),
        ("teacher.encoders.image.widht=3", r"teacher\.encoders\.image: convnet has no parameter 'widht'; did you mean"),
        ("teacher.encoders.image.widths=3", r"teacher\.encoders\.image\.widths is 3: Input should be a list"),
        ("teacher.encoders.image={type: convnet}", r"teacher\.encoders\.image: convnet needs the parameter 'widths'"),
        ("teacher.encoders.audio={type: convnet}", r"teacher\.encoders: the data has no modality 'audio'; choices"),
        (
            "teacher.fusion.type=cross_atention",
            r"teacher\.fusion: unknown type 'cross_atention'; did you mean 'cross_attention'",
        ),
        ("teacher.fusion.heads=2.5", r"teacher\.fusion\.heads is 2\.5: Input should be a valid integer"),
        ("student.heads={size: {type: linear}}", r"student\.heads: the data has no task 'size'; choices"),
        (
            "student.objective.0.loss=cros_entropy",
            r"student\.objective\[0\]: unknown loss 'cros_entropy'; did you mean",
        ),
        (
            "student.objective.2.params.temp=2",
            r"student\.objective\[2\]: kd has no parameter 'temp'; did you mean 'tempe",
        ),
        ("student.objective.0.task=color", r"student\.objective\[0\]: no task 'color'; did you mean 'colour'\?"),
        (
            "teacher.objective.2.task=shape.audio",
            r"teacher\.objective\[2\]: no task 'shape\.audio'; did you mean 'shap",
        ),
        (
            "student.objective.3={loss: clip_fd, embedding: 'image,text'}",
            r"student\.objective\[3\]: clip_fd compares embeddings of one width, and student\.embedding_dim is 8 "
            r"where the teacher's are 32 wide \(embedding_dim · members\); set it to 32, or use clip_relational_kl",
        ),
        (
            "student.objective.3.embedding='image,text'",
            r"student\.objective\[3\]: cosine reads one embedding, got 'image,",
        ),
        ("student.objective.3.embedding=fuse", r"student\.objective\[3\]: no embedding 'fuse'; did you mean 'fused'\?"),
        (
            "student.objective.2={loss: regression_kd, task: colour}",
            r"student\.objective\[2\]: regression_kd is for regression, and task 'colour' is a classification",
        ),
        ("student.baseline.0.loss=kd", r"student\.baseline: a term reads a teacher, and this stage has none"),
        ("student.inherit.text.type=token", r"student\.inherit\.text: unknown type 'token'; did you mean 'token_embed"),
        (
            "student.inherit.image={type: token_embeddings}",
            r"student\.inherit\.image: token_embeddings fills an encoder",
        ),
        (
            "student.inherit.image={type: encoder_weights}",
            r"student\.inherit\.image: encoder_weights: widths is \[8, 8\] in student\.encoders\.image and \[8, 16\]",
        ),
        ("student.inherit.audio={type: encoder_weights}", r"encoder_weights: the student has no such encoder; choices"),
        ("teacher.pretrain.imag={}", r"teacher\.pretrain\.imag: the teacher has no such encoder; did you mean 'image'"),
        ("teacher.pretrain.text={}", r"teacher\.pretrain\.text: no term of teacher\.objective is on the head of text"),
        ("data.targets={colour: colour, shape@1: shape}", r"data\.targets: 'shape@1' cannot name a task; leave out"),
        ("student.train.lr=.inf", r"'student\.train\.lr' is inf: Input should be a finite number"),
        ("teacher.train.weight_decay=.nan", r"'teacher\.train\.weight_decay' is nan: Input should be a finite number"),
        ("teacher.members=0", r"'teacher\.members' is 0: Input should be greater than or equal to 1"),
        ("student.members=2", r"unknown key 'student\.members'"),
        (
            "data.targets={type: shape}",
            r"data\.targets: 'type' cannot name a task; .* words that torch uses can do with",
        ),
        ("teacher.head_weights={texd: 2}", r"teacher\.head_weights: no head 'texd'; did you mean 'text'\?"),
        (
            "student.head_weights={text: 0, fused: 0}",
            r"student\.head_weights\.text is 0, and rows that have text alone would get no",
        ),
        (
            "student.head_weights={text: -1}",
            r"'student\.head_weights\.text' is -1: Input should be greater than or equal",
        ),
        (
            "student.decision=vote",
            r"'student\.decision' is 'vote': choices: learned, mean, mixture, product",
        ),
        (
            "student.train.progressive_resizing={size: 32}",
            r"student\.train\.progressive_resizing\.size is 32 pixels, and data\.working_size is 32; give fewer",
        ),
        (
            "teacher.train.progressive_resizing={size: 16, until: 1}",
            r"'teacher\.train\.progressive_resizing\.until' is 1: Input should be less than 1",
        ),
        ("transfer.texts=9", r"transfer\.texts is 9, and a batch takes 16 of them; raise it or lower transfer\.ratio"),
        ("data.source.type=tabel", r"data\.source: unknown type 'tabel'; did you mean 'table'\?"),
        ("student.objective.2.weight=-1", r"'student\.objective\.2\.weight' is -1: Input should be greater than or"),
        ("student.objective.2.weight={from: 1}", r"'student\.objective\.2\.weight\.to' is missing; add it"),
        (
            "student.objective.2.weight={from: 1, to: 0, till: 1}",
            r"unknown key 'student\.objective\.2\.weight\.till'; did you mean 'until'\? choices: from, schedule, to",
        ),
        (
            "student.objective.2.params.temperature={from: 1}",
            r"student\.objective\[2\]\.params\.temperature is {'from': 1}: to: Field required; write {from: NUMBER",
        ),
        (
            "student.objective.2.params.temperature={from: 4, to: 0, until: 0.5}",
            r"student\.objective\[2\]\.params\.temperature is 0\.0: Input should be greater than 0",
        ),
        (
            "student.objective.4={loss: token_mse, taps: {student: token_necks.text, teacher: token_necks.text}}",
            r"student\.objective\[4\]: token_mse reads the tokens of texts, .*; set cache\.enabled to false",
        ),
        ("data.source.path=3", r"data\.source\.path is 3: Input should be a valid string"),
    ],
)
def test_config(project, override, sentence):
    assert re.search(sentence, refusal(distill("validate", "recipe.yaml", override)))


def test_the_runs_own_teacher_may_be_named(project):
    assert distill("validate", "recipe.yaml", "student.objective.2.teacher=teacher").code == 0


def test_weights_of_heads_need_heads(project):
    chosen = ("student.head_weights={text: 2}", "student.unimodal_heads=false")
    said = refusal(distill("validate", "recipe.yaml", *chosen))
    assert "student.head_weights: there is one head a task; set student.unimodal_heads or leave it out" in said


def test_small_images_have_no_full_maps_to_compare(project):
    chosen = ("student.objective.4.taps.student=encoders.image.stages", "prune.train.progressive_resizing={size: 16}")
    said = refusal(distill("validate", "recipe.yaml", *chosen))
    assert "prune.train.progressive_resizing: small images have smaller feature maps" in said
    assert "student.objective[4] compares them position by position; add ':mean' to its taps" in said


def test_a_vocabulary_is_cut_from_one_that_is_larger(project):
    static = "{type: static_embeddings, vocab_size: 40, dim: 8}"
    sentence = refusal(distill("validate", "recipe.yaml", f"teacher.encoders.text={static}"))
    assert "student.encoders.text.vocab_size is 64, and is cut from the teacher's, which has 40" in sentence
    (project / "blind.yaml").write_text((project / "recipe.yaml").read_text().replace("    text: {type: pre", "    # "))
    sentence = refusal(distill("validate", "blind.yaml", "teacher.objective=[{loss: cross_entropy, task: colour}]"))
    assert "student.inherit.text: token_embeddings reads the teacher's text encoder, and it has none" in sentence


@pytest.mark.parametrize(
    ("modality", "encoder", "sentence"),
    [
        ("text", "{type: convnet, widths: [4], blocks: [0]}", "convnet reads image; for text choices: open_clip_text,"),
        ("image", "{type: audio_convnet, widths: [4], blocks: [0]}", "audio_convnet reads audio; for image did you"),
        ("image", "{type: tabular_mlp, dim: 4}", "tabular_mlp reads tabular; for image choices: convnet,"),
    ],
)
def test_an_encoder_of_another_modality(project, modality, encoder, sentence):
    said = refusal(distill("validate", "recipe.yaml", f"student.encoders.{modality}={encoder}"))
    assert f"student.encoders.{modality}: {sentence}" in said


def test_recipe_files(project):
    sentence = refusal(distill("run", "quickstrat"))
    assert "no recipe file 'quickstrat' in" in sentence and "did you mean 'quickstart'?" in sentence
    assert "no teacher file 'minilm_fusio'" in refusal(distill("run", "recipe.yaml", "--teacher", "minilm_fusio"))
    (project / "broken.yaml").write_text("a: [1\nb: 2\n")
    assert "broken.yaml: not readable as YAML" in refusal(distill("run", "broken.yaml"))
    (project / "list.yaml").write_text("- 1\n")
    assert "list.yaml: expected a mapping of keys, found a list" in refusal(distill("run", "list.yaml"))
    (project / "twice.yaml").write_text("version: 1\nversion: 1\n")
    assert "twice.yaml: not readable as YAML" in refusal(distill("run", "twice.yaml"))
    (project / "short.yaml").write_text("version: 1\n")
    assert "short.yaml: 'name' is missing; add it (and 3 more)" in refusal(distill("run", "short.yaml"))


def test_the_error_of_a_part_names_the_part_file(project):
    (project / "part.yaml").write_text("encoderz: {}\n")
    assert "part.yaml: 'teacher.encoders' is missing" in refusal(distill("run", "recipe.yaml", "--teacher", "part"))


def test_stages(project):
    assert "--force: unknown stage 'prune'; did you mean 'pruned'?" in refusal(
        distill("run", "recipe.yaml", "--force", "prune")
    )
    sentence = refusal(distill("train", "recipe.yaml", "--force", "report"))
    assert "--force: stage 'report' is not needed for 'student'" in sentence


@pytest.mark.parametrize("arguments", [("run", "--dry-run"), ("cache",)])
@pytest.mark.parametrize(
    "override, sentence",
    [
        ("data.source.path=nowhere.csv", r"no table /.+/nowhere\.csv; give a \.parquet"),
        ("data.source.path=bert/config.json", r"has the unknown suffix '\.json'; did you mean '\.jsonl'\?"),
        ("data.source.path=sample:emojy", r"no packaged sample 'emojy'; did you mean 'emoji'\?"),
        ("data.modalities.image=picture", r"rows\.csv has no column 'picture'; choices: caption, colour"),
        ("data.targets.colour=color", r"rows\.csv has no column 'color'; did you mean 'colour'\?"),
        ("data.split=fold", r"rows\.csv has no column 'fold'"),
        ("data.group=famly", r"rows\.csv has no column 'famly'; did you mean 'family'\?"),
        ("data.id=colour", r"column 'colour', row 0: 'red' is not an integer id"),
        ("data.modalities.text=id", r"column 'id', row 0: 1000 is not a text"),
    ],
)
def test_data(project, arguments, override, sentence):
    assert re.search(sentence, refusal(distill(arguments[0], "recipe.yaml", override, *arguments[1:])))


def test_an_empty_split(own):
    change_rows(own, lambda row: None if row["split"] == "valid" else row)
    assert "rows.csv has no usable row of split 'valid'" in refusal(distill("run", "recipe.yaml"))


def test_a_class_in_test_that_training_never_saw(own):
    change_rows(own, lambda row: {**row, "shape": "star"} if row["id"] == "1050" else row)
    sentence = refusal(distill("run", "recipe.yaml"))
    assert re.search(
        r"rows\.csv: task 'shape': class 'star' of split 'test' never occurs in train; move some", sentence
    )


def test_images_that_do_not_decode_are_listed_and_skipped_up_to_the_limit(own):
    (own / "images/000.png").write_bytes(b"no image")
    (own / "images/001.png").unlink()
    sentence = refusal(distill("cache", "recipe.yaml"))
    assert "2 of 96 rows cannot be used, more than data.max_bad_fraction 0.01 allows" in sentence
    assert "the first is id 1000" in sentence and "images/000.png" in sentence
    assert distill("cache", "recipe.yaml", "data.max_bad_fraction=0.05").code == 0
    listed = read_json(own / "runs/tiny/data/data_report.json")["bad_rows"]
    assert listed["count"] == 2 and [row["id"] for row in listed["rows"]] == [1000, 1001]
    assert all(row["reason"] and row["where"].endswith(".png") for row in listed["rows"])


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("weights=path:nowhere", r"pretrained weights are not there: path:/.+/nowhere: no config\.json in"),
        (
            "weights=package:not-there/model",
            r"weights are not there: package:not-there/model: package 'not-there' is not",
        ),
        ("weights=bert", r"weights 'bert': expected hub:ID, path:FOLDER or package:NAME/FOLDER"),
        ("sha256=00ff", r"sha256 of model\.safetensors is [0-9a-f]{64}, the recipe pins 00ff"),
    ],
)
def test_weights(project, override, sentence):
    answer = distill("cache", "recipe.yaml", f"teacher.encoders.text.{override}")
    assert re.search(sentence, refusal(answer))


def test_values_that_only_a_builder_or_a_stage_can_judge(project):
    def refused(override):
        return refusal(distill("cache", "recipe.yaml", override))

    assert "convnet cannot be built: widths has 3 stages" in refused("teacher.encoders.image.widths=[8, 8, 8]")
    early = distill("train", "recipe.yaml", "student.encoders.text.vocab_size=20", "name=early")
    assert "vocab_size 20 does not fit" in refusal(early) and not (project / "runs/early/teacher").exists()
    sentence = refused("student.objective.4.taps.teacher=encoders.image.stagez:mean")
    assert "the model has no module 'encoders.image.stagez'; did you mean 'encoders.image.stages'?" in sentence


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        ("encoders.image.stagez", "encoders.image.stages", "no module 'encoders.image.stagez'; did you mean"),
        ("encoders.image.stages", "encoders.image.stagez", "no module 'encoders.image.stagez'; did you mean"),
        ("necks.image", "encoders.image.stages", "no projector fits features of shapes .*`distill inspect` lists them"),
        ("encoders.text.table", "unimodal_heads", "tap 'unimodal_heads' of the teacher says nothing"),
    ],
)
def test_a_wrong_tap_is_found_before_the_teacher_is_fitted(project, student, teacher, sentence):
    taps = [f"student.objective.4.taps.student={student}", f"student.objective.4.taps.teacher={teacher}"]
    assert re.search(sentence, refusal(distill("train", "recipe.yaml", "name=taps", *taps)))
    assert not (project / "runs/taps/teacher").exists()
    assert re.search(sentence, refusal(distill("run", "recipe.yaml", "name=taps", "--dry-run", *taps)))


def test_run_folder(project):
    with locked(project / "runs/used"):
        sentence = refusal(distill_process("run", "recipe.yaml", "name=used", cwd=project))
    assert "runs/used is in use by another process; wait for it to end or choose another name" in sentence
    assert "output: runs are written to a folder, and s3://bucket/runs is a URL" in refusal(
        distill("run", "recipe.yaml", "output=s3://bucket/runs")
    )
    assert not (project / "s3:").exists()
    (project / "taken").write_text("a file")
    assert "run folder taken/tiny cannot be written" in refusal(distill("run", "recipe.yaml", "output=taken"))


def test_predict(project):
    assert "bert is not a bundle: it has no bundle.json" in refusal(distill("predict", "bert", "--text", "a"))
    assert "nothing to classify" in refusal(distill("predict", "bert"))


def test_processes_refuse_the_same_way(project):
    assert "unknown key 'student.trian'" in refusal(
        distill_process("run", "recipe.yaml", "student.trian.lr=1", cwd=project)
    )
    sentence = refusal(distill_process("run", "recipe.yaml", "data.source.path=nowhere.csv", cwd=project))
    assert "nowhere.csv" in sentence
