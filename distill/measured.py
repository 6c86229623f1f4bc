"""What ``bench_bundle.py`` measured on devices: its files, checked, and as rows of the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from distill.bench_bundle import FORMAT, VERSION
from distill.config import complaint
from distill.contracts import UserError
from distill.predict import BUNDLE_FILE
from distill.report_config import ReportConfig
from distill.runs import sha256_file

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**63)]


def _writable(text: str) -> str:
    """Half of a surrogate pair is no text that a report could hold."""
    if not text.isprintable():
        raise ValueError("it holds what cannot be printed")
    return text


Text = Annotated[str, AfterValidator(_writable)]


class _Content(BaseModel):
    model_config = ConfigDict(strict=True)


class Result(_Content):
    """One batch size and number of threads."""

    batch: Count
    threads: Count
    p50_ms: Positive
    p95_ms: Positive
    p99_ms: Positive
    rows_per_second: Positive


class Machine(_Content):
    """The device."""

    processor: Text
    machine: Text
    system: Text


class Measured(_Content):
    """One bundle on one device."""

    bundle_sha256: str
    runtime: Text
    machine: Machine
    text_length: Count
    size_bytes: Count
    load_ms: Positive
    peak_memory_bytes: Annotated[int, Field(ge=0, lt=2**63)] | None
    results: Annotated[list[Result], Field(min_length=1)]


def settings(config: ReportConfig) -> dict[str, Any]:
    """The recipe's ``report`` as fingerprints see it: measured files count by their content, and not if there are none.

    Raises:
        UserError: a file is missing.
    """
    tree = config.model_dump(exclude={"measured"})
    return tree | ({"measured": [_digest(Path(name)) for name in config.measured]} if config.measured else {})


def read_measured(config: ReportConfig) -> dict[str, Measured]:
    """Read ``report.measured``: name of the file -> its content.

    Raises:
        UserError: a file is missing, of a newer version, or not what ``bench_bundle.py`` writes.
    """
    return {name: _read(Path(name)) for name in config.measured}


def on_devices(config: ReportConfig, folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of the table "measured on devices", as JSON values.

    Args:
        config: the recipe's ``report``.
        folders: of stages that hold the run's bundles.

    Returns:
        For each result ``bundle``, ``device``, ``runtime``, ``batch``, ``threads``, ``p50_ms``, ``p95_ms``, ``p99_ms``,
        ``rows_per_second``, ``text_length``, ``size_bytes``, ``load_ms`` and ``peak_memory_bytes``, which is of the
        first batch and number of threads alone and None of others.

    Raises:
        UserError: as :func:`read_measured`, or a file is of a bundle that is none of the run's.
    """
    bundles = {sha256_file(file): file.parent.name for folder in folders for file in folder.glob(f"*/{BUNDLE_FILE}")}
    rows = []
    for name, found in read_measured(config).items():
        if found.bundle_sha256 not in bundles:
            raise UserError(
                f"report.measured: {name} is of another bundle than this run's {', '.join(sorted(bundles.values()))}; "
                "measure the run's own again, or leave the file out"
            )
        rows += list(_rows(bundles[found.bundle_sha256], found))
    return rows


def _rows(bundle: str, found: Measured) -> Iterator[dict[str, Any]]:
    machine = found.machine
    named = f"{machine.processor} ({machine.machine})" if machine.processor else machine.machine
    for number, result in enumerate(found.results):
        yield {
            "bundle": bundle,
            "device": f"{named}, {machine.system}",
            "runtime": found.runtime,
            **result.model_dump(),
            **found.model_dump(include={"text_length", "size_bytes", "load_ms"}),
            "peak_memory_bytes": None if number else found.peak_memory_bytes,
        }


def _digest(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"report.measured: there is no file {path}; name one that bench_bundle.py has written")
    return sha256_file(path)


def _read(path: Path) -> Measured:
    _digest(path)
    again = "measure the bundle again with bench_bundle.py --json"
    try:
        content = json.loads(path.read_bytes())
        form, version = content["format"], content["version"]
        if form == FORMAT and type(version) is int and version > VERSION:
            raise UserError(
                f"report.measured: {path} is of version {version}, and this multidistill reads {VERSION}; update it"
            )
        if form != FORMAT or version != VERSION:
            raise ValueError(f"it is {form} of version {version}")
        return Measured.model_validate(content)
    except UserError:
        raise
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"report.measured: {path} is damaged ({where}: {complaint(problem)}); {again}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"report.measured: {path} is not what bench_bundle.py writes ({error!r}); {again}") from error
