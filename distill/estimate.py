"""What a run will cost, before it runs: rows, parameters, disk, and a rough time."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill.aware import asked_for
from distill.build import Model, example_batch, input_spec
from distill.bundles import QAT
from distill.cache import default_shard_rows, flatten
from distill.config import Recipe, TrainConfig
from distill.contracts import TRAIN, Batch, Outputs, UserError
from distill.data.labelled import keep_labels
from distill.data.loader import InputSpec
from distill.data.media import kept_arrays
from distill.data.rows import count_splits, read_rows, settle_tasks
from distill.data.sources import open_source
from distill.data_config import AugmentConfig
from distill.formats import TEXT, formats_of
from distill.losses.terms import labelled_alone
from distill.multimodal import OneModality
from distill.other_teachers import Teachers, check_labels
from distill.shards import DTYPES, shard_size
from distill.towers import frozen_towers
from distill.workspace import TEACHER, untrained

ROWS, LENGTH, REPEATS = 64, 8, 3  # of the batch that is timed
ID_BYTES, HEADER_BYTES, SHARD_BYTES, MANIFEST_BYTES = 4, 70, 1000, 2000  # of files that describe, roughly
Registry = Mapping[str, Callable[..., Any]]


def estimate(recipe: Recipe, encoders: Registry) -> dict[str, Any]:
    """Estimate what a recipe needs if nothing of it is done yet.

    Args:
        recipe: validated.
        encoders: encoder type -> class.

    Returns:
        ``rows`` a split; ``labelled`` ones of train; ``num_params`` of teachers and student; ``disk_bytes`` of the
        data's arrays and of towers, at most, and of the cache with the answers to the transfer set, within a few
        percent; ``seconds`` of encoding and training, from a few steps timed here and now. What needs weights that are
        not there is left out, and ``missing`` says why.

    Raises:
        UserError: the data cannot be read, a teacher lacks a tap, or one of another run cannot be rebuilt.
    """
    rows = read_rows(recipe.data, open_source(recipe.data.source, Path.cwd()), Path(tempfile.gettempdir()))
    tasks = settle_tasks(rows)
    counts = count_splits(rows)
    labelled = int(np.count_nonzero(keep_labels(rows, recipe.data.labelled, recipe.seed)))
    found: dict[str, Any] = {"rows": counts, "labelled": labelled, "num_params": {}}
    kept = [
        (np.dtype(format.arrays[array][0]), format.arrays[array][1])
        for name, format in formats_of(recipe.data).items()
        for array in kept_arrays(name, format, decode_once=recipe.data.decode_once)
    ]
    found["disk_bytes"] = {"data": len(rows.ids) * sum(kind.itemsize * math.prod(shape) for kind, shape in kept)}
    student = untrained(recipe.student, "student", encoders, tasks, recipe.data)
    found["num_params"]["student"] = _num_params(student)
    check_labels(recipe, tasks)
    try:
        teacher = untrained(recipe.teacher, "teacher", encoders, tasks, recipe.data)
    except UserError as error:
        return {**found, "missing": str(error)}
    teachers = Teachers(recipe, encoders, tasks, teacher.eval())
    found["num_params"] |= teachers.num_params()
    views, train = (recipe.cache.views if recipe.data.augment != AugmentConfig() else 1), counts[TRAIN]
    fitted, learnt = (
        0 if not terms else labelled if labelled_alone(terms) else train
        for terms in (recipe.teacher.objective, recipe.student.objective)
    )
    texts, pretrain = recipe.transfer.texts, recipe.teacher.pretrain
    encode, batch, tower_bytes = _encoded(teacher, recipe)
    batches = {name: _example(spec, recipe) for name, spec in teachers.specs.items()} | {TEACHER: batch}
    answer = _least_seconds(lambda: teachers(batches)) / ROWS
    cached = recipe.cache.enabled
    stored = _store_bytes(teachers(batches), train, views, recipe.cache.dtype) if cached else 0
    if texts and cached:
        alone = {name: _texts_alone(item) for name, item in batches.items()}
        stored += _store_bytes(teachers(alone), texts, 1, recipe.cache.dtype)
    inputs = len(rows.ids) + train * views
    found["disk_bytes"] |= {"towers": int(inputs * tower_bytes), "cache": stored}
    step = {"teacher": _seconds_a_row(teacher, batch)}
    example = _encoded(student, recipe)[1]
    step["student"] = _seconds_a_row(student, example)
    mixed = step["student"] + (recipe.transfer.ratio * _seconds_a_row(student, _texts_alone(example)) if texts else 0)
    mixed += 0 if cached else answer
    found["seconds"] = {
        "towers": inputs * encode,
        "teacher": _trained(recipe.teacher.train, fitted) * step["teacher"],
        "cache": train * views * answer + texts * (encode + answer) if cached else 0.0,
        "baseline": _trained(recipe.student.train, learnt) * step["student"],
        "student": _trained(recipe.student.train, learnt) * mixed,
        "pruned": _trained(recipe.prune.train, learnt) * mixed,
    }
    if asked_for(recipe):
        found["seconds"][QAT] = _trained(recipe.export.quantize.qat.train, learnt) * mixed
    if pretrain:
        learning = [_trained(part, labelled) * _alone(teacher, name, recipe) for name, part in pretrain.items()]
        found["seconds"]["pretrain"] = sum(learning)
    return found


def render(found: Mapping[str, Any]) -> list[str]:
    """Return an estimate as lines of text."""
    rows = ", ".join(f"{count} {split}" for split, count in found["rows"].items())
    rows += f", {found['labelled']} of train labelled" if found["labelled"] < found["rows"][TRAIN] else ""
    params = ", ".join(f"{name} {count:,}" for name, count in found["num_params"].items())
    disk = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found["disk_bytes"].items())
    lines = [f"rows: {rows}", f"parameters: {params}", f"disk, at most: {disk}"]
    if "missing" in found:
        return [*lines, f"not estimated: {found['missing']}"]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in found["seconds"].items())
    note = "from a few steps timed now; validation, export and bench come on top"
    return [*lines, f"time, roughly, if nothing is done yet: {seconds} ({note})"]


def _num_params(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _example(spec: InputSpec, recipe: Recipe) -> Batch:
    """A batch as a model of this spec reads it."""
    return example_batch(spec, recipe.data, rows=ROWS, length=min(LENGTH, spec.max_length))


def _encoded(model: Model, recipe: Recipe) -> tuple[float, Batch, float]:
    """Return seconds a row of the frozen towers, a batch that holds their outputs, and those outputs' bytes a row."""
    spec = input_spec(model)
    batch = _example(spec, recipe)
    inputs, size, began = dict(batch.inputs), 0.0, time.perf_counter()
    with torch.no_grad():
        for name in frozen_towers(model):
            encoder: Any = model.encoders[name]
            tokens = encoder.encode(*batch.inputs_of(name).values())
            del inputs[name]
            inputs[f"{name}_encoded"] = tokens
            length = spec.max_length if name == TEXT else tokens.shape[1]
            size += length * tokens.shape[2] * 2  # kept as float16
    return (time.perf_counter() - began) / ROWS, batch._replace(inputs=inputs), size


