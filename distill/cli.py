"""The ``distill`` command: one verb a stage. Verbs import what they need, so that ``--help`` is instant.

Exit codes: 0 done, 1 the run failed, 2 a mistake in the call, the config or the data, 130 / 143 stopped by a signal.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from distill import __version__, cache_commands, explain_command, fit_command, serve_command, verify_command
from distill.contracts import UserError

if TYPE_CHECKING:
    from distill.config import Recipe
    from distill.contracts import Artifact

app = typer.Typer(
    name="distill",
    help="Distil a large multimodal teacher into a small student: train, prune, quantize, export, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe: a YAML file, or the name of a packaged one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides such as student.train.epochs=5.")]
TeacherOption = Annotated[
    str, typer.Option("--teacher", help="Teacher part, a file or a packaged name, in place of the recipe's.")
]
StudentOption = Annotated[
    str, typer.Option("--student", help="Student part, a file or a packaged name, in place of the recipe's.")
]
DataOption = Annotated[
    str, typer.Option("--data", help="Data part, a file or a packaged name, in place of the recipe's.")
]
ForceOption = Annotated[list[str] | None, typer.Option("--force", help="Stage to run again; may be repeated.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines; progress goes to standard error.")]
NO_SPACE_OR_RIGHT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
BundleArgument = Annotated[Path, typer.Argument(help="A bundle folder, e.g. runs/NAME/quantize/onnx-int8.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"multidistill {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    teacher: TeacherOption = "",
    student: StudentOption = "",
    data: DataOption = "",
    force: ForceOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe from data to report; finished stages are skipped."""
    loaded = _load(recipe, overrides, teacher=teacher, student=student, data=data)
    if dry_run:
        _print_plan(loaded, force or [], as_json=as_json)
        return
    _finish_run(loaded, _run(loaded, None, force, as_json=as_json), as_json=as_json)


def _stage_command(name: str, until: str, text: str, group: typer.Typer = app, command: str = "") -> None:
    """Add a verb (or a command of a verb) that runs a recipe up to one stage."""

    def verb(
        recipe: RecipeArgument,
        overrides: Overrides = None,
        teacher: TeacherOption = "",
        student: StudentOption = "",
        data: DataOption = "",
        force: ForceOption = None,
        as_json: JsonOption = False,
    ) -> None:
        loaded = _load(recipe, overrides, teacher=teacher, student=student, data=data)
        done = _run(loaded, until, force, as_json=as_json)
        artifact = done[until]
        if as_json:
            typer.echo(json.dumps({"path": str(artifact.path), **artifact.info}))
        else:
            typer.echo(f"{name}: {artifact.path}")
            for bundle, gate in artifact.info.get("parity", {}).items():
                if "not_run" in gate:
                    typer.echo(f"{bundle}: {gate['not_run']}")

    verb.__doc__ = text
    group.command(command or name)(verb)


_stage_command("train", "student", "Fit the teacher, fill its cache and distil the student.")
_stage_command(
    "cache",
    "cache",
    "Fit the teacher and store its outputs for every training row and view.",
    cache_commands.app,
    cache_commands.DEFAULT,
)
app.add_typer(cache_commands.app)
_stage_command("prune", "pruned", "Prune the distilled student and recover its accuracy.")
_stage_command("export", "export", "Write the onnx-fp32 bundle of the pruned student.")
_stage_command("quantize", "quantize", "Write the other bundles from the fp32 graph.")
_stage_command("evaluate", "evaluate", "Predict the test rows with every model on its own runtime.")
_stage_command("bench", "bench", "Measure latency, memory and size of every graph on its runtime.")


