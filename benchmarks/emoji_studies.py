"""Where distillation helps on the bundled emoji, and where not: ``python -m benchmarks.emoji_studies``.

Each study trains one student in several ways: for the same number of steps, from the same teacher, in the same order
of labelled rows. Every way has as many trials as the others, and the validation rows of the first seed choose among
them. Test rows are read once a seed for what was chosen. A training that fails is listed as such.

What is finished is kept, so a second call only prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kd_methods import STAGES
from benchmarks.seed_tables import add_outputs, command_line, put_out, table
from benchmarks.student_arms import Result, columns, run_arm, tasks_of, titles, weighted
from distill.config import Recipe, TermConfig
from distill.contracts import UserError
from distill.losses.terms import needs_teacher
from distill.recipe import load_recipe

Terms = list[TermConfig]
TASKS = {"category": 2.0, "subcategory": 1.5}  # each with the temperature that the quick start has for it


@dataclass(frozen=True)
class Trial:
    """One setting of a way to train.

    Attributes:
        shown: in the table.
        objective: of a recipe.
        overrides: of the recipe.
    """

    shown: str
    objective: Callable[[Recipe], Terms]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A question, and ways to train that answer it.

    Attributes:
        about: what is asked, and how.
        recipe: the name of the recipe.
        overrides: of the recipe, in all trials.
        arms: name -> its trials; others are compared with the first one.
    """

    about: str
    recipe: str
    overrides: tuple[str, ...]
    arms: dict[str, tuple[Trial, ...]]


def baseline(recipe: Recipe) -> Terms:
    """Labels alone, as the recipe's baseline has them."""
    return list(recipe.student.baseline)


def objective(factor: float = 1.0) -> Callable[[Recipe], Terms]:
    """The recipe's objective, its terms that read a teacher at a multiple of their weights."""

    def scaled(recipe: Recipe) -> Terms:
        return [
            one for term in recipe.student.objective for one in weighted([term], factor if needs_teacher([term]) else 1)
        ]

    return scaled


def with_labels(*losses: str) -> Callable[[Recipe], Terms]:
    """The objective's labels, and those of its terms with a teacher that have these losses."""

    def chosen(recipe: Recipe) -> Terms:
        return [term for term in recipe.student.objective if not needs_teacher([term]) or term.loss in losses]

    return chosen


def and_features(loss: str, stages: Sequence[str], weight: float = 1.0) -> Trial:
    """The objective, and a loss on stages of both image towers."""
    taps = list(stages) if len(stages) > 1 else stages[0]
    extra = TermConfig(loss=loss, weight=weight, taps={"student": taps, "teacher": taps})
    return Trial("as it is", lambda recipe: [*recipe.student.objective, extra])


def instead_of_kd(loss: str) -> Callable[[Recipe], Terms]:
    """The objective, with another loss on logits where it has soft labels."""

    def changed(recipe: Recipe) -> Terms:
        return [
            term.model_copy(update={"loss": loss}) if term.loss == "kd" else term for term in recipe.student.objective
        ]

    return changed


def joined(*terms: Terms) -> Callable[[Recipe], Terms]:
    """The same terms in any recipe."""
    return lambda recipe: [term for some in terms for term in some]


def hard(weight: float = 1.0, head: str = "") -> Terms:
    """Labels, for one head where it is named."""
    smoothing = {"label_smoothing": 0.1}
    return [TermConfig(loss="cross_entropy", task=task + head, weight=weight, params=smoothing) for task in TASKS]


def soft(weight: float = 1.0, head: str = "") -> Terms:
    """The teacher's probabilities, of one head where it is named."""
    return [
        TermConfig(loss="kd", task=task + head, weight=weight, params={"temperature": temperature})
        for task, temperature in TASKS.items()
    ]


def image(loss: str, weight: float, **params: Any) -> Terms:
    """A loss on the embedding of the image."""
    return [TermConfig(loss=loss, embedding="image", weight=weight, params=params)]