def _trained(config: TrainConfig, rows: int) -> int:
    """Rows that a budget trains on, each as often as it is read."""
    return min(config.epochs * rows, (config.max_steps or config.epochs * rows) * config.batch_size)


def _alone(model: Any, modality: str, recipe: Recipe) -> float:
    """Seconds a row of an encoder that learns alone."""
    model.encoders[modality].thaw()
    return _seconds_a_row(OneModality(model, modality), _example(input_spec(model), recipe))


def _texts_alone(batch: Batch) -> Batch:
    """The same rows as a transfer set has them: nobody has anything else, and it is not in the inputs."""
    inputs = batch.inputs_of(TEXT)
    present = {name: mask & (name == TEXT) for name, mask in batch.present.items()}
    return batch._replace(inputs=inputs, present=present)


def _store_bytes(outputs: Outputs, rows: int, views: int, dtype: str) -> int:
    """Bytes of a cache of such outputs: values, ids, and of each shard its header, entry and lines in manifests."""
    tensors = flatten(outputs)
    row_bytes = sum(tensor[0].numel() * DTYPES[dtype].itemsize for tensor in tensors.values())
    described = {name: {"shape": list(tensor.shape[1:]), "dtype": dtype} for name, tensor in tensors.items()}
    specs, header = len(json.dumps(described, indent=2)), len(json.dumps(described)) + HEADER_BYTES
    shards = views * -(-rows // shard_size(rows, default_shard_rows(rows)))
    return rows * (views * row_bytes + ID_BYTES) + shards * (header + specs + SHARD_BYTES) + specs + MANIFEST_BYTES


def _least_seconds(work: Callable[[], Any]) -> float:
    """Seconds of a call, the best of a few."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _seconds_a_row(model: nn.Module, batch: Batch) -> float:
    """Seconds of forward and backward, the best of a few; of a model without anything to learn, of the forward."""

    def step() -> None:
        said = model.train()(batch)
        total = torch.stack([value.sum() for value in (said.logits or said.embeddings).values()]).sum()
        if total.requires_grad:
            total.backward()

    return _least_seconds(step) / ROWS
