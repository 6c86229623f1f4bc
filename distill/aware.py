"""The stage ``qat``: the shipped student learns on, with the rounding of its int8 graph, and that graph is made of it.

Training starts from the ranges of post-training quantization, and what it ends with is written into the same graph as
that, so the int8 bundle of either has the same operators, size and speed.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distill import evaluate
from distill.build import Model, example_batch, input_spec
from distill.bundles import BUNDLES, QAT
from distill.checkpoint import load_weights
from distill.config import EMA, QuantizeConfig, Recipe
from distill.contracts import TRAIN, Batch, UserError
from distill.data.loader import Loader
from distill.export.onnx import export_onnx
from distill.inheritance import freeze_inherited
from distill.jobs import distillation, run_engine
from distill.losses.terms import needs_teacher
from distill.other_teachers import own_taps
from distill.quantization.common import Feeds
from distill.quantization.places import find_places
from distill.quantization.static import StaticQuantizer
from distill.rounding import Plan, Range, round_inside, without_rounding
from distill.workspace import PRUNED, STUDENT, WEIGHTS_FILE, Workspace

PLACE = "export.quantize.qat"
"""Of its settings in a recipe."""
PLAN_FILE = "rounding.json"
CALIBRATION_BATCH = 32
ROWS = 8
"""That are run to find what the graph rounds."""

log = logging.getLogger(__name__)


def asked_for(recipe: Recipe) -> bool:
    """Whether a run has the stage: bundles are made of what it trains."""
    return bool(_bundles(recipe))


def _bundles(recipe: Recipe) -> list[str]:
    """Of what the stage trains; a name that is no bundle's is refused elsewhere."""
    return [name for name in recipe.export.bundles if name in BUNDLES and BUNDLES[name].source == QAT]


def train_aware(work: Workspace, folder: Path) -> dict[str, Any]:
    """Train the shipped student for int8."""
    config = work.recipe.export.quantize.qat
    model = work.model(PRUNED)
    freeze_inherited(work, model)
    if work.ranks.first and not (folder / PLAN_FILE).is_file():
        planned(work, model).save(folder / PLAN_FILE)
    work.ranks.wait()
    plan = Plan.load(folder / PLAN_FILE)
    if plan.missed:
        log.warning("qat: %s are rounded after training alone", ", ".join(plan.missed))
    without_dropout(model)
    round_inside(model, plan)
    job = distillation(work, folder, model, config.train, config.objective)
    info = run_engine(work, job, "train for int8")
    return {**info, "rounded": {"values": len(plan.values), "layers": len(plan.weights), "tables": len(plan.tables)}}


def planned(work: Workspace, model: Model) -> Plan:
    """Find what the int8 graph of a model rounds, with the ranges of post-training quantization."""
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        export_graph(work, model, graph)
        batches = list(calibration(work, model))
        quantizer = StaticQuantizer(graph, batches, settings(work, model))
        passes = [(rows, evaluate.feeds(rows)) for rows in with_gaps(_whole_rows(work, model))]
        return find_places(model, passes, quantizer)


def settings(work: Workspace, model: Model) -> QuantizeConfig:
    """The recipe's ``export.quantize``, with the parts that the model's encoders keep in float."""
    config, encoders = work.recipe.export.quantize, dict[str, Any](model.encoders)
    fixed = [f"encoders.{name}.{part}" for name, encoder in encoders.items() for part in encoder.keep_float]
    return config.model_copy(update={"keep_float": [*config.keep_float, *fixed]})


def calibration(work: Workspace, model: Model) -> Iterator[Feeds]:
    """Inputs of clean training rows, evenly spread."""
    loader = work.clean_loader(TRAIN, input_spec(model), STUDENT, batch_size=CALIBRATION_BATCH)
    wanted = min(work.recipe.export.quantize.calibration_rows, loader.num_rows)
    chosen = np.linspace(0, loader.num_rows - 1, wanted).astype(int)
    for part in np.array_split(loader.row_positions[chosen], -(-len(chosen) // CALIBRATION_BATCH)):
        yield evaluate.feeds(_batch(loader, part))


def without_dropout(model: nn.Module) -> None:
    """Let nothing be dropped, in place: what is left would be scaled up, and widen the ranges in training alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "drop_prob", None), float):  # stochastic depth
            setattr(module, "drop_prob", 0.0)  # noqa: B010


def trained(work: Workspace) -> Model:
    """The model that the stage left, which rounds, in eval mode."""
    model: Any = work.model(PRUNED)
    round_inside(model, Plan.load(work.path(QAT) / PLAN_FILE))
    load_weights(model, work.path(QAT) / WEIGHTS_FILE)
    return model.eval()


def plain(work: Workspace) -> tuple[Model, dict[str, Range]]:
    """What the stage left as a float model, whose weights are rounded, and the ranges of its graph's values."""
    model = trained(work)
    ranges = without_rounding(model)
    return model, ranges


def export_graph(work: Workspace, model: Model, graph: Path) -> dict[str, Any]:
    """Write a model's float graph, with the outputs and the opset that the recipe wants."""
    export, example = work.recipe.export, example_batch(input_spec(model), work.recipe.data)
    return export_onnx(model, example, graph, opset=export.opset, embeddings=export.embeddings)


def check_aware(recipe: Recipe) -> None:
    """Check ``export.quantize.qat`` beyond its schema, if a bundle needs it; terms and budget are checked as others.

    Raises:
        UserError: it cannot be trained so.
    """
    if not asked_for(recipe):
        return
    config = recipe.export.quantize
    if not config.per_channel:
        bundle = _bundles(recipe)[0]
        raise UserError(f"export.quantize.per_channel: {bundle} learns one scale a channel; set it to true")
    if config.qat.train.shard:
        raise UserError(f"{PLACE}.train.shard: layers that round have their weights whole; set it to false")
    if config.qat.train.balance is not None:
        raise UserError(f"{PLACE}.train.balance: modalities are balanced while a student is learning; leave it out")
    terms = config.qat.objective
    if terms is None or not needs_teacher(terms):
        return
    kept = own_taps(recipe)
    for number, term in enumerate(terms):
        place = f"{PLACE}.objective[{number}]"
        others = {name for each in recipe.student.objective for name in each.teachers}
        for name in set(term.teachers) - others - {None, EMA}:
            raise UserError(f"{place}: no term of student.objective asks teacher {name!r}; leave it out")
        for tap in term.tapped("teacher"):
            if tap not in kept and None in term.teachers:
                raise UserError(f"{place}: the teacher's {tap!r} is not in the cache; add it to cache.taps")


def with_gaps(rows: Batch) -> list[Batch]:
    """Rows that have all modalities, and the same ones with some modalities missing, each in some rows."""
    period = len(rows.present) + 1
    numbers = torch.arange(len(rows.ids))
    present = {name: (numbers + at) % period != 0 for at, name in enumerate(rows.present)}
    return [rows, rows._replace(present=present)]


def _whole_rows(work: Workspace, model: Model) -> Batch:
    """A few clean training rows, those with the most modalities, which the model takes to have all."""
    loader = work.clean_loader(TRAIN, input_spec(model), STUDENT)
    counts = np.sum([loader.data.present[name][loader.row_positions] for name in model.encoders], axis=0)
    batch = _batch(loader, np.sort(loader.row_positions[np.argsort(-counts, kind="stable")[:ROWS]]))
    return batch._replace(present={name: flags.new_ones(flags.shape) for name, flags in batch.present.items()})


def _batch(loader: Loader, rows: NDArray[Any]) -> Batch:
    return loader.batch(rows, loader.clean_views(len(rows)))[STUDENT]
