"""A whole search on the tiny project: what it writes, that its best recipe is reproduced, and what it leaves alone."""

import json

import pytest
from tiny_project import distill, make_project, refusal

from distill import pipeline
from distill.predict import load
from distill.recipe import load_recipe
from distill.report.formats import size

pytest.importorskip("optuna", reason="the extra [fit] is not installed")

SPACE = """\
fit:
  space:
    student.fusion.dim: [16, 8]
    prune.ratio: {low: 0.25, high: 0.5, step: 0.25}
    precision: [onnx-fp32, onnx-int8]
"""
MAX_MB = 0.035


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    path = make_project(folder / "project")
    path.write_text(path.read_text().replace("bench: {repeats: 10}", SPACE + "bench: {repeats: 10}"))
    return folder


@pytest.fixture(scope="module")
def found(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        answer = fitted("--trials", "3")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)


def fitted(*options, budget=("--max-latency-ms", "1000", "--max-size-mb", str(MAX_MB))):
    return distill("fit", "project/recipe.yaml", *budget, *options, "--json")


def stamps(folder):
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("manifest.json"))}


def test_a_search_ends_with_a_recipe_inside_the_budget(place, found):
    best = found["best"]
    assert best["state"] == "full" and best["figures"]["size_bytes"] <= MAX_MB * 1e6
    assert best["figures"]["latency_ms"] <= 1000 and best["figures"]["retention"] > 0
    assert set(best["retention"]) == {"colour", "shape"}
    bundle = load(place / found["bundle"])
    assert bundle.info["runtime"] == found["target"]
    assert (place / found["bundle"] / "model.onnx").stat().st_size == best["figures"]["size_bytes"]
    full = [trial for trial in found["trials"] if trial["state"] == "full"]
    fitting = [one for one in full if one["figures"]["size_bytes"] <= MAX_MB * 1e6]
    assert best["figures"]["retention"] == max(one["figures"]["retention"] for one in fitting)
    assert len([trial for trial in found["trials"] if trial["state"] != "full"]) == 3
    table = (place / "runs/tiny-fit/fit.md").read_text()
    assert "**best**" in table and size(best["figures"]["size_bytes"]) in table
    assert (place / "runs/tiny-fit/front.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_the_best_recipe_is_reproduced_to_the_digit(place, found, monkeypatch):
    monkeypatch.chdir(place)
    here = load_recipe(found["recipe"])
    assert all(item.artifact for item in pipeline.plan(here, until="pruned"))  # a run of it goes on from there
    again = load_recipe(found["recipe"], ["name=again", "output=elsewhere"])
    done = pipeline.run(again, until="pruned", quiet=True)
    kept = place / "runs/tiny-fit/best/pruned/model.safetensors"
    assert (done["pruned"].path / "model.safetensors").read_bytes() == kept.read_bytes()


def test_the_same_call_goes_on_and_has_nothing_left_to_try(place, found, monkeypatch):
    monkeypatch.chdir(place)
    before = stamps(place / "runs")
    answer = fitted("--trials", "3")
    again = json.loads(answer.out)
    assert answer.code == 0 and stamps(place / "runs") == before  # nothing is trained again
    assert [trial["values"] for trial in again["trials"]] == [trial["values"] for trial in found["trials"]]
    assert again["best"]["figures"]["retention"] == found["best"]["figures"]["retention"]


def test_a_search_of_a_version_with_fewer_keys_goes_on(place, found, monkeypatch):
    monkeypatch.chdir(place)
    file = place / "runs/tiny-fit/trials.jsonl"
    first, *rest = file.read_text().splitlines()
    begun = json.loads(first)
    for part, key in (("prune", "vocabulary"), ("bench", "provider"), ("export", "check_rows")):
        del begun["search"]["recipe"][part][key]
    file.write_text("\n".join([json.dumps(begun), *rest]) + "\n")
    answer = fitted("--trials", "3")
    assert answer.code == 0, answer.err


def test_a_call_with_less_time_counts_what_is_finished(place, found, monkeypatch):
    monkeypatch.chdir(place)
    before = stamps(place / "runs")
    answer = fitted("--trials", "3", "--minutes", "0.001")
    assert answer.code == 0, answer.err
    again = json.loads(answer.out)
    assert stamps(place / "runs") == before
    assert sum(one["state"] == "full" for one in again["trials"]) >= sum(
        one["state"] == "full" for one in found["trials"]
    )
    assert again["best"]["figures"]["retention"] == found["best"]["figures"]["retention"]


def test_a_teacher_with_nothing_to_retain_is_refused_before_any_trial(place, found, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("distill.fit.candidates._quality", lambda work, said: {"colour": 0.0})
    answer = fitted("--output", "nothing")
    assert "the teacher gets nothing right on the validation rows" in refusal(answer)
    assert not (place / "nothing/trials.jsonl").exists()


def test_a_budget_that_nothing_meets_fails_with_what_comes_closest(place, found, monkeypatch):
    monkeypatch.chdir(place)
    (place / "small").mkdir()
    (place / "small/best.yaml").write_text("of an earlier call")
    answer = fitted("--trials", "1", "--output", "small", budget=("--max-size-mb", "0.001"))
    assert answer.code == 1 and "nothing fits (size ≤ 0.001 MB): " in answer.err
    assert "comes closest" in answer.err and "> 0.001 MB" in answer.err
    left = json.loads((place / "small/fit.json").read_text())
    assert left["best"] is None and left["front"] and not (place / "small/best.yaml").exists()
    assert [trial["state"] for trial in left["trials"] if trial["number"]] == ["outside"]


def test_time_that_holds_no_trial_is_said(place, found, monkeypatch):
    monkeypatch.chdir(place)
    answer = fitted("--minutes", "0.01", "--output", "late", budget=("--max-size-mb", "0.001"))
    assert answer.code == 1 and "no trial fitted into 0.01 minutes, so give it more" in answer.err


def test_the_recipes_own_run_stays_as_it_is(place, found, monkeypatch):
    monkeypatch.chdir(place)
    own = load_recipe("project/recipe.yaml")
    assert all(item.artifact for item in pipeline.plan(own, until="quantize"))
