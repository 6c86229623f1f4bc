"""Budgets, fronts, spaces, records and the search itself, on candidates that cost nothing."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_project import distill, make_project, refusal

from distill import pipeline
from distill.contracts import Artifact, UserError
from distill.export.bundle import ParityError
from distill.fit import NothingFitsError, fit
from distill.fit.budget import Budget, Figures, dominates, front
from distill.fit.candidates import Made
from distill.fit.outcome import closest, draw, markdown, standing, write_outcome
from distill.fit.records import Records, Trial
from distill.fit.search import FINALISTS, SHARE, Clock, finals, search
from distill.fit.space import (
    HEADS,
    PRECISION,
    RATIO,
    Knob,
    candidate,
    check_space,
    default_space,
    read_space,
    shortened,
    smaller,
)
from distill.progress import silent
from distill.recipe import changed, load_recipe
from distill.report.formats import SPACE as SPACE_BEFORE_UNIT

TARGET = "onnxruntime"
QUICK = "quickstart"
SPACE = [Knob("a", tuple(range(6))), Knob("b", tuple(range(5)), own=2), Knob(PRECISION, ("onnx-fp32", "onnx-int8"))]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(QUICK)


def made_by(recipe):
    work = pipeline.workspace(recipe, {})
    return lambda values: candidate(recipe, values, work.encoders, work.inheritances)


def valid(recipe):
    def fits(values):
        try:
            pipeline.check(made_by(recipe)(values))
        except UserError:
            return False
        return True

    return fits


figures = st.builds(
    Figures,
    st.floats(0.01, 10).map(lambda x: round(x, 1)),
    st.integers(1, 9),
    st.floats(0, 1).map(lambda x: round(x, 1)),
)


def costs(found):
    return found.latency_ms, found.size_bytes, -found.retention


@given(st.lists(figures, min_size=1, max_size=25))
def test_a_front_has_no_dominated_bundle_and_dominates_all_others(found):
    members = front(found)
    assert members
    for index, one in enumerate(found):
        beaten = [
            member
            for member in members
            if all(a <= b for a, b in zip(costs(found[member]), costs(one), strict=True))
            and any(a < b for a, b in zip(costs(found[member]), costs(one), strict=True))
        ]
        assert bool(beaten) == (index not in members)
        assert all(dominates(found[member], one) for member in beaten)
    latencies = [found[index].latency_ms for index in members]
    assert latencies == sorted(latencies)


@given(figures, st.floats(0.01, 10), st.floats(0.1, 9), st.floats(0.01, 1))
def test_a_bundle_misses_just_what_it_exceeds(found, latency, size, retention):
    budget = Budget(latency, size / 1e6, retention)
    over = budget.excess(found)
    assert (over["latency"] > 0) == (found.latency_ms / latency > 1)
    assert (over["size"] > 0) == (found.size_bytes / (size / 1e6 * 1e6) > 1)
    assert (over["retention"] > 0) == (found.retention / retention < 1)
    assert len(budget.misses(found)) == sum(value > 0 for value in over.values())
    assert "retention" not in budget.excess(found._replace(retention=None))


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(), "give --max-latency-ms, --max-size-mb or --min-retention"),
        (Budget(max_latency_ms=0), "--max-latency-ms is 0, which no bundle meets"),
        (Budget(max_size_mb=math.nan), "--max-size-mb is nan, which no bundle meets"),
        (Budget(min_retention=97), "--min-retention is 97; give a share of the teacher's"),
    ],
)
def test_budgets_that_nothing_meets_are_refused(budget, said):
    with pytest.raises(UserError, match=said):
        budget.check()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dim", 192, [192, 144, 96, 48]),
        ("dim", 8, [8]),
        ("widths", [16, 32, 64], [[16, 32, 64], [8, 16, 32], [8, 8, 16]]),
        ("blocks", [0, 1, 2], [[0, 1, 2], [0, 1, 1], [0, 0, 1], [0, 0, 0]]),
        ("depth", 4, [4, 3, 2, 1]),
        ("layers", 1, [1]),
        ("dim", None, []),
        ("dim", 0.5, []),
    ],
)
def test_sizes_go_down_to_a_quarter(name, value, expected):
    found = smaller(name, value)
    if name == "widths":
        assert found[0] == expected[0] and found[-1] == [8, 8, 16] and expected[1] in found
    else:
        assert found == expected


@given(st.sampled_from(["dim", "hidden", "depth"]), st.integers(1, 600))
def test_smaller_sizes_are_smaller_and_never_nothing(name, value):
    found = smaller(name, value)
    assert found[0] == value and min(found) >= 1
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)


def test_the_default_space_follows_from_the_student(recipe):
    encoders = pipeline.workspace(recipe, {}).encoders
    space = {knob.path: knob for knob in default_space(recipe, TARGET, encoders, valid(recipe), tables=False)}
    assert list(space) == [
        "student.encoders.image.widths",
        "student.encoders.image.blocks",
        "student.encoders.text.dim",
        "student.fusion.dim",
        HEADS,
        RATIO,
        PRECISION,
    ]
    assert space["student.encoders.image.widths"].choices[0] == [16, 32, 64, 128]
    ratio = space[RATIO]
    assert ratio.choices[ratio.own] == 0.5 and ratio.choices[-1] == 0.8
    assert 0.0 not in ratio.choices  # nothing would be pruned, which the schema refuses
    assert space[PRECISION].choices == ("onnx-fp32", "onnx-int8")
    tables = default_space(recipe, TARGET, encoders, valid(recipe), tables=True)
    assert "student.encoders.text.vocab_size" in [knob.path for knob in tables]


def test_a_candidate_gives_up_what_no_longer_fits(recipe):
    make = made_by(recipe)
    same = make({RATIO: 0.7, PRECISION: "onnx-int8"})
    assert same.prune.ratio == 0.7 and set(same.student.inherit) == {"image", "text"}
    assert same.export.bundles == ["onnx-fp32", "onnx-int8"]
    narrow = make({"student.encoders.image.widths": [8, 16, 32, 64], PRECISION: "onnx-fp32"})
    assert set(narrow.student.inherit) == {"text"} and narrow.export.bundles == ["onnx-fp32"]
    pipeline.check(narrow)


def test_what_is_searched_changes_no_stage(recipe):
    other = changed(recipe, {"fit": {"space": {RATIO: [0.5, 0.6]}}}, "test")
    keys = [[item.key for item in pipeline.plan(one)] for one in (recipe, other)]
    assert keys[0] == keys[1]


def test_a_share_of_the_epochs_is_at_least_one(recipe):
    short = shortened(recipe, SHARE, student=True)
    assert (short.student.train.epochs, short.prune.train.epochs) == (3, 1)
    assert shortened(recipe, SHARE, student=False).student.train.epochs == recipe.student.train.epochs
    stepped = changed(recipe, {"prune.steps": 2, "student.train.max_steps": 10}, "test")
    short = shortened(stepped, SHARE, student=True)
    assert (short.prune.train.epochs, short.student.train.max_steps) == (2, 4)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"student.encoders.image.width": [8]}, "convnet has no parameter 'width'; did you mean 'widths'"),
        ({"prune.ratoi": [0.5]}, "unknown key 'prune.ratoi'; did you mean 'ratio'"),
        (
            {"student.encoder.image.dim": [8]},
            "leads nowhere, as there is no 'encoder' with keys; did you mean 'encoders'",
        ),
        ({"teacher.members": [1]}, "'teacher.members' cannot be searched"),
        ({"prune.ratio": [0.5, 1.5]}, "fit.space.prune.ratio: 1.5 does not fit"),
        ({"prune.ratio": []}, "give one value or more, each once"),
        ({"prune.ratio": [0.5, 0.5]}, "give one value or more, each once"),
        ({"prune.ratio": {"low": 0.1, "high": 0.5}}, "a range has low, high and step, not low, high"),
        ({"prune.ratio": {"low": 0.5, "high": 0.1, "step": 0.1}}, "no value lies between 0.5 and 0.1"),
        ({PRECISION: ["onnx-int7"]}, "no bundle 'onnx-int7' runs on onnxruntime; did you mean 'onnx-int"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(recipe, space, said):
    given = changed(recipe, {"fit": {"space": space}}, "test")

    def make(values):
        made = made_by(recipe)(values)
        pipeline.check(made)

    with pytest.raises(UserError) as refused:
        check_space(read_space(given, TARGET), make)
    assert said in str(refused.value)


def test_ranges_are_whole_where_they_are_given_whole(recipe):
    space = {RATIO: {"low": 0.0, "high": 0.8, "step": 0.2}, "student.fusion.dim": {"low": 64, "high": 192, "step": 64}}
    ratio, dim, precision = read_space(changed(recipe, {"fit": {"space": space}}, "test"), TARGET)
    assert ratio.choices == (0.0, 0.2, 0.4, 0.6, 0.8) and dim.choices == (64, 128, 192)
    assert all(type(value) is int for value in dim.choices)
    assert precision.choices == ("onnx-fp32", "onnx-int8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "there is no budget to fit"),
        (["--max-latency-ms", "-1"], "--max-latency-ms is -1"),
        (["--max-latency-ms", "1", "--minutes", "0"], "--minutes is 0"),
        (["--max-latency-ms", "1", "--trials", "0"], "--trials is 0"),
        (["--max-latency-ms", "1", "--target", "toaster"], "--target: latency cannot be measured on 'toaster'"),
        (["--max-latency-ms", "1", "--output", "runs/tiny"], "is the folder of the recipe's own run"),
    ],
)
def test_nonsense_is_refused_before_any_work(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    path = make_project(tmp_path / "project")
    assert said in refusal(distill("fit", path, *options))
    assert not (tmp_path / "runs").exists()


class Fake:
    """Candidates whose latency falls with both knobs, and whose retention falls with one of them."""

    yardstick_ms = 1.0

    def __init__(self, ends_at=None, fails=lambda values: False):
        self.looked, self.trained_in, self.ends_at, self.fails = [], [], ends_at, fails

    def figures(self, values, share):
        latency = 1.0 - 0.1 * values["a"] - 0.05 * values["b"]
        size = 4_000_000 if values[PRECISION] == "onnx-fp32" else 1_000_000
        return Figures(latency, size, share and 1.0 - 0.05 * values["a"] - 0.1 * (share < 1))

    def untrained(self, values):
        if len(self.looked) == self.ends_at:
            raise KeyboardInterrupt
        self.looked.append(values)
        if self.fails(values):
            raise ParityError("the graph says something else")
        return self.figures(values, 0)._replace(retention=None)

    def trained(self, values, share, name):
        self.trained_in.append((values, share))
        return Made(self.figures(values, share), {"kind": 0.9}, None)

    def changes(self, values):
        return values


def clock(minutes=60.0, taken=0.001):
    import time

    done = {
        name: Artifact(name, None, "", {"cost": {"seconds": taken}})
        for name in ("inherit", "student", "pruned", "export", "quantize")
    }
    return Clock(minutes, done, time.monotonic())


def searched(folder, fake, budget, **changes):
    pytest.importorskip("optuna", reason="the extra [fit] is not installed")
    records = Records(folder, {"seed": 0})
    records.begin(1.0)
    options = {"most": 12, "seed": 0, "say": lambda line: None, "report": silent} | changes
    return search(fake, SPACE, budget, records, options.pop("clock", clock()), **options)


BUDGET = Budget(max_latency_ms=0.75, max_size_mb=2.0)


def test_what_is_outside_the_budget_is_not_trained(tmp_path):
    fake = Fake()
    trials = searched(tmp_path, fake, BUDGET)
    assert len(trials) == 12 and {trial.state for trial in trials} == {"outside", "short"}
    for trial in trials:
        over = max(BUDGET.excess(fake.figures(trial.values, 0)._replace(retention=None)).values())
        assert (trial.state == "outside") == (over > 0.1)
        assert bool(trial.why) == (trial.state == "outside")
    assert [share for _, share in fake.trained_in] == [SHARE] * sum(trial.state == "short" for trial in trials)
    assert trials[0].values == {"a": 5, "b": 4, PRECISION: "onnx-int8"}  # the smallest of all
    assert trials[1].values == {
        "a": 5,
        "b": 2,
        PRECISION: "onnx-fp32",
    }  # one knob alone, the others as the recipe has them


def test_the_best_are_trained_in_full(tmp_path):
    fake = Fake()
    trials = searched(tmp_path, fake, BUDGET, most=20)
    found = list(finals(fake, trials, [], BUDGET, clock(), say=lambda line: None, report=silent))
    inside = [trial for trial in trials if trial.state == "short" and not BUDGET.misses(trial.figures)]
    wanted = sorted((trial.figures.retention for trial in inside), reverse=True)[:FINALISTS]
    assert [trial.figures.retention - 0.1 for trial, _ in found] == pytest.approx(wanted)
    assert all(trial.state == "full" and trial.share == 1 for trial, _ in found)


def test_more_are_trained_in_full_until_one_fits(tmp_path):
    fake, budget = Fake(), Budget(max_latency_ms=0.75, max_size_mb=2.0, min_retention=0.99)
    trials = searched(tmp_path, fake, budget, most=20)
    inside = [trial for trial in trials if trial.state == "short" and trial.figures.latency_ms <= 0.75]
    found = list(finals(fake, trials, [], budget, clock(), say=lambda line: None, report=silent))
    assert len(found) == len(inside) > FINALISTS


def test_where_retention_is_all_that_is_asked_for_the_fastest_wins(tmp_path):
    fake, budget = Fake(), Budget(min_retention=0.8)
    trials = searched(tmp_path, fake, budget, most=25)
    assert {trial.state for trial in trials} == {"short"}
    first = next(finals(fake, trials, [], budget, clock(), say=lambda line: None, report=silent))[0]
    fitting = [trial.figures.latency_ms for trial in trials if trial.figures.retention >= 0.8]
    assert first.figures.latency_ms == min(fitting)


@pytest.mark.parametrize("killed_at", [2, 7])
def test_a_killed_search_goes_on_with_the_same_trials(tmp_path, killed_at):
    whole = searched(tmp_path / "whole", Fake(), BUDGET)
    killed = Fake(ends_at=killed_at)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "killed", killed, BUDGET)
    file = tmp_path / "killed" / "trials.jsonl"
    file.write_text(file.read_text() + '{"number": 3, "val')  # what a kill in the middle of a line leaves
    again = Fake()
    resumed = searched(tmp_path / "killed", again, BUDGET)
    assert len(killed.looked) == killed_at and len(again.looked) == 12 - killed_at
    assert [trial.values for trial in resumed] == [trial.values for trial in whole]
    assert [trial.figures for trial in resumed] == [trial.figures for trial in whole]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_failures_are_kept_and_do_not_end_a_search(tmp_path):
    trials = searched(tmp_path, Fake(fails=lambda values: values["a"] == 5), BUDGET)
    failed = [trial for trial in trials if trial.values["a"] == 5]
    assert failed and all(trial.state == "failed" and "says something else" in trial.why for trial in failed)
    assert len(trials) == 12


def test_a_small_space_ends_a_search(tmp_path):
    trials = searched(tmp_path, Fake(), Budget(max_latency_ms=10), most=None)
    assert 20 < len(trials) <= 60
    assert len({json.dumps(trial.values) for trial in trials}) == len(trials)


def test_no_trial_begins_that_the_time_does_not_hold(tmp_path):
    assert searched(tmp_path / "none", Fake(), BUDGET, clock=clock(minutes=0.1, taken=30)) == []
    slow = clock(minutes=10, taken=10)
    assert slow.allows_trial() and slow.allows_full()
    slow.learn(Trial(1, {}, "short", SHARE, None, seconds=320))  # 37 seconds were expected
    assert not slow.allows_trial() and slow.allows_full()
    fake = Fake()
    trials = searched(tmp_path / "some", fake, BUDGET, most=5)
    late = clock(minutes=0.1, taken=30)
    assert not list(finals(fake, trials, [], BUDGET, late, say=lambda line: None, report=silent))


def test_a_folder_of_another_search_is_refused(tmp_path):
    Records(tmp_path, {"seed": 0, "target": "a"}).begin(1.0)
    with pytest.raises(UserError, match="holds a search with another target"):
        Records(tmp_path, {"seed": 0, "target": "b"})
    assert Records(tmp_path, {"seed": 0, "target": "a"}).yardstick_ms == 1.0


def plain(text):
    return text.replace(SPACE_BEFORE_UNIT, " ")


def tried(number, latency, retention, state="short", **values):
    share = {"short": SHARE, "full": 1.0}.get(state, 0.0)
    chosen = {PRECISION: "onnx-fp32", **values}
    return Trial(number, chosen, state, share, Figures(latency, 1_000_000, retention), changes=chosen)


def test_the_outcome_shows_front_recipe_and_best(tmp_path):
    own, best = tried(0, 2.0, 0.9, "full"), tried(2, 0.8, 0.95, "full", width=8)
    trials = [own, tried(1, 1.0, 0.5), tried(2, 0.8, 0.7, width=8), best, tried(3, 9.0, None, "outside")]
    budget = Budget(max_latency_ms=1.5, min_retention=0.9)
    shown = standing(trials)
    assert [trial.number for trial in shown] == [0, 1, 2] and best in shown
    found = {"name": "x", "target": TARGET, "seed": 0, "seconds": 1.0, "space": {}, "best": best}
    content = write_outcome(tmp_path, found, trials, budget)
    assert content == json.loads((tmp_path / "fit.json").read_text())
    assert [trial["number"] for trial in content["front"]] == [2] and len(content["trials"]) == 5
    table = plain(markdown(shown, best, budget))
    assert "trial 2: `width` 8" in table and "**best**" in table and "trial 1" not in table
    assert "| the recipe | onnx-fp32 | 100% | 2.00 ms |" in table and "latency 2.00 ms > 1.5 ms" in table
    picture = draw(shown, best, budget)
    assert picture.count("<circle") + picture.count("<polygon") + picture.count("<rect") == 3
    assert picture.count('class="reference"') == 2 and "the recipe, onnx-fp32" in picture


def test_a_search_without_success_names_what_comes_closest():
    budget = Budget(max_latency_ms=0.5)
    trials = [tried(1, 0.6, 0.5), tried(2, 0.9, 0.9, "full"), tried(0, 1.5, 1.0, "full")]
    assert (
        plain(closest(trials, budget))
        == "trial 2 comes closest (0.900 ms, 1.00 MB, retention 0.900), and misses latency 0.900 ms > 0.5 ms"
    )
    assert closest([], budget) == "no candidate could be made"


def test_without_optuna_one_sentence_says_what_to_install(recipe, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs the package optuna; pip install 'multidistill\[fit\]'"):
        fit(recipe, BUDGET, tmp_path, target=TARGET, minutes=1)


def test_a_launcher_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without a launcher"):
        fit(recipe, BUDGET, tmp_path, target=TARGET, minutes=1)


def test_nothing_fits_is_a_failed_run():
    assert issubclass(NothingFitsError, RuntimeError) and not issubclass(NothingFitsError, UserError)
