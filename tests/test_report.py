"""The report of synthetic predictions: contract of report.json, rendering, escaping, and reports that lack parts."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import metrics
from distill.contracts import IGNORE, UserError
from distill.report import (
    ModelEntry,
    ReportContext,
    build_report,
    compare_runs,
    comparison_table,
    formats,
    render_comparison,
    render_html,
    render_markdown,
    terminal_table,
    write_report,
)
from distill.report.build import finite
from distill.report.compare import t_interval, t_quantile
from distill.report.context import shipped
from distill.report.figures import learning_curves
from distill.report.svg import Scale, node, slots, spread
from distill.targets import tasks_from_json

NUM_ROWS, NUM_GROUPS = 300, 60
HOSTILE = "<script>alert(1)</script> | \"quoted\" & 'more' ![x](http://example.org/x.png)"
PNG = b"\x89PNG\r\n\x1a\n not really"
SKILL = {"teacher": 4.0, "baseline": 1.5, "student": 3.0, "pruned": 2.8}


def entry(name: str, tasks: dict[str, list[str]], targets: dict[str, Any], **changes: Any) -> ModelEntry:
    rng = np.random.default_rng(sum(map(ord, name)))
    logits = {}
    for task, classes in tasks.items():
        values = rng.normal(size=(NUM_ROWS, len(classes)))
        known = targets[task] != IGNORE
        values[np.flatnonzero(known), targets[task][known]] += SKILL.get(name, 2.7)
        logits[task] = values.astype(np.float32)
    measured = {
        "stage": "train",
        "runtime": "pytorch",
        "subsets": {"image": logits, "text": {task: -values for task, values in logits.items()}},
        "num_params": 10_000_000,
        "flops": 400_000_000,
        "size_bytes": 40_000_000,
        "latency_ms": {"p50": 9.3, "p95": 11.0},
        "latency_note": "pytorch, batch 1, one thread",
        "peak_memory_bytes": 300_000_000,
        "seeds": [0],
    }
    return ModelEntry(name=name, logits=logits, **measured | changes)


def context(seed: int = 0, names: tuple[str, ...] = tuple(SKILL), **changes: Any) -> ReportContext:
    rng = np.random.default_rng(seed)
    tasks = {"category": [f"class {c}" for c in range(8)] + [HOSTILE], "subcategory": [f"sub-{c}" for c in range(30)]}
    groups = np.arange(NUM_ROWS) % NUM_GROUPS
    targets = {task: rng.integers(len(classes), size=NUM_GROUPS)[groups] for task, classes in tasks.items()}
    targets["subcategory"][:10] = IGNORE
    models = [entry(name, tasks, targets) for name in names]
    if "pruned" in names:
        noise = np.random.default_rng(5)
        exact = {t: v + np.float32(1e-5) for t, v in models[-1].logits.items()}
        rough = {t: (v + noise.normal(size=v.shape)).astype(np.float32) for t, v in models[-1].logits.items()}
        onnx = {"runtime": "onnxruntime", "source": "pruned", "latency_note": "onnxruntime, batch 1, one thread"}
        models.append(replace(models[-1], name="onnx-fp32", stage="export", logits=exact, **onnx))
        models.append(
            replace(models[-1], name="onnx-int8", stage="quantize", logits=rough, size_bytes=2_000_000, **onnx)
        )
    epochs = [{"epoch": e, "train_loss": 3 / (e + 1), "valid/category_accuracy": 1 - 1 / (e + 2)} for e in range(5)]
    filled = {
        "name": "sample",
        "recipe": {"name": "sample", "seed": seed, "student": {"train": {"lr": 0.001}}},
        "created": "2026-01-31T10:20:30+00:00",
        "data": {"fingerprint": "abc", "rows": {"test": NUM_ROWS}},
        "seeds": [seed],
        "versions": {"python": "3.11"},
        "curves": {"teacher": epochs, "student": epochs[:3]},
        "costs": {"teacher": {"seconds": 75.0, "cpu_seconds": 150.0}},
        "cache": {"bytes": 1_000_000, "seconds": 3.0},
        "parity": {"onnx-int8": {"agreement": {"category": 0.99}, "passed": True}},
        "examples": lambda row: {"image_png": PNG, "text": HOSTILE},
        "resamples": 200,
    }
    rows = {
        "tasks": tasks_from_json(tasks),
        "targets": targets,
        "groups": groups,
        "ids": np.arange(NUM_ROWS) + 7,
        "models": models,
    }
    return ReportContext(**rows | filled | changes)


def test_layers_of_int8_are_summarised():
    layers = [
        {"node": f"layer|{n}/Conv", "operator": "Conv", "min": -1.5, "max": 2.5, "clipped": 0.012, "sqnr_db": 50.0 - n}
        for n in range(7)
    ]
    scan = [
        {"node": "layer|6/Conv", "operator": "Conv", "sqnr_db": 12.5},
        {"node": "b", "operator": "Gemm", "sqnr_db": 33},
    ]
    search = {"kept": ["layer|6/Conv"], "scan": scan, "tried": [{"num_float": 0, "agreement": 0.9}]}
    report = build_report(context(quantized={"onnx-int8": {"layers": layers, "search": search}}))
    found = report["quantized"]["onnx-int8"]
    assert found["num_layers"] == 7 and found["search"]["kept"] == ["layer|6/Conv"]
    assert [layer["node"] for layer in found["worst_layers"]] == [f"layer|{n}/Conv" for n in (6, 5, 4, 3, 2)]
    written = render_markdown(report)
    assert r"| layer\|6/Conv | -1.50 | 2.50 | 1.2 % | 44.0 dB |".replace(" %", "\u00a0%") in written
    assert "onnx-int8 keeps 1 of 2 layers in float" in written and r"| layer\|6/Conv | 12.5 dB | yes |" in written
    page = render_html(report)
    assert "Layers kept in float, onnx-int8" in page and "12.5 dB" in page
    assert "int8 changes most" not in render_markdown(build_report(context()))


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return build_report(context())


class Checker(HTMLParser):
    """Collects what a page would load, and whether its elements are closed in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_html(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert "script" not in checker.tags
    assert all(load.startswith(("#", "data:image/png;base64,")) for load in checker.loads)
    assert not re.search(r"url\(|@import", page)
    assert len(re.findall(r"<svg", page)) == len(re.findall(r"</svg>", page))
    return checker


def render_all(report: dict[str, Any]) -> None:
    json.dumps(report, allow_nan=False)
    check_html(render_html(report))
    assert render_markdown(report).startswith("# ")
    terminal_table(report)


def test_contract_of_report_json(full):
    assert {"schema_version", "data", "models", "comparisons"} <= full.keys()
    assert [m["name"] for m in full["models"]] == [*SKILL, "onnx-fp32", "onnx-int8"]
    for model in full["models"]:
        assert {"name", "stage", "runtime", "num_params", "flops", "size_bytes", "peak_memory_bytes"} <= model.keys()
        assert model["latency_ms"].keys() == {"p50", "p95"}
        assert model["seeds"] == [0]
        assert set(model["subsets"]) == {"image", "text"}
        for quality in model["quality"].values():
            low, high = quality["ci95"]
            assert low <= quality["accuracy"] <= high
            assert quality["correct"] / quality["n"] == pytest.approx(quality["accuracy"])
            assert {"macro_f1", "ece", "agreement_with_teacher", "kl_to_teacher", "retention"} <= quality.keys()
    json.dumps(full, allow_nan=False)


def test_contributions_divide_what_all_modalities_add(full):
    source = context()
    for model, task in ((model, task) for model in full["models"] for task in full["tasks"]):
        found, quality = model["contributions"][task], model["quality"][task]
        counts = np.bincount(source.targets[task][source.targets[task] != IGNORE])
        nothing = counts.max() / counts.sum()
        assert full["tasks"][task]["most_frequent"] == pytest.approx(nothing)
        image, text = (model["subsets"][name][task]["accuracy"] for name in ("image", "text"))
        expected = ((image - nothing) + (quality["accuracy"] - text)) / 2
        assert found["image"]["value"] == pytest.approx(expected)
        assert sum(share["value"] for share in found.values()) == pytest.approx(quality["accuracy"] - nothing)
        for share in found.values():
            low, high = share["ci95"]
            assert low <= share["value"] <= high and low < high


def test_contributions_are_shown_where_all_subsets_were_measured():
    source = context(names=("teacher", "student"))
    teacher, student = source.models
    logits = student.logits
    three = dict.fromkeys(("image", "text", "audio", "image+text", "image+audio"), logits)
    some = replace(source, models=[replace(teacher, subsets=three), student])
    report = build_report(some)
    assert [list(model["contributions"]) for model in report["models"]] == [[], ["category", "subcategory"]]
    text = render_markdown(report).split("## What each modality contributes")[1].split("## ")[0]
    assert "| student | category |" in text and "| teacher |" not in text and "| audio |" not in text
    assert "What each modality contributes" in render_html(report)
    whole = replace(
        source, models=[replace(teacher, subsets=three | {"text+audio": logits}), replace(student, subsets={})]
    )
    report = build_report(whole)
    assert [list(model["contributions"]) for model in report["models"]] == [["category", "subcategory"], []]
    assert "| audio |" in render_markdown(report).split("## What each modality contributes")[1].split("## ")[0]
    render_all(report)
    none = build_report(replace(source, models=[replace(model, subsets={}) for model in source.models]))
    assert "What each modality contributes" not in render_markdown(none) + render_html(none)


def test_quality_is_that_of_the_metrics(full):
    source = context()
    student, teacher, targets = source.model("student"), source.model("teacher"), source.targets["subcategory"]
    known = targets != IGNORE
    quality = full["models"][2]["quality"]["subcategory"]
    ours, theirs = student.logits["subcategory"], teacher.logits["subcategory"]
    right = (ours.argmax(1) == targets)[known]
    assert quality["n"] == known.sum() == NUM_ROWS - 10
    assert quality["accuracy"] == metrics.accuracy(ours, targets)
    assert quality["ci95"] == pytest.approx(metrics.cluster_bootstrap(right, source.groups[known], 200))
    assert quality["agreement_with_teacher"] == metrics.agreement(ours[known], theirs[known])
    assert quality["retention"] == pytest.approx(quality["accuracy"] / metrics.accuracy(theirs, targets))


def test_comparisons(full):
    found = {(c["model"], c["reference"], c["task"]): c for c in full["comparisons"]}
    assert len(found) == len(full["comparisons"])
    others = ["baseline", "student", "pruned", "onnx-fp32", "onnx-int8"]
    expected = {("student", "baseline"), ("pruned", "student"), ("onnx-fp32", "pruned"), ("onnx-int8", "pruned")}
    expected |= {(name, "teacher") for name in others}
    assert {key[:2] for key in found} == expected
    gain = found["student", "baseline", "category"]
    assert gain["difference"] > 0.1
    assert gain["ci95"][0] > 0
    assert gain["p_value"] < 0.05
    exact, rough = found["onnx-fp32", "pruned", "category"], found["onnx-int8", "pruned", "category"]
    assert exact["max_abs_logit_difference"] == pytest.approx(1e-5, rel=0.1)
    assert (exact["agreement"], exact["difference"], exact["p_value"]) == (1.0, 0.0, 1.0)
    assert rough["agreement"] < 1
    assert "max_abs_logit_difference" not in gain


def test_paired_comparison_is_that_of_the_metrics(full):
    source = context()
    a, b = (source.model(n).logits["category"].argmax(1) == source.targets["category"] for n in ("student", "baseline"))
    expected = metrics.paired_cluster_bootstrap(a, b, source.groups, 200)
    found = next(c for c in full["comparisons"] if (c["model"], c["task"]) == ("student", "category"))
    assert found["difference"] == pytest.approx(expected.difference)
    assert found["ci95"] == pytest.approx(expected.ci95)
    assert found["only_model_right"] - found["only_reference_right"] == round(expected.difference * NUM_ROWS)


def test_regressions_are_lost_rows_of_different_groups(full):
    source = context()
    position = {row: index for index, row in enumerate(source.ids.tolist())}
    assert full["shipped"] == "onnx-int8"
    assert 0 < len(full["regressions"]) <= 8
    groups = []
    for example in full["regressions"]:
        row, task = position[example["id"]], example["task"]
        target = source.targets[task][row]
        assert source.model("teacher").logits[task][row].argmax() == target
        assert source.model("onnx-int8").logits[task][row].argmax() != target
        assert example["target"] == source.tasks[task].names[target] == example["teacher"]["class"]
        groups.append(source.groups[row])
    assert len(set(groups)) == len(groups)


def test_class_details_add_up(full):
    source = context()
    change = full["class_differences"]["category"]["classes"]
    model, teacher = full["models"][-1]["quality"]["category"], full["models"][0]["quality"]["category"]
    assert sum(c["n"] for c in change) == NUM_ROWS
    assert sum(c["change"] for c in change) == model["correct"] - teacher["correct"]
    matrix = np.array(full["confusions"]["category"]["matrix"])
    assert np.trace(matrix) == model["correct"]
    assert full["confusions"]["subcategory"]["matrix"] is None
    pair = full["confusions"]["category"]["pairs"][0]
    assert pair["count"] == (matrix - np.diag(np.diag(matrix))).max()
    assert source.tasks["category"].names.index(pair["target"]) != source.tasks["category"].names.index(
        pair["predicted"]
    )


def test_headline_says_what_the_numbers_say(full):
    kept = formats.percent(full["models"][2]["quality"]["category"]["retention"])
    assert f"keeps {kept} of the teacher's category accuracy" in full["headline"]["title"]
    assert "the onnx-int8 bundle" in full["headline"]["title"]
    assert "20× smaller" in full["headline"]["title"]
    assert full["headline"]["findings"][0].startswith("The teacher helps")
    assert any("different runtimes" in finding for finding in full["headline"]["findings"])


def test_headline_admits_that_distillation_did_nothing():
    source = context(names=("teacher", "student"))
    same = replace(source.model("student"), name="baseline")
    report = build_report(replace(source, models=[*source.models, same]))
    assert report["headline"]["findings"][0].startswith("The teacher makes no clear difference")


def test_html_is_one_file_and_escaped(full):
    page = render_html(full)
    checker = check_html(page)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert checker.tags.count("img") == len(full["regressions"])
    assert len(page) < 400_000
    for heading in ("Models", "How sure is it?", "What got worse", "Provenance", "How to read this"):
        assert f"<h2>{heading}</h2>" in page
    assert all(title for title in re.findall(r"<svg[^>]*role=\"img\"[^>]*><title>(.*?)</title>", page))
    assert page.count('role="img"') >= 15


def test_markdown_tables_are_whole(full):
    written = render_markdown(full)
    assert "<script>" not in written
    assert "![x](" not in written
    width = 0
    for line in written.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line))
        width = 0 if not line.startswith("|") else width or cells
        assert not line.startswith("|") or cells == width, line


