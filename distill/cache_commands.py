"""``distill cache``: fills the teacher cache of a recipe, tells what a filled one holds, checks its files.

``distill cache RECIPE`` is ``distill cache fill RECIPE``: a first word that is no command is a recipe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

DEFAULT = "fill"
FolderArgument = Annotated[Path, typer.Argument(help="A cache's folder, or that of a run, e.g. runs/NAME.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


class RecipeOrCommand(TyperGroup):
    """A group whose first word may be a recipe: then it is for the default command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command's name in front where no command is named."""
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="cache",
    cls=RecipeOrCommand,
    subcommand_metavar="RECIPE [OVERRIDES]... | COMMAND [ARGS]...",
    help="Fit the teacher and store its outputs (`distill cache RECIPE`); look at a stored cache or check it.",
)


@app.command()
def verify(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Compare every file of a cache with its hash; names each damaged one and exits with 1."""
    from distill import inventory

    found = inventory.verify(folder)
    if as_json:
        typer.echo(json.dumps(found))
    for name, wrong in {} if as_json else found["damaged"].items():
        typer.echo(f"damaged: {Path(found['folder']) / name}: {wrong}")
    if not found["ok"]:
        count = f"{len(found['damaged'])} of {found['files']} files are damaged"
        typer.echo(
            f"error: {found['folder']}: {count}; `distill cache RECIPE` makes them again, and no others", err=True
        )
        raise typer.Exit(1)
    if not as_json:
        views = ", ".join(map(str, found["views"]))
        typer.echo(f"ok: {found['rows']:,} rows, views {views}, {found['bytes']:,} bytes in {found['files']} files")


@app.command()
def info(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Tell what a cache holds: rows, views, outputs, size, seconds, and what it depends on."""
    from distill import inventory

    found = inventory.describe(folder)
    for line in [json.dumps(found)] if as_json else inventory.render(found):
        typer.echo(line)
