"""Every method of distillation at one budget, on the bundled emoji: ``python -m benchmarks.kd_methods``.

The quick start's student starts from scratch (nothing is inherited, and there is no transfer set) and learns from
labels, or from labels and one method. All arms of a seed share the teacher, the rows, their order and views, and the
number of steps. Each method is tried at each of ``--factors`` times its usual weight; the validation rows of the first
seed choose. Test rows are read once a seed for what was chosen. A training that fails is listed as such.

What is finished is kept, so a second call only prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.seed_tables import add_outputs, command_line, put_out, table
from benchmarks.student_arms import columns, run_arm, tasks_of, titles, weighted
from distill.config import Recipe, TermConfig
from distill.contracts import UserError
from distill.recipe import load_recipe

FACTORS = (1 / 3, 1.0, 3.0)  # of a method's usual weights
NONE, RECIPE = "none (labels alone)", "quick start's objective"
TASKS, EMBEDDINGS = ("category", "subcategory"), ("fused", "image", "text")
STAGES = [f"encoders.image.stages.{number}" for number in (1, 2, 3)]
MAP = STAGES[-1]


@dataclass(frozen=True)
class Method:
    """What is added to the labels.

    Attributes:
        name: in the table.
        on: what it compares.
        terms: at their usual weights.
    """

    name: str
    on: str
    terms: tuple[dict[str, Any], ...]

    def objective(self, labels: Sequence[TermConfig], factor: float) -> list[TermConfig]:
        """The labels' terms, then its own, at a multiple of their weights."""
        own = [TermConfig.model_validate(term) for term in self.terms]
        return [*labels, *weighted(own, factor)]


def _on_tasks(loss: str, weight: float = 1.0, **params: Any) -> Method:
    return Method(loss, "logits", tuple(_term(loss, weight, params, task=task) for task in TASKS))


def _on_heads(loss: str, weight: float = 1.0, **params: Any) -> Method:
    heads = [f"{task}.{head}" for task in TASKS for head in EMBEDDINGS]
    terms = tuple(_term(loss, weight, params, task=task) for task in (*TASKS, *heads))
    return Method(f"{loss} on each head", "logits", terms)


def _on_embeddings(loss: str, weight: float = 1.0, **params: Any) -> Method:
    return Method(loss, "embeddings", tuple(_term(loss, weight, params, embedding=name) for name in EMBEDDINGS))


def _on_map(loss: str, weight: float = 1.0, **params: Any) -> Method:
    return Method(loss, "image features", (_term(loss, weight, params, taps={"student": MAP, "teacher": MAP}),))


def _on_stages(loss: str, stages: list[str], weight: float = 1.0) -> Method:
    return Method(loss, "image features", (_term(loss, weight, {}, taps={"student": stages, "teacher": stages}),))


def _on_pair(loss: str, weight: float = 1.0, **params: Any) -> Method:
    return Method(loss, "image and text", (_term(loss, weight, params, embedding="image,text"),))


def _term(loss: str, weight: float, params: dict[str, Any], **target: Any) -> dict[str, Any]:
    return {"loss": loss, "weight": weight, "params": params, **target}


METHODS = (
    _on_tasks("kd", temperature=4.0),
    _on_heads("kd", 0.5, temperature=4.0),
    _on_tasks("dkd", temperature=4.0),
    _on_tasks("nkd"),
    _on_tasks("dist"),
    _on_tasks("logit_standardized_kd"),
    _on_tasks("mse_logits", 0.1),
    _on_tasks("ctkd"),
    _on_embeddings("cosine"),
    _on_embeddings("fitnet"),
    _on_embeddings("rkd"),
    _on_embeddings("sp", 10.0),
    _on_embeddings("pkt", 10.0),
    _on_embeddings("cckd", 0.1),
    _on_embeddings("crd", 0.1),
    _on_embeddings("queue_kl"),
    _on_map("at", 100.0),
    _on_map("nst"),
    _on_map("hcl"),
    _on_map("cwd"),
    _on_map("vid"),
    _on_map("mgd", 1e-4),
    _on_map("ofd", 1e-3),
    _on_stages("fsp", STAGES[1:]),
    _on_stages("review", STAGES),
    _on_pair("clip_relational_ce"),
    _on_pair("clip_relational_kl"),
    _on_pair("siglip_relational"),
    _on_pair("clip_fd"),
    _on_pair("clip_icl"),
    _on_pair("clip_gd"),
    _on_pair("clip_afd"),
    _on_pair("clip_infonce", 0.1),
    _on_pair("siglip", 0.1),
)