def test_write_report(tmp_path):
    report = write_report(context(), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


@pytest.mark.parametrize(
    "names", [(), ("teacher",), ("student",), ("student", "baseline"), ("teacher", "pruned"), ("teacher", "my-model")]
)
def test_models_may_be_missing(names):
    report = build_report(context(names=names))
    render_all(report)
    assert len(report["models"]) == len(names) + 2 * ("pruned" in names)


def test_everything_optional_may_be_missing():
    bare = {name: {} for name in ("data", "versions", "curves", "costs", "cache", "parity", "recipe")}
    source = context(examples=None, seeds=(), **bare)
    unknown = {"num_params": None, "flops": None, "size_bytes": None, "latency_ms": None, "peak_memory_bytes": None}
    models = [replace(m, subsets={}, seeds=(), latency_note="", **unknown) for m in source.models]
    report = build_report(replace(source, models=models))
    render_all(report)
    assert report["models"][0]["latency_ms"] == {"p50": None, "p95": None}
    assert report["regressions"][0]["image"] is None


def test_task_without_labels_and_model_without_task():
    source = context()
    targets = source.targets | {"subcategory": np.full(NUM_ROWS, IGNORE)}
    student = replace(source.model("student"), logits={"subcategory": source.model("student").logits["subcategory"]})
    models = [student if m.name == "student" else m for m in source.models]
    report = build_report(replace(source, targets=targets, models=models))
    render_all(report)
    assert "category" not in report["models"][2]["quality"]
    assert report["models"][0]["quality"]["subcategory"]["accuracy"] is None
    assert report["models"][0]["quality"]["subcategory"]["ci95"] is None


def test_perfect_models_do_not_break_the_figures():
    source = context()
    sure = {
        t: np.eye(len(c.names), dtype=np.float32)[np.maximum(source.targets[t], 0)] * 50
        for t, c in source.tasks.items()
    }
    report = build_report(replace(source, models=[replace(m, logits=sure) for m in source.models]))
    render_all(report)
    assert report["regressions"] == []
    assert report["comparisons"][0]["p_value"] == 1.0


def test_context_refuses_what_does_not_fit():
    source = context()
    with pytest.raises(ValueError, match="unique"):
        replace(source, models=[source.models[0], source.models[0]])
    with pytest.raises(ValueError, match="groups has 5 rows, expected 300"):
        replace(source, groups=source.groups[:5])
    short = replace(source.models[0], logits={"category": np.zeros((NUM_ROWS, 2), np.float32)})
    with pytest.raises(ValueError, match=r"teacher for 'category' have shape \(300, 2\), expected \(300, 9\)"):
        replace(source, models=[short])
    with pytest.raises(ValueError, match="text alone"):
        replace(source, models=[replace(source.models[0], subsets={"text": short.logits})])


def test_shipped_is_the_smallest_bundle():
    models = context().models
    assert shipped(models).name == "onnx-int8"
    assert shipped(models[:4]).name == "student"
    assert shipped(models[:1]) is None
    assert shipped([replace(models[0], name="teacher-onnx", source="teacher"), models[1]]).name == "baseline"


def test_terminal_table(full, capsys):
    console = pytest.importorskip("rich.console").Console(width=120)
    console.print(terminal_table(full))
    printed = capsys.readouterr().out
    assert "onnx-int8" in printed
    assert "2.00" in printed


def test_finite_leaves_plain_json():
    value = {1: np.float32("nan"), "b": (np.int64(3), math.inf), "c": np.eye(2), "d": {"e": None}, "f": Path("x")}
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == {
        "1": None,
        "b": [3, None],
        "c": [[1.0, 0.0], [0.0, 1.0]],
        "d": {"e": None},
        "f": "x",
    }


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.percent(0.97149), "97.1 %"),
        (formats.percent(None), "–"),
        (formats.points(0.0234), "+2.3"),
        (formats.points(-0.0004), "0.0"),
        (formats.points(-0.004), "−0.4"),
        (formats.size(1_630_000), "1.63 MB"),
        (formats.size(352_000), "352 kB"),
        (formats.size(999_900), "1.00 MB"),
        (formats.size(12), "12 B"),
        (formats.count(812_345), "812 k"),
        (formats.milliseconds(0.8421), "0.842 ms"),
        (formats.milliseconds(12.34), "12.3 ms"),
        (formats.milliseconds(1234.0), "1,230 ms"),
        (formats.significant(0.0), "0"),
        (formats.significant(9.999), "10.0"),
        (formats.significant(4.7e-5), "4.7×10⁻⁵"),
        (formats.significant(-0.5), "-0.500"),
        (formats.trimmed("10.0\u00a0MB"), "10 MB"),
        (formats.trimmed("100"), "100"),
        (formats.seconds(0.84), "0.84 s"),
        (formats.seconds(725.0), "12 min 5 s"),
        (formats.seconds(11_520.0), "3 h 12 min"),
        (formats.p_value(0.0004), "< 0.001"),
        (formats.half_width([0.9, 0.93]), "±1.5"),
        (formats.known("agreement", {"category": 0.5}), "category 50.0 %"),
        (formats.known("cache_bytes", 2000), "2.00 kB"),
        (formats.known("passed", True), "yes"),
        (formats.label("size_bytes"), "size"),
        (formats.moment("yesterday"), "yesterday"),
        (formats.times(41.2), "41×"),
    ],
)
def test_formats(written, expected):
    assert written.replace("\u00a0", " ") == expected


