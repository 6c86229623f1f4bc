"""Candidates of a search made and measured: untrained ones in seconds, and trained ones; of both the bundle itself.

Stages are the pipeline's own. They lie below ``stages/NAME-FINGERPRINT``, so candidates share what is the same in them,
and what the recipe's own run has is read there in place.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distill import bench, evaluate, pipeline, prune
from distill.bench import Timed
from distill.build import Model, example_batch, input_spec
from distill.captions import cider, references, texts
from distill.checkpoint import load_weights, save_weights
from distill.config import FP32, Recipe
from distill.contracts import VALID, Artifact, UserError
from distill.dual import DualEncoder
from distill.fit.budget import Figures
from distill.fit.space import PRECISION, candidate, differences, prunes, with_epochs
from distill.gate import SHIPPED, bundle_says
from distill.measures import score_of
from distill.planning import Planned, run_planned
from distill.results import bundle_folder, export_shipped, median_row, quantize_bundles, timed_bundle
from distill.retrieval import scores
from distill.runs import copy_stage, find
from distill.targets import CAPTIONING, CLASSIFICATION, known
from distill.vocabulary import cut_vocabulary
from distill.workspace import PLAN_FILE, PRUNED, STUDENT, TEACHER, WEIGHTS_FILE, Workspace

TRAINED = (STUDENT, PRUNED)
"""The stages of a candidate that train."""
UNTRAINED_ROWS = 32  # that the bundle of an untrained student is calibrated on
PAIR = ("image", "text")
RECALL = "recall@1"


@dataclass(frozen=True)
class Made:
    """A bundle that was made.

    Attributes:
        figures: what it costs and keeps.
        retention: of each task; empty of an untrained one.
        timed: what it is timed with.
    """

    figures: Figures
    retention: dict[str, float]
    timed: Timed


class Candidates:
    """Makes and measures what a search asks for.

    Latencies are measured in turns with the reference's fp32 graph and scaled by what that took in the beginning, so
    that a machine that slows down slows no candidate.

    Attributes:
        recipe: the reference's.
        yardstick_ms: what its fp32 graph took in the beginning.
    """

    def __init__(
        self, recipe: Recipe, done: dict[str, Artifact], folder: Path, yardstick_ms: float | None = None
    ) -> None:
        """Take the finished stages of the reference's run, as far as its bundles, and the folder of the search."""
        self.recipe, self._work, self._folder = recipe, pipeline.workspace(recipe, done), folder
        model = self._work.model(SHIPPED)
        self._yardstick = timed_bundle(self._work, FP32, median_row(self._work, model, VALID))
        self.yardstick_ms = self._times({})[FP32] if yardstick_ms is None else yardstick_ms

    def recipe_of(self, values: Mapping[str, Any], share: float = 1.0) -> Recipe:
        """The recipe of a choice, with a share of its epochs, which may be above 1.

        Of a student that was trained in full, no part is cut.

        Raises:
            UserError: the choice makes no valid recipe.
        """
        made = candidate(self.recipe, values, self._work.encoders, self._work.inheritances)
        pipeline.check(made, SHIPPED)
        if share == 1:
            return made
        student = share > 1 or self._lookup(pipeline.plan(made, until=STUDENT)[-1]) is None
        return with_epochs(made, share, student=student)

    def lacks(self, values: Mapping[str, Any], share: float) -> tuple[str, ...]:
        """Those of TRAINED that are not there yet of a choice with a share of its epochs; none of an invalid choice."""
        try:
            planned = pipeline.plan(self.recipe_of(values, share), until=SHIPPED)
        except UserError:
            return ()
        return tuple(item.stage.name for item in planned if item.stage.name in TRAINED and not self._lookup(item))

    def check_teacher(self) -> None:
        """Check that the teacher has something to retain.

        Raises:
            UserError: it gets nothing right on the validation rows.
        """
        _ = self._teacher

    def changes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What of a choice is not the recipe's; the bundle is always named."""
        return differences(self.recipe, values)

    def untrained(self, values: Mapping[str, Any]) -> Figures:
        """What a choice costs, from its student without training: pruned, exported, quantized, timed.

        One whose student was trained in full, for another choice, is pruned as it is.

        Raises:
            UserError: such a student cannot be built, pruned or exported.
            ParityError: the bundle does not say what its source says.
        """
        recipe = self.recipe_of(values)
        place = self._emptied("untrained")
        quick: dict[str, Any] = {"min_agreement": dict.fromkeys(recipe.export.bundles, 0.0)}
        quantize = {"calibration_rows": min(UNTRAINED_ROWS, recipe.export.quantize.calibration_rows), "search": False}
        quick["quantize"] = recipe.export.quantize.model_copy(update=quantize)
        work = self._made(recipe, "vocabulary")
        student = self._lookup(pipeline.plan(recipe, until=STUDENT)[-1])
        work.done["inherit"] = work.done["vocabulary"]  # where the tokenizer lies that a student takes over
        model: Any = work.blank(STUDENT)
        if student is not None:
            load_weights(model, student.path / WEIGHTS_FILE)
        config = recipe.prune if prunes(recipe.prune) else recipe.prune.model_copy(update={"importance": "magnitude"})
        example = example_batch(input_spec(model), recipe.data, tasks=work.tasks())
        smaller: Any
        smaller, channels = prune.prune(model, example, config, seed=recipe.seed)
        plan = cut_vocabulary(work, smaller, channels)
        prune.apply(smaller, plan.since(channels))
        work.done[PRUNED] = Artifact(PRUNED, place / PRUNED, "")
        save_weights(smaller, place / PRUNED / WEIGHTS_FILE)
        plan.save(place / PRUNED / PLAN_FILE)
        work.recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update=quick)})
        return self._figures(self._bundled(work, place, values))

    def trained(self, values: Mapping[str, Any], share: float, name: str) -> Made:
        """Train a choice with a share of its epochs, and measure the bundle that comes of it, gated as in any run.

        Args:
            values: path -> choice.
            share: of the epochs.
            name: of the folder of its bundles.

        Raises:
            UserError: as :meth:`untrained`.
            ParityError: as :meth:`untrained`.
            TrainingError: it diverged.
        """
        work = self._made(self.recipe_of(values, share), SHIPPED)
        timed = self._bundled(work, self._emptied(name), values)
        kept = self._retention(work, work.model(SHIPPED), bundle_folder(work, _bundle(work, values)))
        overall = kept.pop("")
        return Made(self._figures(timed, overall), kept, timed)

    def reference(self, bundle: str) -> Made:
        """A bundle of the recipe's own run."""
        work, model = self._work, self._work.model(SHIPPED)
        timed = timed_bundle(work, bundle, median_row(work, model, VALID))
        kept = self._retention(work, model, bundle_folder(work, bundle))
        return Made(self._figures(timed, kept.pop("")), kept, timed)

    def side_by_side(self, timed: Mapping[str, Timed]) -> dict[str, float]:
        """Median latencies of several bundles in turns, ms, scaled as all latencies are."""
        found = self._times(timed)
        return {name: found[name] * self.yardstick_ms / found[FP32] for name in timed}

    def keep(self, recipe: Recipe) -> None:
        """Copy the finished stages of a recipe to where its own run has them."""
        target = pipeline.run_folder(recipe)
        for item in pipeline.plan(recipe.model_copy(update=self._place), until=SHIPPED):
            artifact, folder = self._lookup(item), target / item.stage.name
            if artifact is not None and find(folder, item.stage.name, item.key) is None:
                target.mkdir(parents=True, exist_ok=True)
                copy_stage(artifact.path, folder, item.stage.name, item.key)

    @property
    def _place(self) -> dict[str, str]:
        return {"output": self.recipe.output, "name": self.recipe.name}

    def _emptied(self, name: str) -> Path:
        place = self._folder / "bundles" / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def _lookup(self, item: Planned) -> Artifact | None:
        """A stage that the reference's run has, or that was made for a candidate."""
        return item.artifact or find(self._stage(item), item.stage.name, item.key)

    def _stage(self, item: Planned) -> Path:
        return self._folder / "stages" / f"{item.stage.name}-{item.key}"

    def _made(self, recipe: Recipe, until: str) -> Workspace:
        """Bring the stages of a candidate up to date."""
        work = pipeline.workspace(recipe, {})
        for item in pipeline.plan(recipe, until=until):
            artifact = self._lookup(item)
            work.done[item.stage.name] = artifact or run_planned(item, work, self._stage(item))
        return work

    def _bundled(self, work: Workspace, place: Path, values: Mapping[str, Any]) -> Timed:
        """Write the bundles of a workspace's shipped model."""
        for stage in ("export", "quantize"):
            work.done[stage] = Artifact(stage, place / stage, "")
            (place / stage).mkdir()
        export_shipped(work, place / "export")
        bundle = _bundle(work, values)
        if bundle != FP32:
            quantize_bundles(work, place / "quantize")
        return timed_bundle(work, bundle, median_row(work, work.model(SHIPPED), VALID))

    def _figures(self, timed: Timed, retention: float | None = None) -> Figures:
        return Figures(self.side_by_side({"": timed})[""], timed.size_bytes, retention)

    def _times(self, timed: Mapping[str, Timed]) -> dict[str, float]:
        config = self.recipe.bench
        graphs = {FP32: self._yardstick, **timed}
        found = bench.time_models(graphs, repeats=config.repeats, threads=config.threads)
        return {name: float(each["p50"]) for name, each in found.items()}

    def _retention(self, work: Workspace, model: Model, bundle: Path) -> dict[str, float]:
        """Task -> what a bundle keeps of the teacher's measure on the validation rows; "" of the mean over tasks."""
        loader = work.clean_loader(VALID, input_spec(model), STUDENT)
        wanted = PAIR if isinstance(model, DualEncoder) else ()
        said = bundle_says(model, bundle, evaluate.clean_batches(loader, STUDENT), wanted)
        ours, theirs = _quality(work, said), self._teacher
        both = sorted(ours.keys() & theirs.keys())
        kept = {task: ours[task] / theirs[task] for task in both if theirs[task] > 0}
        return {**kept, "": sum(ours[task] for task in both) / sum(theirs[task] for task in both)}

    @cached_property
    def _teacher(self) -> dict[str, float]:
        """The teacher's own measures on the validation rows."""
        work = self._work
        model: Any = work.teacher()
        loader = work.towers(work.clean_loader(VALID, input_spec(model), TEACHER), model)
        wanted = PAIR if isinstance(model, DualEncoder) else ()
        said = evaluate.predict_torch(model, evaluate.clean_batches(loader, TEACHER), embeddings=wanted)
        found = _quality(work, said)
        if not found or np.mean(list(found.values())) <= 0:
            raise UserError("the teacher gets nothing right on the validation rows, so there is nothing to retain")
        return found


def _bundle(work: Workspace, values: Mapping[str, Any]) -> str:
    return str(values.get(PRECISION, work.recipe.export.bundles[-1]))


def _quality(work: Workspace, said: evaluate.Arrays) -> dict[str, float]:
    """The measure of each task on the validation rows, or recall@1 of a model that retrieves."""
    if "embedding.image" in said:
        found = scores({name: said[f"embedding.{name}"] for name in PAIR}, work.pairs(VALID))
        return {RECALL: float(np.mean([each[RECALL] for each in found.values()]))}
    data, measured = work.data(), {}
    rows = data.rows(VALID)
    for name, task in work.tasks().items():
        if f"logits.{name}" not in said:
            continue
        targets, outputs = data.targets[name][rows], said[f"logits.{name}"]
        there = known(targets)
        if task.kind == CAPTIONING:
            measured[name] = float(cider(texts(task, outputs[there]), references(task, targets[there])).mean())
        else:
            answered = outputs.argmax(axis=-1) if task.kind == CLASSIFICATION else outputs
            measured[name] = score_of(task.kind, answered, targets)
    return {name: value for name, value in measured.items() if np.isfinite(value)}
