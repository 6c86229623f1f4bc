"""Recipes: how they are read and merged, where their paths start, and how parts are checked and built."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_project import RECIPE

from distill.builders import build_part, check_part
from distill.config import Recipe, TermConfig, nearest, shortened
from distill.contracts import UserError
from distill.data_config import Part
from distill.recipe import RECIPES, load_recipe, packaged_configs

PACKAGED = [*packaged_configs().glob("*.yaml"), *(packaged_configs() / RECIPES).glob("*.yaml")]
PART = "encoders: {image: {type: convnet, widths: [4], blocks: [0]}}\nobjective: [{loss: cross_entropy, task: shape}]\n"


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "project" / "recipe.yaml"
    file.parent.mkdir()
    file.write_text(RECIPE, encoding="utf-8")
    return file


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_packaged_recipes_are_valid_by_name_and_by_path(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path.stem) == load_recipe(path)
    assert load_recipe(path.stem).name == path.stem


@pytest.mark.parametrize("part, folder", [("teacher", "teachers"), ("student", "students"), ("data", "data")])
def test_packaged_parts_fit_the_schema(part, folder):
    for file in (packaged_configs() / folder).glob("*.yaml"):
        assert load_recipe("quickstart", parts={part: str(file)}) == load_recipe("quickstart", [f"{part}={file.stem}"])


def test_overrides_are_yaml_and_reach_into_lists(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "student.train.lr=1e-2",
            "student.objective.2.params.temperature=4",
            "prune.modules=[encoders.image.stages]",
            "teacher.encoders.image={type: convnet, widths: [4], blocks: [0]}",
            "student.train.patience=null",
            "name=2026",
            "output=a=b",
            "seed=1",
            "seed=2",
        ],
    )
    assert recipe.student.train.lr == 0.01
    assert recipe.student.objective[2].params == {"temperature": 4}
    assert recipe.prune.modules == ["encoders.image.stages"]
    assert recipe.teacher.encoders["image"].params == {"widths": [4], "blocks": [0]}
    assert recipe.student.train.patience is None
    assert (recipe.name, recipe.output, recipe.seed) == ("2026", "a=b", 2)


def test_references_between_keys(recipe_file):
    recipe = load_recipe(recipe_file, ["prune.train.epochs=${student.train.epochs}", "student.train.epochs=7"])
    assert recipe.prune.train.epochs == 7


def test_parts_come_from_the_recipes_folder_the_working_directory_or_the_package(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (recipe_file.parent / "near.yaml").write_text(PART)
    (tmp_path / "here.yaml").write_text(PART + "embedding_dim: 5\n")
    text = RECIPE[: RECIPE.index("teacher:")] + "teacher: near\n" + RECIPE[RECIPE.index("student:") :]
    recipe_file.write_text(text)
    assert load_recipe(recipe_file).teacher.embedding_dim == 128
    assert load_recipe(recipe_file, ["teacher=here"]).teacher.embedding_dim == 5
    assert load_recipe(recipe_file, parts={"teacher": "here.yaml"}).teacher.embedding_dim == 5
    later = load_recipe(recipe_file, ["teacher.embedding_dim=6", "teacher=here"])
    assert later.teacher.embedding_dim == 6
    assert load_recipe(recipe_file, ["teacher=minilm_fusion"]).teacher.encoders["text"].params["freeze"] is True


def test_paths_start_from_the_file_that_names_them(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "rows.yaml").write_text(
        "source: {type: table, path: t.csv, root: ../images}\nmodalities: {text: a}\ntargets: {b: b}\n"
    )
    recipe = load_recipe(recipe_file)
    assert recipe.data.source.params == {"path": str(tmp_path / "project" / "rows.csv")}
    assert recipe.teacher.encoders["text"].params["weights"] == f"path:{tmp_path}/project/bert"
    recipe = load_recipe(recipe_file, parts={"data": "parts/rows"})
    assert recipe.data.source.params == {"path": f"{tmp_path}/parts/t.csv", "root": f"{tmp_path}/images"}
    recipe = load_recipe(recipe_file, ["data.source.path=a/t.csv", "teacher.encoders.text.weights=[path:b,hub:c/d]"])
    assert recipe.data.source.params == {"path": f"{tmp_path}/a/t.csv"}
    assert recipe.teacher.encoders["text"].params["weights"] == [f"path:{tmp_path}/b", "hub:c/d"]
    recipe = load_recipe(recipe_file, ["data.source={type: table, path: t.csv}"])
    assert recipe.data.source.params == {"path": f"{tmp_path}/t.csv"}
    for kept in ("sample:emoji", "/data/rows.csv"):
        assert load_recipe(recipe_file, [f"data.source.path={kept}"]).data.source.params == {"path": kept}
    assert load_recipe(recipe_file, ["data.source.path=~/t.csv"]).data.source.params == {"path": f"{Path.home()}/t.csv"}


def test_data_of_packaged_recipes_lies_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("cifar100_kd").data.source.params == {"path": f"{tmp_path}/data/cifar100"}
    assert load_recipe("quickstart").data.source.params == {"path": "sample:emoji"}


def test_a_recipe_cannot_be_changed(recipe_file):
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(recipe_file).seed = 1


def test_term_names():
    assert TermConfig(loss="kd", task="shape.image").name == "kd/shape.image"
    assert TermConfig(loss="cosine", embedding="fused").name == "cosine/fused"
    assert TermConfig(loss="fitnet", taps={"student": "a", "teacher": "b"}).name == "fitnet/a"


def builder(*, given_by_caller: str, dim: int, names: str | Sequence[str] = (), rate: float = 0.0, own: object = None):
    if dim < 1:
        raise ValueError("dim is too\n small")
    return dim, names, rate, given_by_caller


REGISTRY = {"block": builder}


def test_a_part_is_built_with_its_parameters_and_the_callers():
    part = Part.model_validate({"type": "block", "dim": 2, "names": ["a"], "rate": 1})
    assert build_part(REGISTRY, part, "here", given_by_caller="x") == (2, ["a"], 1, "x")


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "blok", "dim": 1}, "here: unknown type 'blok'; did you mean 'block'? choices: block"),
        (
            {"type": "block", "dmi": 1},
            "here: block has no parameter 'dmi'; did you mean 'dim'? choices: dim, names, own",
        ),
        ({"type": "block"}, "here: block needs the parameter 'dim'; add it"),
        ({"type": "block", "dim": "2"}, "here.dim is '2': Input should be a valid integer"),
        ({"type": "block", "dim": True}, "here.dim is True: Input should be a valid integer"),
        ({"type": "block", "dim": 1, "rate": [1]}, "here.rate is [1]: Input should be a valid number"),
        ({"type": "block", "dim": 1, "given_by_caller": "a"}, "here: block has no parameter 'given_by_caller'"),
        ({"type": "block", "dim": 0}, "here: block cannot be built: dim is too small"),
    ],
)
def test_a_part_that_does_not_fit_its_builder_is_refused(part, message):
    with pytest.raises(UserError) as caught:
        build_part(REGISTRY, Part.model_validate(part), "here", given_by_caller="x")
    assert str(caught.value).startswith(message)


def test_a_class_is_checked_by_its_constructor():
    class Block:
        def __init__(self, *, dim: int) -> None: ...

    check_part({"block": Block}, Part.model_validate({"type": "block", "dim": 1}), "here")
    with pytest.raises(UserError, match=r"here\.dim is 'x'"):
        check_part({"block": Block}, Part.model_validate({"type": "block", "dim": "x"}), "here")


@given(st.text(), st.lists(st.text(min_size=1)))
def test_nearest_lists_every_choice(word, choices):
    assert nearest(word, choices).endswith(f"choices: {', '.join(sorted(choices))}")


def test_nearest_hints_only_at_what_is_near():
    assert nearest("tempature", ["temperature", "weight"]) == "did you mean 'temperature'? choices: temperature, weight"
    assert nearest("picture", ["split", "id"]) == "choices: id, split"
    assert nearest("temp", ["temperature", "weight"]).startswith("did you mean 'temperature'?")


def test_long_values_are_shortened():
    assert len(shortened(list(range(1000)))) < 100 and shortened("a") == "'a'"


def test_schema_forbids_unknown_keys_everywhere():
    schema = Recipe.model_json_schema()
    open_sections = [name for name, entry in schema["$defs"].items() if entry.get("additionalProperties") is not False]
    assert open_sections == ["Part"]
    assert schema["additionalProperties"] is False and "teacher" in schema["required"]


def test_a_term_on_each_task_is_one_for_each_task_of_the_data(recipe_file):
    objective = (
        "[{loss: cross_entropy, task: '*.image', weight: 2}, {loss: kd, task: '*'}, {loss: cosine, embedding: fused}]"
    )
    recipe = load_recipe(
        recipe_file, [f"student.objective={objective}", "student.baseline=[{loss: nkd, task: '*.text'}]"]
    )
    tasks = list(recipe.data.targets)
    assert len(tasks) > 1
    found = [(term.loss, term.task, term.weight) for term in recipe.student.objective]
    heads = [("cross_entropy", f"{task}.image", 2.0) for task in tasks]
    assert found == [*heads, *(("kd", task, 1.0) for task in tasks), ("cosine", None, 1.0)]
    assert [term.task for term in recipe.student.baseline] == [f"{task}.text" for task in tasks]