@app.command()
def profile(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    teacher: TeacherOption = "",
    student: StudentOption = "",
    data: DataOption = "",
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Tell where a step of the student's training goes; stages that it reads are run first."""
    loaded = _load(recipe, overrides, teacher=teacher, student=student, data=data)
    done = _run(loaded, "cache", [], as_json=as_json) | _run(loaded, "inherit", [], as_json=as_json)
    from distill import pipeline
    from distill.profile import profile_student, render

    found = profile_student(pipeline.workspace(loaded, done), steps)
    for line in [json.dumps(found)] if as_json else render(found):
        typer.echo(line)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A recipe, a teacher or a student: a YAML file, or a packaged name.")],
    overrides: Overrides = None,
    teacher: TeacherOption = "",
    student: StudentOption = "",
    data: DataOption = "",
    pattern: Annotated[
        str, typer.Option("--filter", help="Only module paths with this text in them, or like this pattern: '*.attn'.")
    ] = "",
    depth: Annotated[int, typer.Option(min=0, help="Levels inside layers, fusion, necks and heads.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """List what the taps of terms may name: modules, the shapes of their outputs, and kinds of features."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # to look costs no download
    from distill import pipeline, taps
    from distill.recipe import load_models

    loaded, names = load_models(model, overrides or [], {"teacher": teacher, "student": student, "data": data})
    found = taps.inspect_models(loaded, names, pipeline.ENCODERS, part=len(names) == 1)
    for line in [json.dumps(taps.as_json(found, pattern, depth))] if as_json else taps.render(found, pattern, depth):
        typer.echo(line)


@app.command()
def validate(
    recipe: Annotated[str, typer.Argument(help="A recipe: a YAML file, or the name of a packaged one.")] = "",
    overrides: Overrides = None,
    teacher: TeacherOption = "",
    student: StudentOption = "",
    data: DataOption = "",
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """Check a recipe without running it: keys, types, names and parameters of all parts."""
    if schema:
        from distill.config import Recipe as RecipeSchema

        typer.echo(json.dumps(RecipeSchema.model_json_schema(), indent=2))
        return
    if not recipe:
        raise UserError("validate: name a recipe, or ask for --schema")
    loaded = _load(recipe, overrides, teacher=teacher, student=student, data=data)
    from distill import pipeline
    from distill.other_teachers import check_source_labels

    pipeline.check(loaded)
    check_source_labels(loaded)
    typer.echo(f"{recipe}: valid; run folder {pipeline.run_folder(loaded)}")


@app.command()
def predict(
    bundle: BundleArgument,
    image: Annotated[list[Path] | None, typer.Option("--image", help="Image file; may be repeated.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="Text; may be repeated.")] = None,
    audio: Annotated[list[Path] | None, typer.Option("--audio", help="Audio file; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option("--video", help="Video file; may be repeated.")] = None,
    series: Annotated[list[Path] | None, typer.Option("--series", help="File of numbers; may be repeated.")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="CSV with columns named image, text, ...")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes or labels listed a row.")] = 3,
    provider: Annotated[str, typer.Option(help="Of ONNX bundles: cpu, cuda or tensorrt.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Answer for rows of files and texts with an exported bundle; needs no torch."""
    from distill.predict import in_words, predict_rows

    given = {"image": image, "text": text, "audio": audio, "video": video, "series": series}
    filled = {name: values for name, values in given.items() if values}
    rows = predict_rows(bundle, filled, table, top_k=top_k, provider=provider)
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        if len(rows) > 1:
            typer.echo(" | ".join(str(v) for name, v in row.items() if name != "predictions" and v is not None))
        for task, answer in row["predictions"].items():
            typer.echo(f"{'  ' if len(rows) > 1 else ''}{task}: {in_words(answer)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, e.g. runs/a runs/b.")],
    markdown: Annotated[Path | None, typer.Option(help="Also write all of it to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare finished runs: accuracies, differences with intervals, and settings that differ."""
    from rich.console import Console

    from distill.report import compare_runs, comparison_table, render_comparison
    from distill.runs import read_json

    files = [folder / "report" / "report.json" for folder in runs]
    for file in files:
        if not file.is_file():
            raise UserError(f"no report in {file.parent}; finish that run with `distill run` first")
    try:
        reports = [read_json(file) for file in files]
    except ValueError as error:
        raise UserError(f"a report is damaged: {error}; make it again with --force report") from error
    names = [folder.name for folder in runs]
    result = compare_runs(reports, names if len(set(names)) == len(names) else [str(folder) for folder in runs])
    if markdown is not None:
        markdown.write_text(render_comparison(result), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console().print(comparison_table(result))


app.command()(explain_command.explain)
app.command()(fit_command.fit)
app.command()(serve_command.serve)
app.command()(verify_command.verify)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Print versions, devices, extras that are present or missing, and free disk."""
    from distill.doctor import describe, render

    facts = describe()
    typer.echo(json.dumps(facts) if as_json else render(facts))


class _StoppedError(BaseException):
    """A signal arrived outside of training, which handles signals itself; no library should swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again to go on")
        self.exit_code = 128 + signum


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake of the user ends in one sentence and exit code 2.

    Args:
        arguments: those of the process by default.
    """
    # torchao, where it is installed, makes torch warn about itself as soon as transformers is imported.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        with _stoppable(), _leaving():
            app(args=arguments)
    except UserError as error:
        _fail(error, 2)
    except _StoppedError as stopped:
        _fail(stopped, stopped.exit_code)
    except OSError as error:
        if error.errno not in NO_SPACE_OR_RIGHT:
            raise
        _fail(error, 1)
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.partition(".")[0] == "distill":
            _fail(error, getattr(error, "exit_code", 1))
        from distill.resources import first_line, out_of_memory

        if not out_of_memory(error):
            raise
        advice = "use a smaller model, or a machine with more memory"
        _fail(RuntimeError(f"out of memory ({first_line(error)}); {advice}"), 1)


@contextmanager
def _leaving() -> Iterator[None]:
    """Leave the process group of a launcher when all went well; importing torch to ask for one would take a second."""
    try:
        yield
    except SystemExit as ended:
        if not ended.code and "distill.ranks" in sys.modules:
            sys.modules["distill.ranks"].leave()
        raise


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGINT and SIGTERM unwind the stack, so that locks and temporary files go."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _StoppedError(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(error: BaseException, code: int) -> None:
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    sys.exit(code)


def _load(recipe: str, overrides: list[str] | None, **parts: str) -> Recipe:
    from distill.recipe import load_recipe

    return load_recipe(recipe, overrides or [], parts)


def _run(recipe: Recipe, until: str | None, force: list[str] | None, *, as_json: bool) -> dict[str, Artifact]:
    from distill import pipeline

    done = pipeline.run(recipe, until=until, force=force or [], say=lambda line: typer.echo(line, err=as_json))
    if os.environ.get("RANK", "0") != "0":  # of a launcher's processes, the first one speaks
        raise typer.Exit
    return done


def _finish_run(recipe: Recipe, done: dict[str, Artifact], *, as_json: bool) -> None:
    """Print the table of the report and where it lies."""
    from rich.console import Console

    from distill.report import terminal_table
    from distill.runs import read_json

    folder = done["report"].path
    report = read_json(folder / "report.json")
    if as_json:
        found = {"run": str(folder.parent), "report": str(folder / "report.json"), "models": report["models"]}
        typer.echo(json.dumps(found))
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(terminal_table(report))
    console.print(report["headline"]["title"], highlight=False)
    for name, found in report["not_run"].items():
        typer.echo(f"{name}: {found['why']}")
    typer.echo(f"report: {folder / 'report.html'} (also report.md, report.json)")


def _print_plan(recipe: Recipe, force: list[str], *, as_json: bool) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a plan downloads nothing
    from distill import estimate, pipeline, taps

    pipeline.check(recipe)
    taps.check_taps(recipe, pipeline.ENCODERS)
    stages: list[Mapping[str, str]] = [
        {"stage": item.stage.name, "state": item.state, "about": item.about}
        for item in pipeline.plan(recipe, force=force)
    ]
    cost = estimate.estimate(recipe, pipeline.ENCODERS)
    if as_json:
        typer.echo(json.dumps({"run": str(pipeline.run_folder(recipe)), "stages": stages, **cost}))
        return
    typer.echo(f"run folder: {pipeline.run_folder(recipe)}")
    for stage in stages:
        typer.echo(f"  {stage['stage']:<10} {stage['state']:<11} {stage['about']}")
    for line in estimate.render(cost):
        typer.echo(line)


if __name__ == "__main__":
    main()
