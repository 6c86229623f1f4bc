"""The stages of a run in order, what each depends on, and the runner that skips what is up to date.

The only file that names teachers and students.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import students
import teachers
from distill import results, stages
from distill.cache import changed_parts
from distill.check import check_pruning, check_recipe
from distill.config import LabelledConfig, Recipe, nearest
from distill.contracts import Artifact, UserError
from distill.data.prepare import prepare, source_fingerprint
from distill.losses.terms import labelled_alone
from distill.other_teachers import cache_parts, check_labels, check_models, check_tokenizers, own_taps
from distill.planning import Planned, Stage, look_up
from distill.progress import progress
from distill.ranks import Ranks, join
from distill.recipe import as_yaml
from distill.resources import cpu_seconds, keep_freed_memory
from distill.runs import copy_stage, discard, find, fingerprint, finish, locked, start, write_json
from distill.taps import check_taps
from distill.trackers import Trackers
from distill.workspace import Workspace
from teachers.weights import weights_identity

ENCODERS = {**teachers.ENCODERS, **students.ENCODERS}


def _student_architecture(recipe: Recipe) -> Any:
    unrelated = ("inherit", "train", "baseline", "objective")
    return {name: value for name, value in _identity(recipe)["student"].items() if name not in unrelated}


def _distillation(recipe: Recipe) -> Any:
    learnt = recipe.student.model_dump(include={"inherit", "objective"})
    ratio = recipe.transfer.ratio if recipe.transfer.texts else None
    return [_student_architecture(recipe), learnt, ratio, recipe.seed]


def _vocabulary(recipe: Recipe) -> Any:
    sizes = [part.params["vocab_size"] for part in recipe.student.encoders.values() if "vocab_size" in part.params]
    return [sizes, _identity(recipe)["teacher"]["encoders"].get("text")] if sizes else []


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe as fingerprints see it: files count by their content, wherever they lie."""
    unrelated = {"output": True, "trackers": True, "workers": True, "teachers": True}  # the stage "cache" knows these
    places = {"path", "root", "train", "valid", "test"}
    training: Any = {"train": {"shard"}, "pretrain": {"__all__": {"shard"}}}  # a run may go on with parts, or without
    tree = recipe.model_dump(exclude={**unrelated, "data": {"source": places}, "teacher": training})
    for part in (*tree["teacher"]["encoders"].values(), *tree["student"]["encoders"].values()):
        if "weights" in part:
            part["weights"] = weights_identity(part["weights"])
    return tree


def _pretraining(recipe: Recipe) -> Any:
    teacher = {name: value for name, value in _identity(recipe)["teacher"].items() if name != "train"}
    return [teacher, recipe.data.augment.model_dump(), recipe.seed] if recipe.teacher.pretrain else []


def _towers(recipe: Recipe) -> Any:
    teacher = _identity(recipe)["teacher"]
    read = [teacher["encoders"], teacher["class_names"]["tasks"]]
    return [read, recipe.data.augment.model_dump(), stages.tower_views(recipe), recipe.seed]


def _transfer(recipe: Recipe) -> Any:
    made = recipe.transfer.model_dump(include={"texts", "replace"})
    return [made, _identity(recipe)["teacher"]["encoders"], recipe.seed] if recipe.transfer.texts else []


def _data(recipe: Recipe) -> Any:
    fields = {name: value for name, value in _identity(recipe)["data"].items() if name != "augment"}
    files = source_fingerprint(recipe.data, Path.cwd())
    if recipe.data.labelled in (None, LabelledConfig()):  # hides nothing, so there is nothing to choose
        return [fields | {"labelled": None}, files]
    return [fields, files, recipe.seed]


def _prepare(work: Workspace, folder: Path) -> dict[str, Any]:
    with progress("read data", quiet=work.quiet) as report:
        return prepare(work.recipe.data, folder, Path.cwd(), report, seed=work.recipe.seed)


