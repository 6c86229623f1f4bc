"""What ``distill inspect`` lists: paths that taps accept, with the shapes that taps give."""

import json

import pytest
import torch
from tiny import SIZE, around, make_batch, make_model
from tiny_project import distill, make_project, refusal

from distill.build import example_batch, input_spec
from distill.contracts import UserError
from distill.data_config import DataConfig
from distill.multimodal import evaluating
from distill.tapped import Tapped
from distill.taps import chosen, list_taps
from students import ConvNet
from teachers import PretrainedText, PretrainedVision, TimmEncoder


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(*arguments):
    answer = distill("inspect", *arguments, "--json")
    assert answer.code == 0, answer
    return json.loads(answer.out)


def by_path(model):
    return {tap["path"]: tap for tap in model["taps"]}


def test_a_recipe_s_models_are_listed(project):
    found = listed("recipe.yaml")
    assert list(found) == ["student", "teacher"]
    student, teacher = (by_path(found[name]) for name in found)
    stage = student["encoders.image.stages.1"]
    assert stage | {"num_params": 0} == {
        "path": "encoders.image.stages.1",
        "shape": [8, 8, 8],
        "kind": "map",
        "num_params": 0,
        "module": "Sequential",
        "inside": 0,
        "trivial": False,
    }
    assert stage["num_params"] == 3 * 8 * 8 * 9 + 3 * 16
    assert student["encoders.text.table"]["kind"] == "tokens" and student["fusion"]["shape"] == [16]
    assert teacher["encoders.text.tower.encoder.layer.0"]["shape"] == [7, 16]
    assert teacher["encoders.image"]["kind"] == "tokens, 8x8"
    assert not {"encoders.image.stages.1.0", "necks.image.norm", "others.0.necks.image.norm"} & teacher.keys()
    assert {"necks.image", "others.0.fusion", "unimodal_heads.shape.text"} <= teacher.keys()
    notes = " ".join(found["teacher"]["notes"])
    assert "images of 32 pixels and texts of 7 tokens" in notes and "heads are shown with 2 classes" in notes
    assert "encoders.text is frozen" in notes and "encoders.image is" not in notes
    assert found["student"]["num_params"] > 0


def test_the_listing_is_a_table_and_can_be_narrowed(project):
    out = distill("inspect", "recipe.yaml").out
    assert "student: " in out and "more inside these: --depth 1, or --filter TEXT" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("  encoders.image.stages.1 "))
    assert row[1:] == ["8x8x8", "1,776", "map"]
    deeper = {tap["path"] for tap in listed("recipe.yaml", "--depth", "2")["student"]["taps"]}
    assert {"encoders.image.stages.0.0", "encoders.image.stages.1.2.conv1"} <= deeper
    assert "encoders.image.stages.0.1" not in deeper  # an activation
    for pattern in ("stages.0.1", "encoders.image.stages.0.[1]"):
        chosen_paths = [tap["path"] for tap in listed("recipe.yaml", "--filter", pattern)["student"]["taps"]]
        assert chosen_paths == ["encoders.image.stages.0.1"]
    assert "'stagez': no module path has this in it; did you mean 'stages'" in refusal(
        distill("inspect", "recipe.yaml", "--filter", "stagez")
    )


def test_a_filter_may_match_one_model_alone(project):
    found = listed("recipe.yaml", "--filter", "*.tower.encoder.layer.0")
    assert not found["student"]["taps"] and list(by_path(found["teacher"])) == ["encoders.text.tower.encoder.layer.0"]
    out = distill("inspect", "recipe.yaml", "--filter", "*.tower.encoder.layer.0").out
    assert "  no module path has '*.tower.encoder.layer.0' in it" in out and "  encoders.text.tower.encoder" in out


def test_a_teacher_s_part_needs_no_objective_to_be_listed(project):
    (project / "big.yaml").write_text(
        "encoders: {image: {type: convnet, widths: [4], blocks: [0]}}\nfusion: {type: concat, dim: 8}\n"
    )
    found = listed("big.yaml", "data.working_size=16")
    assert list(found) == ["teacher"] and by_path(found["teacher"])["heads.task"]["shape"] == [2]


def test_a_part_is_listed_alone(project):
    (project / "small.yaml").write_text(
        "encoders:\n  image: {type: convnet, widths: [4, 8], blocks: [0, 0]}\nfusion: {type: concat, dim: 8}\n"
        "baseline: [{loss: cross_entropy, task: hue}]\nobjective: [{loss: kd, task: hue.image}]\n"
    )
    found = listed("small.yaml", "data.working_size=16")
    assert list(found) == ["student"]
    taps = by_path(found["student"])
    assert taps["encoders.image.stages"]["shape"] == [8, 4, 4] and taps["heads.hue"]["shape"] == [2]
    assert list(listed("image_only")) == ["student"] and list(listed("quickstart", "--filter", "heads")) != []
    assert "did you mean 'image_only'" not in refusal(distill("inspect", "no_such_thing"))