def test_curves_are_drawn_by_step_where_each_entry_has_one(full):
    epochs = [{"epoch": e + 1, "step": 10 * (e + 1), "train_loss": 1 / (e + 1)} for e in range(70)]
    steps = [{"epoch": e + 1, "step": 100 * (e + 1), "train_loss": 2 / (e + 1)} for e in range(7)]
    page = str(learning_curves(full | {"curves": {"baseline": epochs, "student": steps}}, None))
    ends = re.findall(r'points="[^"]* ([0-9.]+),[0-9.]+" class="s[0-9] curve"', page)
    assert len(ends) == 2 and ends[0] == ends[1] and "by step" in page and ">step<" in page
    for entry in steps:
        del entry["step"]
    assert ">epoch<" in str(learning_curves(full | {"curves": {"baseline": epochs, "student": steps}}, None))


def test_svg_parts():
    assert node("a", "<&>", class_='x"y') == '<a class="x&#34;y">&lt;&amp;&gt;</a>'
    assert Scale(1, 100, 0, 200, log=True)(10) == pytest.approx(100)
    assert Scale(0.0, 1.0, 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(1, 1000, 0, 1, log=True).ticks() == [1, 10, 100, 1000]
    placed = spread([50.0, 51.0, 52.0, 99.0], 10, 0, 100)
    assert min(np.diff(placed)) >= 10
    assert max(placed) <= 100
    used = slots(["teacher", "mine", "student", "other"])
    assert len(set(used.values())) == 4


def runs() -> tuple[list[dict[str, Any]], list[str]]:
    reports, names = [], []
    for rate in (0.001, 0.01):
        for seed in range(3):
            name = f"kd-lr{rate}-s{seed}"
            recipe = {"name": name, "seed": seed, "student": {"train": {"lr": rate}}}
            reports.append(build_report(context(seed, name=name, recipe=recipe)))
            names.append(name)
    return reports, names


def test_compare_runs():
    reports, names = runs()
    reports[3]["models"][2]["quality"]["category"]["accuracy"] += 0.1
    result = compare_runs(reports, names)
    json.dumps(result, allow_nan=False)
    assert [run["group"] for run in result["runs"]] == ["kd-lr0.001"] * 3 + ["kd-lr0.01"] * 3
    row = next(a for a in result["accuracy"] if (a["model"], a["task"]) == ("student", "category"))
    values = [report["models"][2]["quality"]["category"]["accuracy"] for report in reports[:3]]
    assert row["mean"] == pytest.approx(np.mean(values))
    assert row["runs"] == 3
    assert list(row["values"].values()) == values
    gap = next(d for d in result["differences"] if (d["model"], d["task"]) == ("student", "category"))
    assert (gap["pairs"], gap["reference"]) == (3, "kd-lr0.001")
    assert gap["difference"] == pytest.approx(0.1 / 3)
    assert {s["key"] for s in result["settings"]} == {"name", "seed", "student.train.lr"}
    assert result["warnings"] == []
    assert "student.train.lr | 0.001 |" in render_comparison(result)
    assert comparison_table(result).row_count == len(result["accuracy"])


def test_compare_shows_recalls():
    reports, names = runs()
    for seed, report in enumerate(reports):
        found = {f"recall@{k}": {"value": k / 20 + seed / 100} for k in (1, 5, 10)}
        report["retrieval"] = {"image_to_text": {"models": {"student": found}}}
    result = compare_runs(reports, names)
    recalls = [entry for entry in result["accuracy"] if "recall" in entry["task"]]
    assert [(entry["model"], entry["task"]) for entry in recalls] == [
        ("student", f"image_to_text recall@{k}") for k in (1, 5, 10)
    ] * 2
    assert recalls[1]["mean"] == pytest.approx(0.26)
    (gap,) = (entry for entry in result["differences"] if entry["task"] == "image_to_text recall@1")
    assert gap["difference"] == pytest.approx(0.03)


def test_compare_takes_a_key_that_an_earlier_report_lacks_as_unset():
    reports, names = runs()
    expected = compare_runs(reports, names)["accuracy"]
    for report in reports[1:]:
        report["recipe"] = {**report["recipe"], "prune": {**report["recipe"].get("prune", {}), "vocabulary": None}}
    assert compare_runs(reports, names)["accuracy"] == expected


def test_compare_warns_of_other_data_and_repeated_seeds():
    reports, names = runs()
    reports[1]["data"]["fingerprint"] = "other"
    reports[2]["seeds"] = [0]
    warnings = compare_runs(reports, names)["warnings"]
    assert len(warnings) == 2
    assert f"{names[2]} repeats recipe and seed of {names[0]}" in warnings[1]


def test_compare_asks_whether_the_test_rows_are_the_same():
    reports, names = runs()
    for seed, report in enumerate(reports):  # as where the seed chooses which training rows are labelled
        report["data"] |= {"fingerprint": str(seed), "test_fingerprint": "same"}
    assert compare_runs(reports, names)["warnings"] == []
    reports[4]["data"]["test_fingerprint"] = "other"
    (warning,) = compare_runs(reports, names)["warnings"]
    assert "do not share their test rows" in warning
    del reports[4]["data"]["test_fingerprint"]  # written by an earlier version
    (warning,) = compare_runs(reports, names)["warnings"]
    assert "do not share one data fingerprint" in warning


def test_compare_one_run_and_wrong_names():
    reports, _ = runs()
    single = compare_runs(reports[:1], ["only"])
    assert single["accuracy"][0]["ci95"] is None
    assert single["differences"] == []
    render_comparison(single)
    with pytest.raises(UserError, match="one unique name"):
        compare_runs(reports[:2], ["same", "same"])
    with pytest.raises(UserError):
        compare_runs([], [])


def test_t_interval():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 5, 10, 11, 20, 100, 10_000):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=2e-3)
    assert t_interval([0.5]) is None
    values = [0.80, 0.82, 0.87]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(expected, abs=1e-4)
