"""``distill verify``: a bundle's files, and whether it says here what its source said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder, e.g. runs/NAME/quantize/coreml-fp16.")],
    provider: Annotated[str, typer.Option(help="Of ONNX bundles: cpu, cuda or tensorrt.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")] = False,
) -> None:
    """Check a bundle's files, load it, and compare it with its source on the rows that it brings; needs no torch."""
    from distill.verification import verify_answers

    found = verify_answers(bundle, provider=provider)
    if as_json:
        typer.echo(json.dumps(found))
        return
    where = f"{found['bundle']} on {found['runtime']} ({found['device']})"
    if not found["rows"]:
        typer.echo(f"{where}: files and model are whole; it brings no rows to compare, as it was compared when written")
        return
    typer.echo(f"{where} says what its source said of {found['rows']} rows:")
    for name, entry in found["outputs"].items():
        typer.echo(
            f"  {name}: same answer on {entry['agreement']:.0%}, largest difference {entry['max_difference']:.3g} "
            f"({entry['relative']:.1g} of the largest number)"
        )
