"""Files of ``bench_bundle.py`` in a recipe: what is checked, and what counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import context

from distill.contracts import UserError
from distill.measured import on_devices, read_measured, settings
from distill.report import compare_runs
from distill.report.build import build_report
from distill.report_config import ReportConfig
from distill.runs import sha256_file


def measured_file(digest: str) -> dict[str, Any]:
    """What the script writes of a bundle of this hash."""
    results = [
        {"batch": batch, "threads": 2, "p50_ms": float(batch) / 4, "p95_ms": 3.0, "p99_ms": 4.5, "runs": 100,
         "p50_spread_ms": [1, 2], "rows_per_second": 4000.0}
        for batch in (1, 8)
    ]  # fmt: skip
    machine = {"processor": "Cortex-A76", "machine": "aarch64", "cpus": 4, "system": "Linux 6.6"}
    return {
        "format": "multidistill-measured",
        "version": 1,
        "bundle": "tiny",
        "bundle_sha256": digest,
        "runtime": "onnxruntime 1.31",
        "machine": machine,
        "text_length": 8,
        "size_bytes": 22_000,
        "load_ms": 12.5,
        "peak_memory_bytes": 12_000_000,
        "results": results,
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "quantize" / "onnx-int8"
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text("{}")
    return folder


def config(path: Path, content: Any) -> ReportConfig:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return ReportConfig(measured=[str(path)])


def test_files_count_by_their_content(tmp_path: Path) -> None:
    assert settings(ReportConfig()) == {"bootstrap": 2000, "examples": 8}, "earlier runs stay up to date"
    one = settings(config(tmp_path / "a.json", measured_file("a")))
    assert one == settings(config(tmp_path / "b.json", measured_file("a")))
    assert one != settings(config(tmp_path / "b.json", measured_file("b"))) and one.keys() > {"bootstrap", "measured"}


def test_each_result_is_a_row_of_the_table(tmp_path: Path, bundle: Path) -> None:
    digest = sha256_file(bundle / "bundle.json")
    rows = on_devices(config(tmp_path / "a.json", measured_file(digest)), [tmp_path / "quantize", tmp_path / "export"])
    assert [row["bundle"] for row in rows] == ["onnx-int8", "onnx-int8"]
    assert rows[1] == {
        "bundle": "onnx-int8", "device": "Cortex-A76 (aarch64), Linux 6.6", "runtime": "onnxruntime 1.31", "batch": 8,
        "threads": 2, "p50_ms": 2.0, "p95_ms": 3.0, "p99_ms": 4.5, "rows_per_second": 4000.0, "text_length": 8,
        "size_bytes": 22_000, "load_ms": 12.5, "peak_memory_bytes": None,
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r"a\.json is of another bundle than this run's onnx-int8; measure the run's own"
    ):
        on_devices(config(tmp_path / "a.json", measured_file("0" * 64)), [tmp_path / "quantize"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "is not what bench_bundle.py writes"),
        (lambda c: "[]", "is not what bench_bundle.py writes"),
        (lambda c: c | {"format": "other"}, "is not what bench_bundle.py writes .*it is other of version 1"),
        (lambda c: c | {"version": 2}, "is of version 2, and this multidistill reads 1; update it"),
        (lambda c: c | {"version": "1"}, "is not what"),
        (lambda c: c | {"results": []}, "is damaged .results: "),
        (lambda c: c | {"results": [c["results"][0] | {"p95_ms": "fast"}]}, r"is damaged .results\.0\.p95_ms: "),
        (lambda c: c | {"results": [c["results"][0] | {"p50_ms": float("nan")}]}, r"is damaged .results\.0\.p50_ms: "),
        (lambda c: c | {"peak_memory_bytes": -5}, "is damaged .peak_memory_bytes: "),
        (lambda c: c | {"size_bytes": 10**400}, "is damaged .size_bytes: "),
        (lambda c: c | {"machine": c["machine"] | {"processor": "\ud800"}}, r"is damaged .machine\.processor: "),
        (lambda c: {k: v for k, v in c.items() if k != "machine"}, "is damaged .machine: "),
    ],
)
def test_a_sentence_for_a_file_that_is_none(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"report\.measured: \S+/a\.json {message}"):
        read_measured(config(tmp_path / "a.json", change(measured_file("a"))))


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    missing = ReportConfig(measured=[str(tmp_path / "none.json")])
    for read in (read_measured, settings):
        with pytest.raises(
            UserError, match=r"there is no file \S+none\.json; name one that bench_bundle\.py has written"
        ):
            read(missing)


def test_what_was_measured_makes_no_other_recipe() -> None:
    recipes = (
        {"seed": seed, "report": {"examples": 8, **files}} for seed, files in enumerate(({}, {"measured": ["a.json"]}))
    )
    reports = [build_report(context(seed, recipe=recipe)) for seed, recipe in enumerate(recipes)]
    compared = compare_runs(reports, ["a", "b"])
    assert len({run["group"] for run in compared["runs"]}) == 1
    assert "report.measured" not in {row["key"] for row in compared["settings"]}
