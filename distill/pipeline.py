"""The stages of a run in order, what each depends on, and the runner that skips what is up to date.

The only file that names teachers and students.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import students
import teachers
from distill import aware, bundles, measured, prune, results, stages
from distill.check import check_recipe
from distill.config import Recipe, nearest
from distill.contracts import Artifact, UserError
from distill.data.prepare import source_fingerprint
from distill.data_config import LabelledConfig
from distill.losses.terms import labelled_alone
from distill.other_teachers import cache_parts, check_inputs, check_labels, check_models, own_taps
from distill.planning import (
    Planned,
    Stage,
    copy_planned,
    descendants,
    discard_again,
    make_plan,
    refuse_loss,
    run_planned,
)
from distill.ranks import Ranks, join
from distill.recipe import as_yaml
from distill.resources import keep_freed_memory
from distill.runs import locked, write_json
from distill.taps import check_pruned, check_taps
from distill.trackers import Trackers
from distill.workspace import Workspace
from teachers.weights import file_identity, weights_identity

ENCODERS = {**teachers.ENCODERS, **students.ENCODERS}


def _architecture(recipe: Recipe) -> dict[str, Any]:
    unrelated = ("inherit", "train", "baseline", "objective")
    return {name: value for name, value in _identity(recipe)["student"].items() if name not in unrelated}


def _student(recipe: Recipe, *fields: str) -> dict[str, Any]:
    learnt = recipe.student.model_dump(include=set(fields), exclude={"train": {"shard"}})
    for part in learnt.get("inherit", {}).values():
        part |= {"file": file_identity(part["file"])} if "file" in part else {}
    return {"student": _architecture(recipe) | learnt}


def _distillation(recipe: Recipe) -> dict[str, Any]:
    return {"transfer": {"ratio": recipe.transfer.ratio if recipe.transfer.texts else None}, "seed": recipe.seed}


def _vocabulary(recipe: Recipe) -> dict[str, Any]:
    cut = recipe.students_words
    text = _identity(recipe)["teacher"]["encoders"].get("text") if cut["vocab_size"] else None
    return {"student": cut, "teacher": {"encoders": {"text": text}}}


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe as fingerprints see it: files count by their content, wherever they lie."""
    unrelated = dict.fromkeys(("output", "trackers", "workers", "fit", "teachers"), True)  # "cache" knows the last
    places = {"path", "root", "train", "valid", "test"}
    training: Any = {"train": {"shard"}, "pretrain": {"__all__": {"shard"}}}  # a run may go on with parts, or without
    tree = recipe.model_dump(exclude={**unrelated, "data": {"source": places}, "teacher": training})
    tree |= {"export": bundles.settings(recipe.export), "prune": prune.younger(tree["prune"])}
    tree["bench"] = recipe.bench.settings()
    for part in (*tree["teacher"]["encoders"].values(), *tree["student"]["encoders"].values()):
        if "weights" in part:
            part["weights"] = weights_identity(part["weights"])
    return tree


def _augmented(recipe: Recipe) -> dict[str, Any]:
    return {"data": {"augment": recipe.data.augment.model_dump()}, "seed": recipe.seed}


def _pretraining(recipe: Recipe) -> dict[str, Any]:
    teacher = {name: value for name, value in _identity(recipe)["teacher"].items() if name != "train"}
    return {"teacher": teacher, **_augmented(recipe)} if recipe.teacher.pretrain else {"teacher": {"pretrain": {}}}


def _towers(recipe: Recipe) -> dict[str, Any]:
    teacher = _identity(recipe)["teacher"]
    read = {"encoders": teacher["encoders"], "class_names": {"tasks": teacher["class_names"]["tasks"]}}
    return {"teacher": read, "views": stages.tower_views(recipe), **_augmented(recipe)}


def _transfer(recipe: Recipe) -> dict[str, Any]:
    if not recipe.transfer.texts:
        return {"transfer": {"texts": 0}}
    made = recipe.transfer.model_dump(include={"texts", "replace"})
    return {"transfer": made, "teacher": {"encoders": _identity(recipe)["teacher"]["encoders"]}, "seed": recipe.seed}


def _data(recipe: Recipe) -> dict[str, Any]:
    fields = {name: value for name, value in _identity(recipe)["data"].items() if name != "augment"}
    source = {"files": source_fingerprint(recipe.data, Path.cwd()), "words": recipe.learnt_words}
    if recipe.data.labelled in (None, LabelledConfig()):  # hides nothing, so there is nothing to choose
        return {"data": fields | {"labelled": None}, "source": source}
    return {"data": fields, "source": source, "seed": recipe.seed}


def _cached(recipe: Recipe) -> dict[str, Any]:
    return {"cache": recipe.cache.model_dump(exclude={"taps"}), "outputs": own_taps(recipe), **cache_parts(recipe)}


