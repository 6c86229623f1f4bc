"""The search: choices that Optuna asks for are measured untrained, trained briefly, and the best of them in full."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from distill.config import one_line
from distill.contracts import Artifact, UserError
from distill.export.bundle import ParityError
from distill.fit.budget import LATENCY, SIZE, Budget, Figures
from distill.fit.candidates import TRAINED, Candidates, Made
from distill.fit.records import Records, Trial, key_of
from distill.fit.space import Knob
from distill.progress import Progress
from distill.step import TrainingError

SHARE = 1 / 3
"""Of the epochs, for a first look at a choice."""
SLACK = 0.1
"""What an untrained bundle may exceed a limit by: training changes what pruning leaves, and latencies have noise."""
FINALISTS = 3
LONGER = (2.0, 4.0)
"""Times the epochs, for the best in the end."""
REPEATED = 30
"""So many choices in a row that were asked for before end a search."""
FAILURES = (UserError, ParityError, TrainingError)
BUNDLED = ("export", "quantize")


class Clock:
    """How much time is left, and whether the next piece of work fits in."""

    def __init__(self, minutes: float, done: Mapping[str, Artifact], began: float) -> None:
        """Take what the reference's stages took as the first guess of what a choice takes."""
        seconds = {name: float(artifact.info["cost"]["seconds"]) for name, artifact in done.items()}
        self.limit, self._began = 60 * minutes, began
        self._trained = {name: seconds[name] for name in TRAINED}
        self._made = seconds["inherit"] + sum(seconds[name] for name in BUNDLED)
        self._pace: dict[tuple[str, ...], float] = {}
        self._longest: dict[tuple[str, ...], float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self._began

    def full(self, lacking: tuple[str, ...] = TRAINED) -> float:
        """Seconds that a choice takes in full: the most that one took, and no less than at the pace of first looks.

        Args:
            lacking: the trainings that it needs; choices that need others tell nothing of it.
        """
        return max(self._longest.get(lacking, 0.0), self._expected(1.0, lacking) * self._pace.get(lacking, 1.0))

    def learn(self, trial: Trial, lacking: tuple[str, ...] = TRAINED) -> None:
        """Take in what a trial took that needed some trainings; one that needed none tells nothing."""
        if lacking and trial.state == "short":
            pace = trial.seconds / self._expected(SHARE, lacking)
            self._pace[lacking] = max(self._pace.get(lacking, 0.0), pace)
        if lacking and trial.state == "full":
            self._longest[lacking] = max(self._longest.get(lacking, 0.0), trial.seconds / trial.share)

    def allows_trial(self, lacking: tuple[str, ...] = TRAINED, *, longer: bool = True) -> bool:
        """Whether a first look fits in, before the trainings in full; these get at most half of the time.

        Args:
            lacking: the trainings that it needs.
            longer: whether the best is trained for more epochs in the end.
        """
        full, wanted = self.full(lacking), FINALISTS + (LONGER[0] if longer else 0.0)
        short = self._expected(SHARE, lacking) * self._pace.get(lacking, 1.0)
        return self.limit - self.elapsed >= short + max(min(wanted * full, self.limit / 2), full)

    def allows_full(self, lacking: tuple[str, ...] = TRAINED, share: float = 1.0) -> bool:
        """Whether a training with a share of the epochs fits in; one that is finished takes no time worth counting."""
        return not lacking or self.limit - self.elapsed >= share * self.full(lacking)

    def _expected(self, share: float, lacking: tuple[str, ...]) -> float:
        """Seconds that the reference's stages took, with a share of the trainings that a choice needs."""
        return self._made + share * sum(self._trained[name] for name in lacking)


def search(
    candidates: Candidates,
    knobs: Sequence[Knob],
    budget: Budget,
    records: Records,
    clock: Clock,
    *,
    most: int | None,
    seed: int,
    say: Callable[[str], None],
    report: Progress,
) -> list[Trial]:
    """Look at choices until the time, their number or the space ends.

    Choices that an earlier call has seen are answered from its records, so that the sampler goes the same way again.

    Args:
        candidates: makes and measures them.
        knobs: the space.
        budget: what a bundle may cost.
        records: of this call and earlier ones.
        clock: the time.
        most: trials, with those of earlier calls.
        seed: of the sampler.
        say: called with one line a trial.
        report: called with the seconds that have passed.

    Returns:
        The trials in the order of asking.
    """
    found: dict[str, Trial] = {}
    study, asked = _ask(knobs, budget, seed)
    repeated = 0
    for question, values in asked:
        key = key_of(values)
        repeated = repeated + 1 if key in found else 0
        trial = found.get(key) or records.trials.get(key)
        if repeated > REPEATED or (key not in found and most is not None and len(found) >= most):
            break
        if trial is None:
            lacking = candidates.lacks(values, SHARE)
            if not clock.allows_trial(lacking, longer=budget.limits_costs):
                break
            report(int(clock.elapsed), int(clock.limit), f"trial {len(found) + 1}")
            trial = records.add(_look(candidates, values, len(found) + 1, budget))
            clock.learn(trial, lacking)
            say(trial.said)
        found[key] = trial
        _tell(study, question, trial, budget)
    return list(found.values())


def _look(candidates: Candidates, values: dict[str, Any], number: int, budget: Budget) -> Trial:
    """Measure a choice untrained, and train it briefly if it is inside, or nearly."""
    began = time.monotonic()
    try:
        figures = candidates.untrained(values)
        if max(budget.excess(figures).values(), default=0.0) > SLACK:
            trial = Trial(number, values, "outside", 0.0, figures, why=", ".join(budget.misses(figures)))
        else:
            made = candidates.trained(values, SHARE, f"trial-{number:03d}")
            trial = Trial(number, values, "short", SHARE, made.figures, made.retention)
    except FAILURES as error:
        trial = Trial(number, values, "failed", 0.0, None, why=one_line(error))
    return replace(trial, changes=candidates.changes(values), seconds=time.monotonic() - began)


def finals(
    candidates: Candidates,
    trials: Sequence[Trial],
    before: Sequence[Trial],
    budget: Budget,
    clock: Clock,
    *,
    say: Callable[[str], None],
    report: Progress,
) -> Iterator[tuple[Trial, Made]]:
    """Train the best trials in full, while there is time: three, and more until one of them fits.

    Those that an earlier call has finished are among them without regard to time and number: only bundles are made.

    Args:
        candidates: makes and measures them.
        trials: of the search.
        before: those that were trained in full already.
        budget: what a bundle may cost and must keep.
        clock: the time.
        say: called with one line each.
        report: called with the seconds that have passed.

    Yields:
        Each with its bundle.
    """
    inside = [
        trial
        for trial in trials
        if trial.state == "short" and trial.figures and not budget.misses(trial.figures, LATENCY, SIZE)
    ]
    fits = any(trial.figures and not budget.misses(trial.figures) for trial in before)
    known = [trial.number for trial in before]
    for count, trial in enumerate(sorted(inside, key=lambda trial: rank(budget, trial.figures))):
        if trial.number in known:
            continue
        lacking = candidates.lacks(trial.values, 1.0)
        if lacking and ((fits and count >= FINALISTS) or not clock.allows_full(lacking)):
            continue
        found = _whole(candidates, trial, 1.0, clock, say=say, report=report)
        if found is not None:
            fits = fits or not budget.misses(found[1].figures)
            yield found


def longer(
    candidates: Candidates,
    full: Sequence[Trial],
    budget: Budget,
    clock: Clock,
    *,
    say: Callable[[str], None],
    report: Progress,
) -> Iterator[tuple[Trial, Made]]:
    """Train the best of those inside the limits for more epochs, while there is time and it retains more by that.

    What an earlier call has finished is among them without regard to time, of any choice: only bundles are made. Where
    a budget limits no cost the fastest is wanted, and nothing is trained.

    Args:
        candidates: makes and measures it.
        full: the trials that got all epochs.
        budget: what a bundle may cost and must keep.
        clock: the time.
        say: called with one line each.
        report: called with the seconds that have passed.

    Yields:
        Each training with its bundle.
    """
    known: list[Trial] = []
    tried: list[tuple[int, float]] = []

    def keep(trial: Trial) -> None:
        if trial.figures and not budget.misses(trial.figures, LATENCY, SIZE):
            known.append(trial)

    def train(trial: Trial, share: float) -> Iterator[tuple[Trial, Made]]:
        tried.append((trial.number, share))
        found = _whole(candidates, trial, share, clock, say=say, report=report)
        if found is not None:
            keep(found[0])
            yield found

    for trial in full if budget.limits_costs else ():
        keep(trial)
    for trial, share in product(tuple(known), LONGER):
        if not candidates.lacks(trial.values, share):
            yield from train(trial, share)
    while known:
        best = min(known, key=lambda trial: _by_epochs(budget, trial))
        share = next((share for share in LONGER if share > best.share), 0.0)
        if not share or (best.number, share) in tried:
            return
        if not clock.allows_full(candidates.lacks(best.values, share), share):
            return
        yield from train(best, share)


def _by_epochs(budget: Budget, trial: Trial) -> tuple[float, ...]:
    """What trainings are sorted by: of those that retain the same the shortest, as latencies have noise."""
    first, *rest = rank(budget, trial.figures)
    return (first, trial.share, *rest)


def _whole(
    candidates: Candidates,
    trial: Trial,
    share: float,
    clock: Clock,
    *,
    say: Callable[[str], None],
    report: Progress,
) -> tuple[Trial, Made] | None:
    """Train a choice with all epochs or more; None of one that fails."""
    name = "full" if share == 1 else f"{share:g}x"
    words = "in full" if share == 1 else f"for {share:g} times the epochs"
    report(int(clock.elapsed), int(clock.limit), f"trial {trial.number} {words}")
    lacking, began = candidates.lacks(trial.values, share), time.monotonic()
    try:
        made = candidates.trained(trial.values, share, f"trial-{trial.number:03d}-{name}")
    except FAILURES as error:
        say(f"trial {trial.number} {words} failed: {one_line(error)}")
        return None
    found = replace(trial, state="full", share=share, seconds=time.monotonic() - began)
    found = replace(found, figures=made.figures, retention=made.retention)
    clock.learn(found, lacking)
    say(f"{words}: {found.said}")
    return found, made


def rank(budget: Budget, figures: Figures | None) -> tuple[float, ...]:
    """What bundles inside a budget are sorted by: the most retained, or, where that is all the budget asks for, the
    fastest of those that retain it.
    """
    assert figures is not None and figures.retention is not None
    if not budget.limits_costs:
        return (float(bool(budget.misses(figures))), figures.latency_ms, figures.size_bytes)
    return (-figures.retention, figures.latency_ms, figures.size_bytes)


def _ask(knobs: Sequence[Knob], budget: Budget, seed: int) -> tuple[Any, Iterator[tuple[Any, dict[str, Any]]]]:
    """A study, and its questions: all knobs at their ends, each alone at its end, then what the sampler asks for."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ends = {knob.path: len(knob.choices) - 1 for knob in knobs}
    own = {knob.path: knob.own for knob in knobs}
    begin = [ends, *({**own, path: end} for path, end in ends.items())]
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(begin))
    study = optuna.create_study(direction="maximize" if budget.limits_costs else "minimize", sampler=sampler)
    for choice in begin:
        study.enqueue_trial(choice)
    ranges = {path: optuna.distributions.IntDistribution(0, end) for path, end in ends.items()}

    def questions() -> Iterator[tuple[Any, dict[str, Any]]]:
        while True:
            question = study.ask(ranges)
            yield question, {knob.path: knob.choices[question.params[knob.path]] for knob in knobs}

    return study, questions()


def _tell(study: Any, question: Any, trial: Trial, budget: Budget) -> None:
    """Tell the sampler how a choice ended; one that was dropped retains nothing, and exceeds its limits.

    Retention after a third of the epochs is compared with its limit only where the budget has no other.
    """
    if trial.figures is None:
        study.tell(question, state=_optuna().trial.TrialState.FAIL)
        return
    looked = trial.figures._replace(retention=None) if budget.limits_costs else trial.figures
    for name, over in budget.excess(looked).items():
        question.set_constraint(name, over)
    study.tell(question, (trial.figures.retention or 0.0) if budget.limits_costs else trial.figures.latency_ms)


def check_sampler() -> None:
    """Check that the sampler is installed.

    Raises:
        UserError: it is not.
    """
    _optuna()


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError("distill fit needs the package optuna; pip install 'multidistill[fit]'") from error
    return optuna