TEXTS = "transfer.texts=12000"
IMAGE_ONLY = (
    "student=image_only",
    "student.encoders.image.widths=[16, 32, 48, 64]",
    "student.encoders.image.blocks=[0, 0, 1, 1]",
    "student.train.epochs=10",
    "student.train.keep=last",
    "student.train.validate_every=10",
    "student.unimodal_heads=false",
    "transfer.texts=0",
)
BOTH_HEADS = ("student.unimodal_heads=true",)


def at_rates(shown: Callable[[Recipe], Terms], *overrides: str) -> tuple[Trial, ...]:
    """An objective at three learning rates."""
    return tuple(
        Trial(f"lr {rate:g}", shown, (f"student.train.lr={rate}", *overrides)) for rate in (1.5e-3, 3e-3, 6e-3)
    )


def few_labels(share: float, epochs: int) -> Study:
    """Labels for some families; arms that read those alone repeat them, so that all have as many steps."""
    repeated = f"student.train.epochs={round(7 / share)}"  # of fewer rows; the student's own are 7
    return Study(
        f"Labels for {share:.0%} of the emoji families. The teacher learns from those alone, and so do the first two\n"
        "arms; the last one learns from all drawings and names, by what that teacher says of them.",
        "few_labels",
        (f"data.labelled={share}", f"teacher.train.epochs={epochs}"),
        {
            "labels alone": (Trial("as it is", baseline, ("student.inherit={}", repeated)),),
            "labels and inheritance": (Trial("as it is", baseline, (repeated,)),),
            "labels, inheritance and KD": (Trial("as it is", objective()),),
        },
    )


STUDIES = {
    "inherited": Study(
        "The quick start's student, which begins with the teacher's image tower and token embeddings: what each kind\n"
        "of term adds, and what other objectives would. All but two arms read 3,000 unlabelled texts too.",
        "quickstart",
        (f"cache.taps=[{', '.join(STAGES)}]",),
        {
            "labels and inheritance, without texts": (Trial("as it is", baseline, ("transfer.texts=0",)),),
            "with soft labels": (Trial("as it is", with_labels("kd")),),
            "with embeddings": (Trial("as it is", with_labels("cosine")),),
            "with features of the image": (Trial("as it is", with_labels("fitnet")),),
            "with all of them": (Trial("as it is", objective()),),
            "with all of them, without texts": (Trial("as it is", objective(), ("transfer.texts=0",)),),
            "with all of them, weights x2": (Trial("as it is", objective(2.0)),),
            "with all of them, soft labels standardized": (Trial("as it is", instead_of_kd("logit_standardized_kd")),),
            "with all of them and fsp": (and_features("fsp", STAGES[1:]),),
            "with all of them and at": (and_features("at", STAGES[2:], 100.0),),
            "with all of them and review": (and_features("review", STAGES),),
        },
    ),
    "scratch": Study(
        "The quick start's student from scratch: nothing is inherited. With distillation it also reads texts that no\n"
        "one labelled, behind the labelled rows of each batch: training texts with other words.",
        "quickstart",
        ("student.inherit={}", "student.train.epochs=14"),
        {
            "labels alone": at_rates(baseline, "transfer.texts=0"),
            "labels and KD": (
                Trial("one text a row", objective(), (TEXTS,)),
                Trial("two texts a row", objective(), (TEXTS, "transfer.ratio=2")),
                Trial("two texts a row, weights x3", objective(3.0), (TEXTS, "transfer.ratio=2")),
            ),
        },
    ),
    "image_only": Study(
        "A small student that sees the image alone, of a teacher that also reads the name, which says more. Two arms\n"
        "have two heads, and answer with their mean; one of these imitates the teacher's head for images.",
        "quickstart",
        IMAGE_ONLY,
        {
            "labels alone": at_rates(joined(hard())),
            "labels alone, both heads": at_rates(joined(hard(), hard(head=".image")), *BOTH_HEADS),
            "soft labels of image and text": (
                Trial("x0.3", joined(hard(), soft(0.3))),
                Trial("x1", joined(hard(), soft())),
                Trial("x1, labels x0.5", joined(hard(0.5), soft())),
            ),
            "soft labels of the image head": (
                Trial("x1", joined(hard(), soft(1.0, ".image")), BOTH_HEADS),
                Trial("x3", joined(hard(), soft(3.0, ".image")), BOTH_HEADS),
                Trial(
                    "x1, labels on that head too", joined(hard(), hard(head=".image"), soft(1.0, ".image")), BOTH_HEADS
                ),
            ),
            "the image's embedding": (
                Trial("cosine x1", joined(hard(), image("cosine", 1.0))),
                Trial("cosine x3", joined(hard(), image("cosine", 3.0))),
                Trial("cosine x1, rkd x1", joined(hard(), image("cosine", 1.0), image("rkd", 1.0))),
            ),
        },
    ),
    "few_labels_10": few_labels(0.1, 40),
    "few_labels_20": few_labels(0.2, 20),
    "retrieval": Study(
        "A dual encoder: images find their names, and names their images.",
        "retrieval",
        (),
        {"contrastive alone": at_rates(baseline), "contrastive and KD": at_rates(objective())},
    ),
}