def seed_recipe(seed: int, output: str, overrides: Sequence[str]) -> Recipe:
    """The quick start from scratch; its cache holds what any method reads."""
    own = [f"seed={seed}", f"name=kd_methods-seed{seed}", f"output={output}", f"cache.taps=[{', '.join(STAGES)}]"]
    scratch = ["student.inherit={}", "student.embedding_dim=256", "transfer.texts=0"]  # as wide as the teacher's
    return load_recipe("quickstart", [*scratch, *overrides, *own])


def measure(
    recipes: Sequence[Recipe], methods: Sequence[Method], factors: Sequence[float] = FACTORS
) -> list[dict[str, Any]]:
    """Every arm: its name, what it compares, the factor chosen, and its results seed by seed."""
    first = recipes[0]
    labels, whole = list(first.student.baseline), list(first.student.objective)
    arms: list[dict[str, Any]] = []
    for name, objective in ((NONE, labels), (RECIPE, whole)):
        arms.append({"name": name, "on": "", "factor": None, "runs": [run_arm(r, name, objective) for r in recipes]})
    for method in methods:
        tried = {f: run_arm(first, f"{method.name} x{f:.2g}", method.objective(labels, f)) for f in factors}
        best = max(factors, key=lambda factor: tried[factor].chosen_by)
        objective = method.objective(labels, best)
        runs = [tried[best], *(run_arm(r, f"{method.name} x{best:.2g}", objective) for r in recipes[1:])]
        arms.append({"name": method.name, "on": method.on, "factor": best, "runs": runs})
    return arms


def markdown(arms: Sequence[dict[str, Any]], command: str) -> str:
    """The table, best on the validation rows first."""
    against, tasks = arms[0]["runs"], tasks_of(arm["runs"] for arm in arms)
    seeds = len(against)
    ranked = sorted(arms, key=lambda arm: -fmean(run.chosen_by for run in arm["runs"]))
    head = ["method", "on", "weight", *titles(tasks, "labels alone")]
    rows = [[arm["name"], arm["on"], _weight(arm), *columns(arm["runs"], against, tasks)] for arm in ranked]
    about = (
        f"The quick start's student from scratch, {seeds} seeds, each with a teacher of its own, on test rows. ± is\n"
        "half of the 95 % t-interval over seeds; differences are paired, with their interval. Weight: times the usual\n"
        "one; where several were tried, the one that was best on the validation rows of the first seed. The mean over\n"
        "tasks and seeds there orders the table. Not in it, as the quick start's models do not suit them: srrl and\n"
        "simkd (which read one classifier; the teacher has two members), losses on tokens (the student's words have\n"
        "no order), multilabel_kd (a row has one class) and clip_ensemble_ce (of several teachers)."
    )
    return "\n\n".join(["# Methods of distillation", f"    {command}", about, table(head, rows)]) + "\n"


def _weight(arm: dict[str, Any]) -> str:
    return "" if arm["factor"] is None else {1 / 3: "1/3"}.get(arm["factor"], f"{arm['factor']:g}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kd_methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, such as student.train.epochs=5")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, metavar="F", help="on the usual weights")
    parser.add_argument("--methods", nargs="*", choices=[method.name for method in METHODS], metavar="NAME")
    parser.add_argument("--output", default="runs/kd_methods", help="folder of the runs")
    add_outputs(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Train what is not trained yet, and print the table."""
    options = parse(arguments)
    methods = [method for method in METHODS if options.methods is None or method.name in options.methods]
    arms = measure(
        [seed_recipe(seed, options.output, options.overrides) for seed in range(options.seeds)],
        methods,
        options.factors,
    )
    command = command_line("benchmarks.kd_methods", arguments)
    text = markdown(arms, command)
    shown = [{**arm, "runs": [vars(run) for run in arm["runs"]]} for arm in arms]
    put_out(options, text, {"command": command, "arms": shown})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
