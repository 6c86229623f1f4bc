"""What the pipeline hands to the report: one entry a model, and everything that a reader needs to trust it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from distill.metrics import Floats, Integers
from distill.retrieval import Pairs
from distill.targets import CAPTIONING, Task

TEACHER, BASELINE, STUDENT, PRUNED = "teacher", "baseline", "student", "pruned"
"""Names of the models that the report compares all others with."""

Logits = Mapping[str, Floats]
"""Task -> float32 [N, C], [N, K] of labels or standardised numbers, or [N, L] ids of written captions."""

Examples = Callable[[int], Mapping[str, Any]] | Mapping[int, Mapping[str, Any]]
"""Row id -> ``{"image_png": bytes | None, "text": str}``."""


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One evaluated model. What was not measured is None, and shows as a dash.

    Attributes:
        name: unique; ``teacher``, ``baseline``, ``student`` and ``pruned`` have the meaning that their names say.
        stage: the stage that made it.
        runtime: what ran it, for example ``pytorch`` or ``onnxruntime``.
        logits: task -> float32 [N, C] on the test rows.
        subsets: modalities, such as "image" or "image+text" -> task -> float32 [N, C], predicted from these alone.
        embeddings: "image" and "text" -> float32 [N, D], where retrieval is measured.
        num_params: parameters of the whole model.
        flops: floating-point operations of one row (a multiply-add counts as two).
        size_bytes: bytes on disk.
        latency_ms: ``{"p50", "p95"}`` of one row on one thread, milliseconds.
        latency_note: how latency was measured, for example "onnxruntime 1.31 CPU, batch 1, one thread".
        peak_memory_bytes: largest resident memory while predicting.
        seeds: seeds that its training used.
        source: name of the model that it was exported from; None for a model that was not exported.
    """

    name: str
    stage: str
    runtime: str
    logits: Logits
    subsets: Mapping[str, Logits] = field(default_factory=dict)
    embeddings: Mapping[str, Floats] = field(default_factory=dict)
    num_params: int | None = None
    flops: int | None = None
    size_bytes: int | None = None
    latency_ms: Mapping[str, float] | None = None
    latency_note: str = ""
    peak_memory_bytes: int | None = None
    seeds: Sequence[int] = ()
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReportContext:
    """Everything that a report is made from.

    Attributes:
        name: the recipe's name.
        recipe: the resolved recipe, JSON values.
        created: ISO date and time.
        tasks: what there was to answer; the first task leads the headline.
        targets: task -> [N, ...], as its task says.
        groups: int64 [N]; rows of a group are resampled together.
        ids: int64 [N].
        shown: int64 [N], equal where rows show models the same, so that captions of all are true of each; None where
            all rows differ.
        pairs: which images and texts of the rows belong together; None where retrieval is not measured.
        models: in the order of the tables.
        data: what is known about the data, JSON values: rows a split, licences, ``fingerprint``, and
            ``test_fingerprint`` of the test rows alone.
        seeds: all seeds of the run.
        versions: package or tool -> version.
        curves: model -> one dict an epoch, with ``epoch``, ``step``, ``train_loss`` and ``valid/<task>_<measure>``.
        costs: stage -> ``{"seconds", "cpu_seconds"}``.
        cache: what the teacher cache cost, JSON values; keys ending in ``bytes`` or ``seconds`` are shown as such.
        teachers: further teacher that the student learnt from -> ``{"run", "stage", "fingerprint"}`` of its fit.
        parity: bundle -> what its export gate measured, JSON values.
        not_run: bundle that was written and could not be run here -> ``why``, a sentence, and ``size_bytes``.
        quantized: static int8 bundle -> ``layers`` and, where it was searched for, ``search``, as its stage wrote them.
        doubts: task -> which labels the teacher doubts, as :func:`distill.label_noise.told` says.
        measured: what was measured on devices: a dict a bundle, device, batch and number of threads, JSON values.
        examples: shows a row to a human; None for none.
        num_examples: largest number of regressions shown.
        resamples: bootstrap replicates.
        bootstrap_seed: seed of the bootstrap.
    """

    name: str
    recipe: Mapping[str, Any]
    created: str
    tasks: Mapping[str, Task]
    targets: Mapping[str, NDArray[Any]]
    groups: Integers
    ids: Integers
    models: Sequence[ModelEntry]
    shown: Integers | None = None
    pairs: Pairs | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)
    teachers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    parity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    not_run: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quantized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    doubts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measured: Sequence[Mapping[str, Any]] = ()
    examples: Examples | None = None
    num_examples: int = 8
    resamples: int = 2000
    bootstrap_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse predictions that do not fit the rows.

        Raises:
            ValueError: a model name occurs twice, or an array's shape does not fit the rows and classes.
        """
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"models of a report need unique names, got {names}")
        num_rows = len(self.ids)
        for what, rows in {"groups": self.groups, **self.targets}.items():
            if len(rows) != num_rows:
                raise ValueError(f"{what} has {len(rows)} rows, expected {num_rows}, one for each id")
        for model in self.models:
            for where, logits in (("", model.logits), *((f" ({m} alone)", part) for m, part in model.subsets.items())):
                self._check_logits(f"{model.name}{where}", logits)

    def model(self, name: str) -> ModelEntry | None:
        """Return the model of this name, or None."""
        return next((model for model in self.models if model.name == name), None)

    def _check_logits(self, owner: str, logits: Logits) -> None:
        for task, values in logits.items():
            expected = (len(self.ids), _width(self.tasks[task]) if task in self.tasks else 0)
            if values.shape != expected:
                raise ValueError(f"logits of {owner} for {task!r} have shape {values.shape}, expected {expected}")


def _width(task: Task) -> int:
    """Numbers a row that models give."""
    return task.length if task.kind == CAPTIONING else len(task.names)


def shipped(models: Sequence[ModelEntry]) -> ModelEntry | None:
    """Return the model that goes to the device: the smallest exported one, or else the student or the last model."""
    exported = [model for model in models if model.source and model.name != TEACHER and model.source != TEACHER]
    if exported:
        return min(exported, key=lambda model: model.size_bytes or float("inf"))
    learners = [model for model in models if model.name != TEACHER]
    return next((m for m in learners if m.name == STUDENT), learners[-1] if learners else None)
