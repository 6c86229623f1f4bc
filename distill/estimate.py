"""What a run will cost, before it runs: rows, parameters, disk, and a rough time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.build import build_model, example_batch, input_spec
from distill.cache import flatten
from distill.config import ModelConfig, Recipe
from distill.contracts import SPLITS, TRAIN, Batch, UserError
from distill.data.rows import encode_targets, read_rows
from distill.data.sources import open_source
from distill.losses.objective import tap_paths
from distill.multimodal import MultimodalModel, Tapped
from distill.shards import DTYPES
from distill.towers import frozen_towers
from distill.workspace import takes_tokenizer

ROWS, LENGTH, REPEATS = 64, 8, 3  # of the batch that is timed
Registry = Mapping[str, Callable[..., Any]]


def estimate(recipe: Recipe, encoders: Registry) -> dict[str, Any]:
    """Estimate what a recipe needs if nothing of it is done yet.

    Args:
        recipe: validated.
        encoders: encoder type -> class.

    Returns:
        ``rows`` a split; ``num_params`` of teacher and student; ``disk_bytes`` of data, towers and cache, at most;
        ``seconds`` of encoding and training, from a few steps timed here and now. What needs weights that are not
        there is left out, and ``missing`` says why.

    Raises:
        UserError: the data cannot be read.
    """
    rows = read_rows(recipe.data, open_source(recipe.data.source, Path.cwd()))
    _, labels = encode_targets(rows)
    counts = Counter(rows.split)
    found: dict[str, Any] = {"rows": {split: counts[split] for split in SPLITS}, "num_params": {}}
    pixels = 3 * recipe.data.working_size**2 if "image" in recipe.data.modalities else 0
    found["disk_bytes"] = {"data": len(rows.ids) * pixels}
    num_classes = {task: len(names) for task, names in labels.items()}
    student = _build(recipe.student, "student", encoders, num_classes)
    found["num_params"]["student"] = _num_params(student)
    try:
        teacher = _build(recipe.teacher, "teacher", encoders, num_classes)
    except UserError as error:
        return {**found, "missing": str(error)}
    found["num_params"]["teacher"] = _num_params(teacher)
    views, train = recipe.cache.views, counts[TRAIN]
    encode, batch, tower_bytes = _encoded(teacher, recipe)
    outputs = Tapped(teacher, tap_paths(recipe.student.objective, "teacher"))(batch)
    stored = sum(tensor.numel() for tensor in flatten(outputs).values()) * DTYPES[recipe.cache.dtype].itemsize / ROWS
    inputs, answered = len(rows.ids) + train * views, train * views + recipe.transfer.texts
    found["disk_bytes"] |= {"towers": int(inputs * tower_bytes), "cache": int(answered * stored)}
    step = {"teacher": _seconds_a_row(teacher, batch)}
    step["student"] = _seconds_a_row(student, _encoded(student, recipe)[1])
    fits = [*recipe.teacher.pretrain.values(), recipe.teacher.train]
    budgets = {"baseline": recipe.student.train, "student": recipe.student.train, "pruned": recipe.prune.train}
    found["seconds"] = {
        "towers": inputs * encode,
        **({"cache": recipe.transfer.texts * encode} if recipe.transfer.texts else {}),
        "teacher": train * sum(part.epochs for part in fits) * step["teacher"],
        **{stage: train * budget.epochs * step["student"] for stage, budget in budgets.items()},
    }
    return found


def render(found: Mapping[str, Any]) -> list[str]:
    """Return an estimate as lines of text."""
    rows = ", ".join(f"{count} {split}" for split, count in found["rows"].items())
    params = ", ".join(f"{name} {count:,}" for name, count in found["num_params"].items())
    disk = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found["disk_bytes"].items())
    lines = [f"rows: {rows}", f"parameters: {params}", f"disk, at most: {disk}"]
    if "missing" in found:
        return [*lines, f"not estimated: {found['missing']}"]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in found["seconds"].items())
    note = "from a few steps timed now; validation, export and bench come on top"
    return [*lines, f"time, roughly, if nothing is done yet: {seconds} ({note})"]


def _build(config: ModelConfig, where: str, encoders: Registry, num_classes: Mapping[str, int]) -> MultimodalModel:
    takers = [name for name, part in config.encoders.items() if takes_tokenizer(encoders[part.type])]
    given = {name: {"tokenizer_file": Path("tokenizer.json")} for name in takers}
    return build_model(config, encoders, num_classes, where, given)


def _num_params(model: MultimodalModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _encoded(model: MultimodalModel, recipe: Recipe) -> tuple[float, Batch, float]:
    """Return seconds a row of the frozen towers, a batch that holds their outputs, and those outputs' bytes a row."""
    import torch

    spec = input_spec(model)
    batch = example_batch(spec, recipe.data.working_size, rows=ROWS, length=min(LENGTH, spec.max_length))
    inputs, size, began = dict(batch.inputs), 0.0, time.perf_counter()
    with torch.no_grad():
        for name in frozen_towers(model):
            raw, encoder = inputs.pop(name), model.encoders[name]
            read: Any = encoder
            tokens = read.encode(raw, inputs["text_mask"]) if name == "text" else read.encode(raw)
            inputs[f"{name}_encoded"] = tokens
            length = spec.max_length if name == "text" else tokens.shape[1]
            size += length * tokens.shape[2] * 2  # kept as float16
    return (time.perf_counter() - began) / ROWS, batch._replace(inputs=inputs), size


def _seconds_a_row(model: MultimodalModel, batch: Batch) -> float:
    """Seconds of forward and backward, the best of a few."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        sum(logits.sum() for logits in model.train()(batch).logits.values()).backward()
        taken.append(time.perf_counter() - began)
    return min(taken) / ROWS