def test_classes_are_those_of_a_run_that_has_counted_them(project):
    folder = project / "runs" / "tiny" / "data"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps({"colour": ["a", "b", "c"], "shape": ["d"]}))
    found = listed("recipe.yaml")["student"]
    assert by_path(found)["heads.colour"]["shape"] == [3] and by_path(found)["heads.shape"]["shape"] == [1]
    assert not any("classes" in note for note in found["notes"])


def test_weights_that_are_not_there_leave_the_other_model(project):
    missing = 'teacher.encoders.text={type: pretrained_text, weights: "path:nowhere"}'
    found = listed("recipe.yaml", missing)
    assert "pretrained weights are not there" in found["teacher"]["missing"] and found["student"]["taps"]
    assert "teacher: not listed: pretrained weights are not there" in distill("inspect", "recipe.yaml", missing).out
    (project / "teacher.yaml").write_text(
        "encoders: {text: {type: pretrained_text, weights: 'path:nowhere'}}\nfusion: {type: concat, dim: 8}\n"
        "objective: [{loss: cross_entropy, task: hue}]\n"
    )
    assert "pretrained weights are not there" in refusal(distill("inspect", "teacher.yaml"))


def test_shapes_need_no_weights_of_timm(project):
    timm = "teacher.encoders.image={type: timm, name: test_vit, pretrained: true}"
    found = listed("recipe.yaml", timm)["teacher"]
    assert "encoders.image is built without its weights" in " ".join(found["notes"])
    assert by_path(found)["encoders.image.net.blocks.0"]["kind"] == "tokens, 10x10 behind 1"


@pytest.mark.parametrize("wrong", ["student.encoders.image.type=convnt", "student.encoders.image.width=3"])
def test_a_mistake_in_a_part_is_one_sentence(project, wrong):
    assert "student.encoders.image: " in refusal(distill("inspect", "recipe.yaml", wrong))


def test_a_modality_that_the_data_lacks_is_refused(project):
    named = "student.encoders={sound: {type: convnet, widths: [4], blocks: [0]}}"
    assert "student.encoders: the data has no modality 'sound'" in refusal(distill("inspect", "recipe.yaml", named))


@pytest.mark.parametrize("image", ["convnet", "clip", "test_vit", "test_mambaout", "test_resnet"])
def test_every_tap_that_is_listed_gives_its_shape(image, clip_folder, bert_folder):
    size = 64 if image == "test_mambaout" else None
    vision = (
        ConvNet(widths=[4, 8], blocks=[0, 1])
        if image == "convnet"
        else PretrainedVision(weights=f"path:{clip_folder}")
        if image == "clip"
        else TimmEncoder(name=image, size=size)
    )
    model = around({"image": vision, "text": PretrainedText(weights=f"path:{bert_folder}")}, fusion="cross_attention")
    source, modalities = {"type": "table", "path": "rows.csv"}, {"image": "image", "text": "text"}
    data = DataConfig(source=source, modalities=modalities, working_size=SIZE)
    batch = example_batch(input_spec(model), data, rows=3, length=7)
    taps = list_taps(model, batch)
    assert {"encoders.image", "encoders.text", "fusion", "necks.image"} <= {tap.path for tap in taps}
    assert [tap.path.startswith("encoders.") for tap in taps] == sorted(
        (tap.path.startswith("encoders.") for tap in taps), reverse=True
    )
    with evaluating(model):
        features = Tapped(model, [tap.path for tap in taps])(batch).features
    assert {path: list(value.shape[1:]) for path, value in features.items()} == {tap.path: tap.shape for tap in taps}
    whole = next(tap for tap in taps if tap.path == "encoders.image")
    assert whole.shape[1] == vision.out_dim and whole.kind.startswith("tokens")
    if image == "test_mambaout":
        stage = next(tap for tap in taps if tap.path == "encoders.image.net.stages.1")
        assert stage.kind == "map, channels last"


def test_looking_leaves_the_model_as_it_was(wordpiece_file):
    model = make_model(wordpiece_file).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    list_taps(model, make_batch(3))
    assert model.training and all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="no module path has this in it"):
        chosen({"model": {"taps": list_taps(model, make_batch(3))}}, "nothing", 0)
