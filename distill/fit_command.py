"""``distill fit``: the best bundle inside a budget of latency and size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from distill.contracts import UserError


def fit(
    recipe: Annotated[str, typer.Argument(help="A recipe: a YAML file, or the name of a packaged one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides such as student.train.epochs=5.")] = None,
    target: Annotated[str, typer.Option("--target", help="The runtime of the bundle.")] = "onnxruntime",
    max_latency_ms: Annotated[float | None, typer.Option(help="Most median latency of one row.")] = None,
    max_size_mb: Annotated[float | None, typer.Option(help="Largest model file; 1 MB is 1,000,000 bytes.")] = None,
    min_retention: Annotated[
        float | None, typer.Option(help="Least share of the teacher's measure on the validation rows, as 0.97.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Time of this call, with the recipe's own run where it is not finished.")
    ] = 20.0,
    trials: Annotated[int | None, typer.Option(help="Most trials, with those of earlier calls.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search; that of trainings is the recipe's.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", help="Folder; by default OUTPUT/NAME-fit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Search the student, pruning and precision that keep most inside a budget; the same call goes on with it."""
    from distill.fit.budget import Budget

    budget = Budget(max_latency_ms, max_size_mb, min_retention)
    budget.check()
    from distill import pipeline
    from distill.fit import fit as search
    from distill.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    run = pipeline.run_folder(loaded)
    folder = output or run.with_name(f"{run.name}-fit")
    if folder.resolve() == run.resolve():
        raise UserError(f"--output: {folder} is the folder of the recipe's own run; choose another one")
    found = search(
        loaded,
        budget,
        folder,
        target=target,
        minutes=minutes,
        most=trials,
        seed=seed,
        quiet=as_json,
        say=lambda line: typer.echo(line, err=as_json),
    )
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo((folder / "fit.md").read_text(encoding="utf-8"), nl=False)
    typer.echo(f"best: {found['recipe']}, bundle {found['bundle']} (also front.svg, fit.json)")
