"""The finding in words: one sentence, what supports it, and the key figures of the model that ships."""

from __future__ import annotations

from typing import Any

from distill.report import formats
from distill.report.context import BASELINE, STUDENT, TEACHER
from distill.report.figures import measure_of, titled
from distill.retrieval import ZERO_SHOT

Model = dict[str, Any]

LEVEL = f"95{formats.SPACE}%"


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"title": str, "findings": [str], "figures": [{"label", "value", "detail"}]}`` of a report."""
    models = {model["name"]: model for model in report["models"]}
    tasks = list(report["tasks"])
    main = models.get(STUDENT) or models.get(report["shipped"] or "")
    title = f"{report['name']}: quality, size and speed of {len(models)} model{'s' * (len(models) != 1)}"
    if main and TEACHER in models and (tasks or report["retrieval"]):
        title = "; ".join(_title_parts(report, models, main, models[report["shipped"]])) or title
    return {"title": title, "findings": _findings(report, models, tasks), "figures": _figures(report, models, tasks)}


def ratio(model: Model, reference: Model | None, *path: str) -> float | None:
    """Return reference / model of a number of both, or None where one is unknown."""
    ours, theirs = _number(model, path), _number(reference, path)
    return theirs / ours if ours and theirs else None


def _number(model: Model | None, path: tuple[str, ...]) -> float | None:
    value: Any = model
    for step in path:
        value = value.get(step) if value else None
    return value


def kept_of_teacher(report: dict[str, Any], model: Model) -> tuple[float | None, str]:
    """Return what a model keeps of the teacher's quality, and what that is: of the first task, or else retrieval."""
    tasks = list(report["tasks"])
    if any(not task.endswith(ZERO_SHOT) for task in tasks):
        return _number(model, ("quality", tasks[0], "retention")), f"{tasks[0]} {measure_of(report, tasks[0])}"
    found = [each["models"].get(model["name"], {}).get("retention") for each in report["retrieval"].values()]
    return (None if None in found or not found else sum(found) / len(found)), "recall@1, the mean of both directions"


def _title_parts(report: dict[str, Any], models: dict[str, Model], main: Model, ships: Model) -> list[str]:
    teacher, parts = models[TEACHER], []
    kept, what = kept_of_teacher(report, main)
    fewer = ratio(main, teacher, "num_params")
    if kept is not None:
        smaller = f" with 1/{fewer:.0f} of the parameters" if fewer and fewer >= 1.5 else ""
        subject = "A student" if main["name"] == STUDENT else f"The {main['name']} model"
        verb = "keeps" if kept <= 1 else "reaches"
        parts.append(f"{subject}{smaller} {verb} {formats.percent(kept)} of the teacher's {what}")
    gains = [_gain(ratio(ships, teacher, "size_bytes"), "smaller", "larger")]
    gains.append(_gain(ratio(ships, teacher, "latency_ms", "p50"), "faster", "slower"))
    gained = " and ".join(gain for gain in gains if gain)
    said = [f"is {gained}"] if gained else []
    if ships is not main and (bundle := kept_of_teacher(report, ships)[0]) is not None:
        said.insert(0, f"keeps {formats.percent(bundle)}")
    if said:
        kind = "bundle" if ships["source"] else "model"
        subject = "it" if ships is main and parts else f"the {ships['name']} {kind}"
        parts.append(f"{subject} {' and '.join(said)}")
    return parts


def _gain(factor: float | None, better: str, worse: str) -> str:
    if factor is None:
        return ""
    return f"{formats.times(factor)} {better}" if factor >= 1 else f"{formats.times(1 / factor)} {worse}"


def compare(report: dict[str, Any], model: str, reference: str, task: str) -> dict[str, Any] | None:
    """Return the comparison of two models on a task, or None."""
    wanted = (model, reference, task)
    return next((c for c in report["comparisons"] if (c["model"], c["reference"], c["task"]) == wanted), None)


def found_better(report: dict[str, Any], model: str, reference: str) -> list[dict[str, Any]]:
    """Return the comparisons of two models' recall@1 in both directions, each with what it is about as its ``task``."""
    return [
        {**c, "task": f"recall@1, {direction.replace('_', ' ')}"}
        for direction, each in report["retrieval"].items()
        for c in each["comparisons"]
        if (c["model"], c["reference"]) == (model, reference)
    ]


def is_clear(comparison: dict[str, Any]) -> bool:
    """Return whether the interval of a difference leaves out zero."""
    interval = comparison["ci95"]
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def _findings(report: dict[str, Any], models: dict[str, Model], tasks: list[str]) -> list[str]:
    found = [_distillation(report, tasks), _export(report, models, tasks), _runtimes(report, models)]
    return [sentence for sentence in found if sentence]