def _baseline(recipe: Recipe) -> dict[str, Any]:
    return {
        **_student(recipe, "train", "baseline"),
        **_augmented(recipe),
        "cache": {"views": recipe.cache.views},
        "labelled_alone": labelled_alone(recipe.student.objective),  # such a student takes fewer steps
    }


def _pruned(recipe: Recipe) -> dict[str, Any]:
    learnt = _student(recipe, "inherit", "objective", *prune.judges(recipe.prune)) | _distillation(recipe)
    return learnt | {"prune": prune.settings(recipe)}


def _aware(recipe: Recipe) -> dict[str, Any]:
    learnt = _student(recipe, "inherit", "objective") | _distillation(recipe)
    quantize = bundles.aware_settings(recipe.export.quantize)
    return learnt | bundles.graph_settings(recipe.export) | {"quantize": quantize}


STAGES = (
    Stage("data", "read, check and decode the rows", stages.prepare_data, (), _data, version=6),
    Stage("vocabulary", "cut the teacher's vocabulary to the student's", stages.cut_vocabulary, ("data",), _vocabulary),
    Stage(
        "pretrain", "let encoders learn alone", stages.pretrain, ("data",), _pretraining, resumes=True, together=True
    ),
    Stage(
        "towers",
        "encode each distinct input of the frozen towers once",
        stages.keep_towers,
        ("data", "pretrain"),
        _towers,
        version=2,
        resumes=True,
        together=True,
        mends=True,
    ),
    Stage(
        "transfer",
        "make texts without labels for the teacher to answer",
        stages.make_transfer,
        ("data",),
        _transfer,
        version=2,
    ),
    Stage(
        "teacher",
        "fit the teacher",
        stages.fit_teacher,
        ("data", "pretrain", "towers"),
        lambda r: {"teacher": _identity(r)["teacher"], "seed": r.seed},
        version=2,
        resumes=True,
        together=True,
    ),
    Stage(
        "cache",
        "store the teacher's outputs",
        stages.fill_cache,
        ("data", "towers", "transfer", "teacher"),
        _cached,
        version=2,
        resumes=True,
        together=True,
        mends=True,
    ),
    Stage(
        "baseline",
        "train the student without a teacher",
        stages.train_baseline,
        ("data", "vocabulary"),
        _baseline,
        resumes=True,
        together=True,
    ),
    Stage(
        "inherit",
        "give the student what it takes over from the teacher",
        stages.inherit,
        ("data", "teacher", "vocabulary"),
        lambda r: {**_student(r, "inherit"), "seed": r.seed},
    ),
    Stage(
        "student",
        "distil the student",
        stages.distil_student,
        ("data", "transfer", "teacher", "cache", "inherit"),
        lambda r: _student(r, "inherit", "objective", "train") | _distillation(r),
        resumes=True,
        together=True,
    ),
    Stage(
        "pruned",
        "prune the student and recover",
        stages.prune_student,
        ("data", "transfer", "teacher", "cache", "inherit", "student"),
        _pruned,
        resumes=True,
        together=True,
    ),
    Stage(
        bundles.QAT,
        "train the shipped student for int8",
        aware.train_aware,
        ("data", "transfer", "teacher", "cache", "inherit", "pruned"),
        _aware,
        resumes=True,
        together=True,
        wanted=aware.asked_for,
    ),
    Stage(
        "export",
        "write the fp32 graphs and the onnx-fp32 bundle",
        results.export_graphs,
        ("data", "teacher", "vocabulary", "inherit", "baseline", "student", "pruned"),
        lambda r: {**_student(r), "export": bundles.fp32_settings(r.export)},
        version=2,
    ),
    Stage(
        "quantize",
        "write the other bundles from the fp32 graph",
        results.quantize_bundles,
        ("data", "pruned", bundles.QAT, "export"),
        lambda r: {"export": bundles.settings(r.export)},
        version=3,
    ),
    Stage(
        "evaluate",
        "predict the test rows with every model, each on its own runtime",
        results.evaluate_all,
        ("data", "towers", "teacher", "vocabulary", "inherit", "baseline", "student", "pruned", "export", "quantize"),
        _student,
    ),
    Stage(
        "bench",
        "measure latency, memory and size",
        results.bench_all,
        ("data", "teacher", "vocabulary", "inherit", "baseline", "student", "pruned", "export", "quantize"),
        lambda r: {"bench": r.bench.settings()},
    ),
    Stage(
        "report",
        "compare student and teacher",
        results.write_run_report,
        ("data", "cache", "evaluate", "bench"),
        lambda r: {**_identity(r), "report": measured.settings(r.report)},
    ),
)
NAMES = [stage.name for stage in STAGES]


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run lies: ``OUTPUT/NAME``."""
    return Path(recipe.output) / recipe.name


def check(recipe: Recipe, until: str | None = None) -> None:
    """Check what the schema cannot: names and parameters of all parts against their builders.

    Args:
        recipe: validated by its schema.
        until: last stage, if not all; what later ones alone read is not checked.

    Raises:
        UserError: the first mistake found.
    """
    check_recipe(recipe, ENCODERS, students.INHERITANCES)
    needed = [stage.name for stage in _needed(recipe, until)]
    bundles.check_bundles(recipe.export, retrieves=recipe.retrieval is not None)
    aware.check_aware(recipe)
    measured.read_measured(recipe.report)
    if "pruned" in needed:
        prune.check_pruning(recipe, ENCODERS)


def plan(
    recipe: Recipe, *, until: str | None = None, force: Sequence[str] = (), ranks: Ranks | None = None
) -> list[Planned]:
    """Find out which stages are up to date.

    Args:
        recipe: the validated recipe.
        until: last stage; with it, only what that stage needs.
        force: stages to run again in any case.
        ranks: who plans together, if not this process alone.

    Raises:
        UserError: an unknown stage, or the data's source is missing.
    """
    stages_needed = _needed(recipe, until)
    known = [stage.name for stage in stages_needed]
    for name in force:
        if name not in known:
            unread = f"stage {name!r} is not needed for {until or recipe.name!r}"
            what = unread if name in NAMES else f"unknown stage {name!r}"
            raise UserError(f"--force: {what}; {nearest(name, known)}")
    others = [Path(entry.run) for entry in recipe.teachers.values()]
    return make_plan(recipe, stages_needed, run_folder(recipe), others, descendants(force, STAGES), ranks or Ranks())


def _needed(recipe: Recipe, until: str | None) -> list[Stage]:
    """All stages that a recipe has, or those that one of them needs, in order."""
    assert until is None or until in NAMES
    wanted = set(NAMES if until is None else [until])
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update(stage.parents)
    return [stage for stage in STAGES if stage.name in wanted and stage.wanted(recipe)]


def run(
    recipe: Recipe,
    *,
    until: str | None = None,
    force: Sequence[str] = (),
    quiet: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Artifact]:
    """Bring a run up to date.

    Args:
        recipe: the validated recipe; its relative paths start from the working directory.
        until: last stage, if not all.
        force: stages to run again in any case.
        quiet: show no progress.
        say: called with one line a stage.

    Returns:
        Finished artifacts by stage name.

    Raises:
        UserError: a mistake that the user can mend, the run folder is in use, or it holds long work that was made with
            other settings.
    """
    check(recipe, until)
    keep_freed_memory()
    folder, ranks = run_folder(recipe), join()
    with locked(folder) if ranks.first else nullcontext():
        ranks.wait()
        planned = plan(recipe, until=until, force=force, ranks=ranks)
        refuse_loss(planned, folder)
        bundles.check_machine(recipe, [item.stage.name for item in planned if item.artifact is None])
        if ranks.first:
            discard_again(folder, descendants(force, STAGES), planned)
            write_json(folder / "recipe.resolved.json", recipe.model_dump())
            (folder / "recipe.resolved.yaml").write_text(as_yaml(recipe), encoding="utf-8")
        trackers = Trackers(list(recipe.trackers) if ranks.first else [], folder / "trackers", recipe.name)
        if not ranks.first:
            quiet, say = True, lambda line: None
        work = Workspace(recipe, ENCODERS, students.INHERITANCES, quiet=quiet, ranks=ranks, trackers=trackers)
        for item in planned:
            artifact = item.artifact
            if item.lender is not None:
                say(f"{item.stage.name}: copied from {item.lender}, where it is the same")
                artifact = copy_planned(item, ranks, folder / item.stage.name)
            if artifact is None:
                say(f"{item.stage.name}: {item.about}")
                artifact = run_planned(item, work, folder / item.stage.name)
                cost = artifact.info["cost"]
                say(f"{item.stage.name}: done in {cost['seconds']:.1f} s ({cost['cpu_seconds']:.1f} CPU-seconds)")
            work.done[item.stage.name] = artifact
            _check_teachers(work, item.stage.name, {other.stage.name for other in planned if other.artifact is None})
        ranks.wait()
    return work.done


def _check_teachers(work: Workspace, finished: str, waiting: set[str]) -> None:
    """Check what a finished stage makes known of the student's teachers, before one is fitted for hours."""
    if finished == "data":
        check_labels(work.recipe, work.tasks())
        if waiting.intersection(("teacher", "cache", "student")):
            check_taps(work.recipe, ENCODERS)
        if "pruned" in waiting:
            check_pruned(work.recipe, ENCODERS)
        if "cache" in waiting:
            check_models(work.recipe, ENCODERS)
    if finished == "vocabulary" and waiting.intersection(("student", "pruned")):
        check_inputs(work)


def workspace(recipe: Recipe, done: dict[str, Artifact]) -> Workspace:
    """Open the finished stages of a run."""
    return Workspace(recipe, ENCODERS, students.INHERITANCES, done, quiet=True)
