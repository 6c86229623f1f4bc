"""``distill explain``: pictures of why models of a finished run answered as they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from distill.contracts import UserError

RESOLVED = "recipe.resolved.yaml"


def explain(
    recipe: Annotated[str, typer.Argument(help="A recipe, or the folder of a run, e.g. runs/NAME.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as name=mine.")] = None,
    rows: Annotated[str, typer.Option("--rows", help="Ids of test rows: 12,57. By default the worst ones.")] = "",
    task: Annotated[str, typer.Option("--task", help="Which answer; by default that of the first task.")] = "",
    models: Annotated[
        str, typer.Option("--models", help="Of teacher, baseline, student, pruned; by default teacher,student.")
    ] = "",
    output: Annotated[Path | None, typer.Option("--output", help="Folder; by default RUN/explain.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show why models answered test rows as they did: modalities, pixels, words, attention, side by side."""
    ids = [_number(part) for part in _parts(rows)]
    from distill import explaining, pipeline
    from distill.recipe import load_recipe

    folder = Path(recipe)
    of_run = (folder / RESOLVED).is_file()
    place = [f"output={json.dumps(str(folder.resolve().parent))}", f"name={json.dumps(folder.resolve().name)}"]
    loaded = load_recipe(folder / RESOLVED if of_run else recipe, [*(place if of_run else []), *(overrides or [])])
    pipeline.check(loaded, "student")
    done = {item.stage.name: item.artifact for item in pipeline.plan(loaded) if item.artifact is not None}
    called = " ".join([f"{folder / RESOLVED} output={folder.parent}" if of_run else recipe, *(overrides or [])])
    names = explaining.choose_models(_parts(models), done, loaded, called)
    target = output or pipeline.run_folder(loaded) / "explain"
    work = pipeline.workspace(loaded, done)
    work.quiet = as_json
    found = explaining.explain_run(work, names, task=task, rows=ids, folder=target)
    if as_json:
        typer.echo(json.dumps({"path": str(target), **found}))
        return
    for row in found["rows"]:
        said = ", ".join(f"{name} {one['answer']} {one['probability']:.1%}" for name, one in row["models"].items())
        typer.echo(f"row {row['id']} ({row['true'] or 'not labelled'}): {said}")
    typer.echo(f"explained: {target / 'explain.html'} (also explain.json, and pictures as PNG files)")


def _parts(listed: str) -> list[str]:
    return [part.strip() for part in listed.split(",") if part.strip()]


def _number(part: str) -> int:
    try:
        return int(part)
    except ValueError:
        raise UserError(f"--rows: {part!r} is no row id; give whole numbers such as 12,57") from None
