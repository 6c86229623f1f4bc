"""Explain answers of a run's models: which rows, which models, and where the page goes.

Nothing is trained here. Frozen towers run anew, since gradients have to pass through them: what a training kept of
their outputs has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.build import input_spec
from distill.config import Recipe, nearest
from distill.contracts import IGNORE, TEST, Artifact, UserError
from distill.explain import SCORE, Explained, Subject, explain_row, write_page
from distill.fitted import VERBS
from distill.formats import TABULAR, TEXT
from distill.multimodal import MultimodalModel
from distill.preprocess import Tokenizer
from distill.progress import progress
from distill.runs import read_json
from distill.targets import CLASSIFICATION
from distill.workspace import STUDENT, TEACHER, Workspace

DEFAULT_MODELS = (TEACHER, STUDENT)
DEFAULT_ROWS = 6
NOTHING = "the model's own answer without any modality, from biases and learned stand-ins; it learnt from no such row"
NEEDS = {
    TEACHER: ("data", "teacher"),
    "baseline": ("data", "vocabulary", "baseline"),
    STUDENT: ("data", "inherit", "student"),
    "pruned": ("data", "inherit", "pruned"),
}
"""Model -> the stages whose folders it is opened from."""


def choose_models(asked: Sequence[str], done: Mapping[str, Artifact], recipe: Recipe, called: str) -> list[str]:
    """The models to explain: those that are asked for, or else teacher and student as far as they are there.

    Args:
        asked: names; may be empty.
        done: finished stages.
        recipe: the run's.
        called: the recipe's name on the command line.

    Raises:
        UserError: an unknown name, a stage that is not finished, or a model without heads.
    """
    for name in asked:
        if name not in NEEDS:
            raise UserError(f"--models: no model {name!r}; {nearest(name, NEEDS)}")
    names = list(dict.fromkeys(asked or [name for name in DEFAULT_MODELS if set(NEEDS[name]) <= done.keys()]))
    for name in names or [TEACHER]:
        missing = [stage for stage in NEEDS[name] if stage not in done]
        if missing:
            raise UserError(
                f"the {name} is not there yet, or was made with other settings (stage {missing[-1]} of "
                f"{Path(recipe.output) / recipe.name} is to do); make it with `distill {VERBS[name]} {called}`"
            )
        if (recipe.teacher if name == TEACHER else recipe.student).fusion is None:
            raise UserError(f"the {name} has no fusion and so answers no task; only answers of tasks are explained")
    return names


def explain_run(
    work: Workspace, names: Sequence[str], *, task: str, rows: Sequence[int], folder: Path
) -> dict[str, Any]:
    """Explain answers for test rows, and write ``explain.json``, ``explain.html`` and pictures.

    Args:
        work: with the stages that the models need.
        names: the models.
        task: which; the first where empty.
        rows: ids of test rows; where empty the report's regressions, or else the first ones.
        folder: where to.

    Returns:
        What ``explain.json`` holds.

    Raises:
        UserError: an unknown task or row, or captum is not installed.
    """
    tasks = work.tasks()
    labels = {name: list(info.names) for name, info in tasks.items() if info.kind == CLASSIFICATION}
    if not labels:
        raise UserError(f"answers of classes are explained, and the data's tasks are others ({', '.join(tasks)})")
    if task and task not in labels:
        why = f"is a {tasks[task].kind}, and answers of classes are explained" if task in tasks else "is unknown"
        raise UserError(f"--task: task {task!r} {why}; {nearest(task, labels)}")
    task = task or next(iter(labels))
    if len(labels[task]) < 2:
        raise UserError(f"task {task!r} has one class, which every answer is; choose another --task")
    ids = list(dict.fromkeys(rows)) or _default_rows(work, task)
    places = _positions(work, ids)
    counts = work.class_counts()[task].double()
    shares = dict(zip(labels[task], (counts / counts.sum()).tolist(), strict=True))
    explained: dict[int, dict[str, Explained]] = {row: {} for row in ids}
    with progress("explain", quiet=work.quiet) as report:
        for number, name in enumerate(names):
            model = work.model(name).requires_grad_(False)
            for step, (row, subject) in enumerate(_subjects(work, model, name, task, places)):
                found = explain_row(subject, labels[task])
                found.numbers["training_share"] = shares[found.numbers["answer"]]
                explained[row][name] = found
                report(number * len(ids) + step + 1, len(names) * len(ids), name)
    about = {"name": work.recipe.name, "task": task, "models": list(names), "score": SCORE, "nothing": NOTHING}
    known = [(*_known(work, row, place, task), explained[row]) for row, place in zip(ids, places, strict=True)]
    return write_page(folder, about, known)


def _subjects(
    work: Workspace, model: Any, name: str, task: str, places: NDArray[np.int64]
) -> Iterator[tuple[int, Subject]]:
    """Each row's id, and the model before it."""
    config = work.recipe.teacher if name == TEACHER else work.recipe.student
    assert isinstance(model, MultimodalModel)
    if task not in model.heads:
        raise UserError(f"--task: the {name} has no head for {task!r}; {nearest(task, config.heads)}")
    spec, data = input_spec(model), work.data()
    loader = work.clean_loader(TEST, spec, name)
    tokenizer = Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id, spec.rows) if spec.tokenizer else None
    table: Any = data.formats.get(TABULAR)
    columns = (table.numbers, table.categories) if table else ((), ())
    for place in places:
        batch = loader.batch(np.array([place]), loader.clean_views(1))[name]
        text, word_of = data.texts[int(place)], np.zeros(0, np.int64)
        if tokenizer is not None and bool(batch.present[TEXT][0]):
            word_of = tokenizer.words([text])[2][0]
        words = text.split()[: int(word_of.max(initial=-1)) + 1]
        yield int(data.ids[place]), Subject(model, batch, task, words, word_of, columns)


def _default_rows(work: Workspace, task: str) -> list[int]:
    """The rows of the task that the report lists as regressions, or the first test rows."""
    report = Path(work.path("data")).parent / "report" / "report.json"
    data = work.data()
    tested = data.ids[data.rows(TEST)].tolist()
    if report.is_file():
        worst = [int(one["id"]) for one in read_json(report)["regressions"] if one["task"] == task]
        worst = [row for row in worst if row in set(tested)]
        if worst:
            return worst[:DEFAULT_ROWS]
    return tested[:DEFAULT_ROWS]


def _positions(work: Workspace, ids: Sequence[int]) -> NDArray[np.int64]:
    data = work.data()
    tested = data.rows(TEST)
    places = {int(row): int(place) for row, place in zip(data.ids[tested], tested, strict=True)}
    for row in ids:
        if row not in places:
            first = ", ".join(map(str, list(places)[:3]))
            raise UserError(f"--rows: {row} is the id of no test row; they begin with {first}")
    return np.array([places[row] for row in ids], np.int64)


def _known(work: Workspace, row: int, place: int, task: str) -> tuple[dict[str, Any], Image.Image | None]:
    """What is known of a row, and its image."""
    data = work.data()
    label = int(data.targets[task][place])
    present = [name for name, there in data.present.items() if there[place]]
    image = None
    if "image" in present:
        image = Image.fromarray(np.ascontiguousarray(data.arrays["image"][place].transpose(1, 2, 0)))
    true = None if label == IGNORE else data.labels[task][label]
    return {"id": row, "true": true, "present": present, "text": data.texts[place]}, image