def _distillation(report: dict[str, Any], tasks: list[str]) -> str:
    results = [c for task in tasks if (c := compare(report, STUDENT, BASELINE, task))]
    results += found_better(report, STUDENT, BASELINE)
    if not results or any(c["difference"] is None for c in results):
        return ""
    said = ", ".join(
        f"{formats.points(c['difference'])} points on {c['task']} ({LEVEL} interval {formats.points_range(c['ci95'])})"
        for c in results
    )
    clear = [is_clear(c) and c["difference"] > 0 for c in results]
    verdict = (
        "The teacher helps"
        if all(clear)
        else "The teacher helps in part"
        if any(clear)
        else ("The teacher hurts" if any(is_clear(c) for c in results) else "The teacher makes no clear difference")
    )
    return f"{verdict}: against the same student trained without a teacher, {said}."


def _export(report: dict[str, Any], models: dict[str, Model], tasks: list[str]) -> str:
    ships = models.get(report["shipped"] or "")
    source = ships and ships["source"]
    if not ships or not source:
        return ""
    results = [c for task in tasks if (c := compare(report, ships["name"], source, task))]
    results += found_better(report, ships["name"], source)
    if not results or any(c["difference"] is None for c in results):
        return ""
    said = ", ".join(
        f"{formats.points(c['difference'])} points on {c['task']}"
        + (f" ({formats.percent(c['agreement'])} same answers)" if "agreement" in c else "")
        for c in results
    )
    lost = any(is_clear(c) and c["difference"] < 0 for c in results)
    verdict = "Export costs accuracy" if lost else "Export makes no clear difference to accuracy"
    return f"{verdict}: {ships['name']} against {source}, {said}."


def _runtimes(report: dict[str, Any], models: dict[str, Model]) -> str:
    teacher, ships = models.get(TEACHER), models.get(report["shipped"] or "")
    if not teacher or not ships or ratio(ships, teacher, "latency_ms", "p50") is None:
        return ""
    ours, theirs = (model["latency_note"] or model["runtime"] for model in (ships, teacher))
    if ours == theirs:
        return f"Latencies: {ours}."
    return f"Latencies were measured on different runtimes: {ships['name']} with {ours}, the teacher with {theirs}."


def _figures(report: dict[str, Any], models: dict[str, Model], tasks: list[str]) -> list[dict[str, str]]:
    ships, teacher = models.get(report["shipped"] or ""), models.get(TEACHER)
    if not ships:
        return []
    figures = [_task_figure(report, ships, task) for task in tasks[:2] if task in ships["quality"]]
    figures += [
        _recall_figure(direction, each["models"][ships["name"]])
        for direction, each in report["retrieval"].items()
        if ships["name"] in each["models"]
    ]
    for what, path, write, better, worse in (
        ("Size", ("size_bytes",), formats.size, "smaller", "larger"),
        ("Latency, median", ("latency_ms", "p50"), formats.milliseconds, "faster", "slower"),
        ("Parameters", ("num_params",), formats.count, "fewer", "more"),
    ):
        value = _number(ships, path)
        if value is not None:
            gain = _gain(ratio(ships, teacher, *path), better, worse)
            detail = f"{gain} than the teacher ({write(_number(teacher, path))})" if gain else ""
            figures.append({"label": what, "value": write(value), "detail": detail})
    gains = [compare(report, STUDENT, BASELINE, task) for task in tasks] + found_better(report, STUDENT, BASELINE)
    distilled = next(filter(None, gains), None)
    if distilled:
        interval = formats.points_range(distilled["ci95"])
        detail = f"points on {distilled['task']}, student against baseline; {LEVEL}: {interval}"
        gained = formats.points(distilled["difference"])
        figures.append({"label": "Gain from the teacher", "value": gained, "detail": detail})
    return figures


def _recall_figure(direction: str, found: dict[str, Any]) -> dict[str, str]:
    recall, kept = found["recall@1"], found["retention"]
    detail = f"{LEVEL}: {formats.percent_range(recall['ci95'])}"
    if kept is not None:
        detail += f"; {formats.percent(kept)} of the teacher's"
    label = f"Recall@1, {direction.replace('_', ' ')}"
    return {"label": label, "value": formats.percent(recall["value"]), "detail": detail}


def _task_figure(report: dict[str, Any], ships: Model, task: str) -> dict[str, str]:
    quality, measure = ships["quality"][task], report["tasks"][task]["measure"]
    kept = quality["retention"]
    detail = f"{LEVEL}: {formats.percent_range(quality['ci95'])}"
    if kept is not None:
        detail += f"; {formats.percent(kept)} of the teacher's"
    label = f"{titled(measure_of(report, task))}, {task}"
    return {"label": label, "value": formats.percent(quality[measure]), "detail": detail}