Options = argparse.Namespace


def train(name: str, seed: int, arm: str, trial: Trial, options: Options) -> Result:
    """Train a study's student with a seed as a trial says, or find it trained."""
    study = STUDIES[name]
    own = [f"seed={seed}", f"name={study.recipe}-seed{seed}", f"output={options.output}"]
    recipe = load_recipe(study.recipe, [*study.overrides, *trial.overrides, *options.overrides, *own])
    return run_arm(recipe, f"{name}, {arm}, {trial.shown}", trial.objective(recipe))


def measure(name: str, options: Options) -> list[dict[str, Any]]:
    """Every arm of a study: its name, its trials on the first seed, the one chosen, and results seed by seed."""
    arms = []
    for arm, trials in STUDIES[name].arms.items():
        tried = {trial.shown: train(name, 0, arm, trial, options) for trial in trials}
        best = max(trials, key=lambda trial: tried[trial.shown].chosen_by)
        others = [train(name, seed, arm, best, options) for seed in range(1, options.seeds)]
        arms.append({"name": arm, "tried": tried, "chosen": best.shown, "runs": [tried[best.shown], *others]})
    return arms


def markdown(found: dict[str, list[dict[str, Any]]], command: str, seeds: int) -> str:
    """A table a study, and what was tried."""
    parts = [
        "# Where distillation helps on the bundled emoji",
        f"    {command}",
        f"{seeds} seeds, each with a teacher of its own, on test rows. ± is half of the 95 % t-interval over seeds;\n"
        "differences are paired, with their interval. All arms of a study train one student for the same number of\n"
        "steps and had the same number of trials, of which the validation rows of the first seed chose.",
    ]
    for name, arms in found.items():
        first, tasks = arms[0], tasks_of(arm["runs"] for arm in arms)
        head = ["arm", "chosen", *titles(tasks, first["name"])]
        rows = [[arm["name"], arm["chosen"], *columns(arm["runs"], first["runs"], tasks)] for arm in arms]
        tried = [
            f"{arm['name']}: " + ", ".join(f"{shown} {100 * one.chosen_by:.1f}" for shown, one in arm["tried"].items())
            for arm in arms
        ]
        tuned = "Trials, % on the validation rows of the first seed. " + "; ".join(tried) + "."
        parts += [f"## {name}", STUDIES[name].about, table(head, rows), tuned]
    return "\n\n".join(parts) + "\n"


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emoji_studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="overrides of the recipes, such as student.train.epochs=5")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on")
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES), metavar="NAME")
    parser.add_argument("--output", default="runs/emoji_studies", help="folder of the runs")
    add_outputs(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Train what is not trained yet, and print the tables."""
    options = parse(arguments)
    found = {name: measure(name, options) for name in options.studies}
    command = command_line("benchmarks.emoji_studies", arguments)
    shown = {
        name: [
            {
                **arm,
                "tried": {trial: vars(one) for trial, one in arm["tried"].items()},
                "runs": [vars(one) for one in arm["runs"]],
            }
            for arm in arms
        ]
        for name, arms in found.items()
    }
    put_out(options, markdown(found, command, options.seeds), {"command": command, "studies": shown})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