STAGES = (
    Stage("data", "read, check and decode the rows", _prepare, (), _data, version=4),
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
        lambda r: [_identity(r)["teacher"], r.seed],
        version=2,
        resumes=True,
        together=True,
    ),
    Stage(
        "cache",
        "store the teacher's outputs",
        stages.fill_cache,
        ("data", "towers", "transfer", "teacher"),
        lambda r: [r.cache.model_dump(exclude={"taps"}), own_taps(r), cache_parts(r)],
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
        lambda r: [
            _student_architecture(r),
            r.student.model_dump(include={"train", "baseline"}, exclude={"train": {"shard"}}),
            r.data.augment.model_dump(),
            r.cache.views,
            labelled_alone(r.student.objective),  # a student of labelled rows alone takes fewer steps
            r.seed,
        ],
        resumes=True,
        together=True,
    ),
    Stage(
        "inherit",
        "give the student what it takes over from the teacher",
        stages.inherit,
        ("data", "teacher", "vocabulary"),
        lambda r: [_student_architecture(r), r.student.model_dump(include={"inherit"}), r.seed],
    ),
    Stage(
        "student",
        "distil the student",
        stages.distil_student,
        ("data", "transfer", "teacher", "cache", "inherit"),
        lambda r: [_distillation(r), r.student.train.model_dump(exclude={"shard"})],
        resumes=True,
        together=True,
    ),
    Stage(
        "pruned",
        "prune the student and recover",
        stages.prune_student,
        ("data", "transfer", "teacher", "cache", "inherit", "student"),
        lambda r: [_distillation(r), r.prune.model_dump(exclude={"train": {"shard"}})],
        resumes=True,
        together=True,
    ),
    Stage(
        "export",
        "write the fp32 graphs and the onnx-fp32 bundle",
        results.export_graphs,
        ("data", "teacher", "vocabulary", "inherit", "baseline", "student", "pruned"),
        lambda r: [_student_architecture(r), r.export.model_dump(exclude={"quantize", "min_agreement_int8"})],
        version=2,
    ),
    Stage(
        "quantize",
        "write the onnx-int8 bundle from the fp32 graph",
        results.quantize_bundle,
        ("data", "pruned", "export"),
        lambda r: r.export.model_dump(),
        version=3,
    ),
    Stage(
        "evaluate",
        "predict the test rows with every model, each on its own runtime",
        results.evaluate_all,
        ("data", "towers", "teacher", "vocabulary", "inherit", "baseline", "student", "pruned", "export", "quantize"),
        lambda r: _student_architecture(r),
    ),
    Stage(
        "bench",
        "measure latency, memory and size",
        results.bench_all,
        ("data", "teacher", "vocabulary", "inherit", "baseline", "student", "pruned", "export", "quantize"),
        lambda r: r.bench.model_dump(),
    ),
    Stage(
        "report",
        "compare student and teacher",
        results.write_run_report,
        ("data", "cache", "evaluate", "bench"),
        _identity,
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
    if "://" in recipe.output:
        raise UserError(
            f"output: runs are written to a folder, and {recipe.output} is a URL; name a folder, one that all machines "
            "share if there are several"
        )
    check_recipe(recipe, ENCODERS, students.INHERITANCES)
    if "pruned" in [stage.name for stage in _needed(until)]:
        check_pruning(recipe, ENCODERS)


def plan(recipe: Recipe, *, until: str | None = None, force: Sequence[str] = ()) -> list[Planned]:
    """Find out which stages are up to date.

    Args:
        recipe: the validated recipe.
        until: last stage; with it, only what that stage needs.
        force: stages to run again in any case.

    Raises:
        UserError: an unknown stage, or the data's source is missing.
    """
    stages_needed = _needed(until)
    known = [stage.name for stage in stages_needed]
    for name in force:
        if name not in known:
            what = f"stage {name!r} is not needed for {until!r}" if name in NAMES else f"unknown stage {name!r}"
            raise UserError(f"--force: {what}; {nearest(name, known)}")
    folder, rerun = run_folder(recipe), descendants(force)
    others = [Path(entry.run) for entry in recipe.teachers.values()]
    keys: dict[str, str] = {}
    planned = []
    for stage in stages_needed:
        part = [stage.config(recipe), stage.version, [keys[parent] for parent in stage.parents]]
        keys[stage.name] = fingerprint(stage.name, part)
        planned.append(look_up(stage, keys[stage.name], folder, others, fresh=stage.name in rerun))
    return planned


def descendants(names: Sequence[str]) -> list[str]:
    """These stages and all that read their artifacts, directly or not, in order."""
    found = set(names)
    for stage in STAGES:
        if found.intersection(stage.parents):
            found.add(stage.name)
    return [name for name in NAMES if name in found]


def _needed(until: str | None) -> list[Stage]:
    """All stages, or those that one of them needs, in order."""
    assert until is None or until in NAMES
    wanted = set(NAMES if until is None else [until])
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update(stage.parents)
    return [stage for stage in STAGES if stage.name in wanted]


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
        UserError: a mistake that the user can mend, or the run folder is in use.
    """
    check(recipe, until)
    keep_freed_memory()
    folder, ranks = run_folder(recipe), join()
    with locked(folder) if ranks.first else nullcontext():
        ranks.wait()
        planned = plan(recipe, until=until, force=force)
        ranks.wait()  # all have seen the same folder
        if ranks.first:
            for name in descendants(force):
                discard(folder / name)
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
                artifact = _copied(item, item.lender, ranks, folder / item.stage.name)
            if artifact is None:
                say(f"{item.stage.name}: {item.stage.about}")
                if item.stage.name == "cache" and (changed := changed_parts(folder / "cache", stages.cache_key(work))):
                    say(f"cache: the one that lies here was filled with other {', '.join(changed)}; it is replaced")
                artifact = _run_stage(item, work, folder / item.stage.name)
                cost = artifact.info["cost"]
                say(f"{item.stage.name}: done in {cost['seconds']:.1f} s ({cost['cpu_seconds']:.1f} CPU-seconds)")
            work.done[item.stage.name] = artifact
            _check_teachers(work, item.stage.name, {other.stage.name for other in planned if other.artifact is None})
        ranks.wait()
    return work.done


def _check_teachers(work: Workspace, finished: str, waiting: set[str]) -> None:
    """Check what a finished stage makes known of the student's teachers, before one is fitted for hours."""
    if finished == "data":
        check_labels(work.recipe, work.labels())
        if waiting.intersection(("teacher", "cache", "student")):
            check_taps(work.recipe, ENCODERS)
        if "cache" in waiting:
            check_models(work.recipe, ENCODERS)
    if finished == "vocabulary" and waiting.intersection(("student", "pruned")):
        check_tokenizers(work)


def workspace(recipe: Recipe, done: dict[str, Artifact]) -> Workspace:
    """Open the finished stages of a run."""
    return Workspace(recipe, ENCODERS, students.INHERITANCES, done, quiet=True)


def _copied(item: Planned, lender: Path, ranks: Ranks, folder: Path) -> Artifact | None:
    """A stage that another run has; None if that run has changed by now."""
    if ranks.first:
        copy_stage(lender / item.stage.name, folder)
    ranks.wait()
    return find(folder, item.stage.name, item.key)


def _run_stage(item: Planned, work: Workspace, folder: Path) -> Artifact:
    stage, ranks = item.stage, work.ranks
    if ranks.first:
        start(folder, item.key, resume=stage.resumes, mend=stage.mends)
    ranks.wait()
    work.done[stage.name] = Artifact(stage.name, folder, item.key)
    wall, cpu = time.monotonic(), cpu_seconds()
    info = stage.run(work, folder) if stage.together or ranks.first else {}
    cost = {"seconds": time.monotonic() - wall, "cpu_seconds": cpu_seconds() - cpu}
    ranks.wait()
    if ranks.first:
        finish(folder, stage.name, item.key, {**info, "cost": cost})
    ranks.wait()
    found = find(folder, stage.name, item.key)
    assert found is not None, f"{folder} is not shared by all ranks"
    return found
