"""Budgets, fronts, records, refusals and the search itself, on candidates that cost nothing."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_project import distill, make_project, refusal

from distill import pipeline
from distill.contracts import Artifact, UserError
from distill.export.bundle import ParityError
from distill.fit import NothingFitsError, fit, made_of
from distill.fit.budget import Budget, Figures, dominates, front
from distill.fit.candidates import TRAINED, Made
from distill.fit.outcome import closest, draw, markdown, standing, write_outcome
from distill.fit.records import Records, Trial
from distill.fit.search import FINALISTS, SHARE, Clock, finals, longer, search
from distill.fit.space import (
    PRECISION,
    Knob,
)
from distill.progress import silent
from distill.recipe import load_recipe
from distill.report.formats import SPACE as SPACE_BEFORE_UNIT

TARGET = "onnxruntime"
QUICK = "quickstart"
SPACE = [Knob("a", tuple(range(6))), Knob("b", tuple(range(5)), own=2), Knob(PRECISION, ("onnx-fp32", "onnx-int8"))]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(QUICK)


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
    ("options", "said"),
    [
        ([], "there is no budget to fit"),
        (["--max-latency-ms", "-1"], "--max-latency-ms is -1"),
        (["--max-latency-ms", "1", "--minutes", "0"], "--minutes is 0"),
        (["--max-latency-ms", "1", "--minutes", "inf"], "--minutes is inf, which is no time to search in"),
        (["--max-latency-ms", "1", "--minutes", "nan"], "--minutes is nan, which is no time to search in"),
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

    def __init__(self, ends_at=None, fails=lambda values: False, finished=(), gain=0.0):
        self.finished, self.gain = finished, gain
        self.looked, self.trained_in, self.ends_at, self.fails = [], [], ends_at, fails

    def figures(self, values, share):
        latency = 1.0 - 0.1 * values["a"] - 0.05 * values["b"]
        size = 4_000_000 if values[PRECISION] == "onnx-fp32" else 1_000_000
        return Figures(latency, size, share and 1.0 - 0.05 * values["a"] - 0.1 * (share < 1) + self.gain * (share > 1))

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

    def lacks(self, values, share):
        return () if (share == 1 and values in self.finished) or (values, share) in self.finished else TRAINED


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


def test_the_best_is_trained_for_longer_while_that_helps(tmp_path):
    fake = Fake(gain=0.01)  # of 2 times the epochs; 4 times add nothing to that
    trials = searched(tmp_path, fake, BUDGET, most=20)
    full = [trial for trial, _ in finals(fake, trials, [], BUDGET, clock(), say=lambda line: None, report=silent)]
    best = max(full, key=lambda trial: trial.figures.retention)
    options = {"say": lambda line: None, "report": silent}
    found = [trial for trial, _ in longer(fake, full, BUDGET, clock(), **options)]
    assert [trial.share for trial in found] == [2, 4]
    assert all(trial.values == best.values and trial.number == best.number for trial in found)
    assert [share for trial, share in fake.trained_in[-2:]] == [2, 4]
    assert found[0].figures.retention == pytest.approx(best.figures.retention + 0.01)
    useless = [trial for trial, _ in longer(Fake(gain=-0.01), full, BUDGET, clock(), **options)]
    assert [trial.share for trial in useless] == [2]
    assert not list(longer(fake, full, BUDGET, clock(minutes=1e-9, taken=10), **options))
    assert not list(longer(fake, full, Budget(min_retention=0.5), clock(), **options))  # the fastest is wanted


def test_what_was_trained_for_longer_counts_where_another_is_the_best_by_now():
    full = [tried(number, 0.5, kept, "full", a=0, b=number) for number, kept in ((1, 0.9), (2, 0.95))]
    fake = Fake(finished=[(full[0].values, 2.0)], gain=0.05)
    late = clock(minutes=1e-9, taken=10)
    found = [trial for trial, _ in longer(fake, full, Budget(1.0), late, say=lambda line: None, report=silent)]
    assert [(trial.number, trial.share) for trial in found] == [(1, 2)]
    assert found[0].figures.retention == pytest.approx(1.05)
    more = [trial for trial, _ in longer(fake, full, Budget(1.0), clock(), say=lambda line: None, report=silent)]
    assert [(trial.number, trial.share) for trial in more] == [(1, 2), (1, 4)]  # it is the best again


@pytest.mark.parametrize(("slower", "gain"), [(-0.001, 0.0), (1.0, 0.1)])
def test_what_keeps_no_more_or_is_outside_is_not_trained_for_longer_still(slower, gain):
    class Other(Fake):
        def figures(self, values, share):
            found = super().figures(values, share)
            return found._replace(latency_ms=found.latency_ms + slower * (share > 1))

    own = Other(gain=gain)
    trial = tried(1, 0.85, 0.95, "full", a=1, b=1)
    found = [one for one, _ in longer(own, [trial], Budget(1.0), clock(), say=lambda line: None, report=silent)]
    assert [one.share for one in found] == [2]


def test_time_is_kept_for_the_longer_training_only_where_there_is_one():
    half = clock(minutes=0.8, taken=1)  # a first look takes 4 seconds, a training in full 5
    half._began -= 24
    assert half.allows_trial(longer=False) and not half.allows_trial()


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


def test_what_is_finished_is_counted_without_time_for_it(tmp_path):
    trials = searched(tmp_path, Fake(), BUDGET, most=20)
    late = {"say": lambda line: None, "report": silent}
    inside = [trial for trial in trials if trial.state == "short" and not BUDGET.misses(trial.figures)]
    worst = min(inside, key=lambda trial: trial.figures.retention)  # no finalist of this call
    hurried = clock(minutes=0.1, taken=30)
    found = list(finals(Fake(finished=[worst.values]), trials, [], BUDGET, hurried, **late))
    assert [trial.number for trial, _ in found] == [worst.number]
    assert hurried.full() == clock(minutes=0.1, taken=30).full()


def test_the_clock_learns_from_what_was_trained():
    full = Trial(1, {}, "full", 1.0, None, seconds=2)
    told = clock(minutes=10, taken=100)
    told.learn(full, ())  # its bundles alone were made
    told.learn(full)  # faster than the pace says
    assert told.full() == 500 and told.allows_full()
    told.learn(replace(full, seconds=700))
    assert not told.allows_full() and told.allows_full(("pruned",)) and told.allows_full(())
    paced = clock(minutes=10, taken=100)
    paced.learn(Trial(2, {}, "short", SHARE, None, seconds=20), ("pruned",))  # its student was there
    assert paced.full() == 500 and paced.full(("pruned",)) < 50


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


@pytest.mark.parametrize("budget", [Budget(max_size_mb=0.1), Budget(max_latency_ms=1), Budget(min_retention=0.9)])
def test_an_outcome_without_trained_bundles_is_written(tmp_path, budget):
    found = {"name": "x", "target": TARGET, "seed": 0, "seconds": 1.0, "space": {}, "best": None}
    content = write_outcome(tmp_path, found, [tried(1, 9.0, None, "outside")], budget)
    assert content["front"] == [] and "</svg>" in (tmp_path / "front.svg").read_text()
    assert "<circle" not in (tmp_path / "front.svg").read_text()


def test_a_search_without_success_names_what_comes_closest():
    budget = Budget(max_latency_ms=0.5)
    trials = [tried(1, 0.6, 0.5), tried(2, 0.9, 0.9), tried(2, 0.9, 0.9, "full"), tried(0, 1.5, 1.0, "full")]
    said = "trial 1 comes closest (0.600 ms, 1.00 MB, retention 0.500), and misses latency 0.600 ms > 0.5 ms"
    assert plain(closest(trials, budget)) == said
    assert closest(trials[1:], budget).startswith("trial 2 comes closest")
    assert closest([], budget) == "no candidate could be made"
    # inside after a third of its epochs, which is closer than the recipe; of equals the one that was trained in full
    inside = [*trials, tried(3, 0.4, 0.5)]
    assert plain(closest(inside, budget)).endswith("retention 0.500), and was not trained in full")
    assert closest([tried(4, 0.9, 0.5), trials[2]], budget).startswith("trial 2 comes closest")
    # what a training in full has found out counts, not its first look
    again = Budget(min_retention=0.9)
    assert closest([tried(5, 1.0, 0.95), tried(5, 1.0, 0.8, "full"), tried(0, 1.0, 0.85, "full")], again).startswith(
        "the recipe itself comes closest"
    )


def test_a_runtime_that_is_not_installed_is_refused_at_once(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.fit.space.missing_packages", lambda runtime: ["nncf"] * (runtime == "openvino"))
    monkeypatch.setattr(pipeline, "run", None)
    with pytest.raises(UserError, match=r"--target: openvino needs nncf, .*; pip install 'multidistill\[openvino\]'"):
        fit(recipe, BUDGET, tmp_path, target="openvino", minutes=1)


def test_changed_data_is_another_search(tmp_path):
    done = {
        name: Artifact(name, tmp_path, f"{name} before") for name in ("data", "teacher", "cache", "pruned", "bench")
    }
    Records(tmp_path, {"run": made_of(done)}).begin(1.0)
    bench = {"bench": Artifact("bench", tmp_path, "another")}
    assert Records(tmp_path, {"run": made_of({**done, **bench})}).yardstick_ms == 1.0
    for name in ("data", "teacher", "cache", "pruned"):
        other = {**done, name: Artifact(name, tmp_path, "another")}
        with pytest.raises(UserError, match="holds a search with another run"):
            Records(tmp_path, {"run": made_of(other)})


def test_a_choice_that_cannot_be_built_is_refused_before_any_training(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="the extra [fit] is not installed")
    monkeypatch.chdir(tmp_path)
    path = make_project(tmp_path / "project")
    path.write_text(path.read_text() + "fit: {space: {student.fusion.dim: [16, -4]}}\n")
    said = refusal(distill("fit", path, "--max-latency-ms", "1"))
    assert "fit.space.student.fusion.dim: -4 does not fit" in said
    assert (tmp_path / "runs/tiny/data").exists() and not (tmp_path / "runs/tiny/teacher").exists()


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
