"""A model's predictions on a split, from torch or from a bundle on its runtime; kept as safetensors.

``NAME.safetensors`` holds ``ids`` [N], ``logits.TASK`` [N, C] and ``subset.MODALITIES.TASK`` [N, C] (the logits with
only these present, such as ``image+text``), ``embedding.MODALITY`` [N, D] where retrieval is measured;
``targets.safetensors`` holds ``ids``, ``group``, ``target.TASK``, and the fields of :class:`~distill.retrieval.Pairs`
as ``FIELD.MODALITY`` where retrieval is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from distill import measures
from distill.contracts import AND, Batch, Outputs, UserError
from distill.data.batches import Batches
from distill.multimodal import evaluating
from distill.predict import EMBEDDING, Graph
from distill.progress import Progress, silent
from distill.retrieval import Pairs, scores
from distill.runs import atomic
from distill.targets import CAPTIONING, CLASSIFICATION, Task, known

CHOSEN = (CLASSIFICATION, CAPTIONING)  # kinds whose answer is the largest of logits
ALL_SUBSETS = 4  # modalities of which all subsets are measured
Arrays = dict[str, NDArray[np.float32]]
ACCURACY, SCORE, RECALL = "valid/accuracy", "valid/score", "valid/recall@1"
"""What the best epoch is chosen by: where all tasks have classes, of other models with heads, and of those without."""


def final_logits(outputs: Outputs) -> dict[str, torch.Tensor]:
    """The logits of the tasks themselves, without those of single-modality heads."""
    return {task: logits for task, logits in outputs.logits.items() if "." not in task}


def predict_torch(
    model: nn.Module,
    batches: Callable[[], Iterator[Batch]],
    *,
    subsets: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    report: Progress = silent,
) -> Arrays:
    """Run a torch model in eval mode over clean batches.

    Args:
        model: ``Batch -> Outputs``.
        batches: makes the iterator over the split.
        subsets: modalities to keep, such as "image" or "image+text", in further passes over the same rows.
        embeddings: modalities whose embeddings are wanted.
        report: called with (rows done, rows done): the total is not known here.

    Returns:
        ``logits.TASK`` float32 [N, C], of captions the ids of what was written [N, L], for each subset
        ``subset.MODALITIES.TASK``, and ``embedding.MODALITY`` [N, D].
    """
    parts: dict[str, list[NDArray[np.float32]]] = {}
    done = 0
    device = next(model.parameters(), torch.empty(0)).device
    with evaluating(model):
        for batch in (batch.to(device) for batch in batches()):
            passes = {"logits": batch, **{f"subset.{names}": only(batch, *names.split(AND)) for names in subsets}}
            for prefix, rows in passes.items():
                said = model(rows._replace(targets={}))  # heads that write are not told what
                found = {f"{prefix}.{task}": logits for task, logits in final_logits(said).items()}
                if rows is batch:
                    found |= {f"embedding.{name}": said.embeddings[name] for name in embeddings}
                for name, values in found.items():
                    parts.setdefault(name, []).append(values.float().cpu().numpy())
            done += len(batch.ids)
            report(done, done)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def predict_bundle(
    predictor: Graph, batches: Callable[[], Iterator[Batch]], *, embeddings: Sequence[str] = ()
) -> Arrays:
    """Run an exported bundle on its own runtime over the same batches, for the same arrays without subsets."""
    parts: dict[str, list[NDArray[np.float32]]] = {}
    wanted = {f"{EMBEDDING}{name}": f"embedding.{name}" for name in embeddings}
    for batch in batches():
        for output, values in predictor.run(feeds(batch)).items():
            name = wanted.get(output) if output.startswith(EMBEDDING) else f"logits.{output}"
            if name:
                parts.setdefault(name, []).append(values.astype(np.float32))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def feeds(batch: Batch) -> dict[str, NDArray[np.generic]]:
    """A batch as the inputs of an exported graph, which knows the modalities that its model reads and no other."""
    flags = {f"{name}_present": mask for name, mask in batch.present.items() if name in batch.inputs}
    named = {**batch.inputs, **flags}
    return {name: tensor.cpu().numpy() for name, tensor in named.items()}


def validation_scores(
    model: nn.Module,
    batches: Callable[[], Iterator[Batch]],
    tasks: Mapping[str, Task],
    gather: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
) -> dict[str, float]:
    """The measure of each task on a split, and their mean: what model selection reads.

    Args:
        model: ``Batch -> Outputs``.
        batches: makes the iterator over the split, or over one rank's share of each batch.
        tasks: those of the data.
        gather: joins the rows of all ranks.

    Returns:
        ``valid/TASK_MEASURE`` (accuracy, map, r2, token_accuracy) and their mean as :func:`chosen_by` names it, at
        most 1.

    Raises:
        UserError: no row has a target, or none tells anything.
    """
    device = next(model.parameters(), torch.empty(0)).device
    parts: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
    with evaluating(model):
        for batch in (batch.to(device) for batch in batches()):
            for name, outputs in final_logits(model(batch)).items():
                if name in batch.targets:
                    said = outputs.argmax(dim=-1) if tasks[name].kind in CHOSEN else outputs.float()
                    rows = (gather(said).cpu().numpy(), gather(batch.targets[name]).cpu().numpy())
                    parts.setdefault(name, []).append(rows)
    joined = {name: [np.concatenate(each) for each in zip(*rows, strict=True)] for name, rows in parts.items()}
    found = {
        f"valid/{name}_{measures.LEARNT[tasks[name].kind]}": measures.score_of(tasks[name].kind, *each)
        for name, each in joined.items()
        if known(each[1]).any()
    }
    found = {name: value for name, value in found.items() if np.isfinite(value)}
    if not found:
        raise UserError("no validation row has a label, so the best weights cannot be chosen; label some of the split")
    return {**found, chosen_by(tasks): float(np.mean(list(found.values())))}


def chosen_by(tasks: Mapping[str, Task]) -> str:
    """The name of the measure by which the best epoch of models with heads is chosen."""
    return ACCURACY if {task.kind for task in tasks.values()} <= {CLASSIFICATION} else SCORE


def validation_recall(
    model: nn.Module,
    batches: Callable[[], Iterator[Batch]],
    pairs: Pairs,
    gather: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach,
) -> dict[str, float]:
    """How many images find a text of theirs first, and texts an image: what model selection reads without labels.

    Args:
        model: ``Batch -> Outputs`` with embeddings "image" and "text".
        batches: makes the iterator over the split, or over one rank's share of each batch.
        pairs: of the split's rows.
        gather: joins the rows of all ranks.

    Returns:
        ``valid/DIRECTION_recall@K`` and ``valid/recall@1``, the mean of both directions, in [0, 1].
    """
    device = next(model.parameters(), torch.empty(0)).device
    parts: dict[str, list[NDArray[np.float32]]] = {modality: [] for modality in pairs.first_rows}
    with evaluating(model):
        for batch in (batch.to(device) for batch in batches()):
            said = model(batch).embeddings
            for name, rows in parts.items():
                rows.append(gather(said[name]).float().cpu().numpy())
    found = scores({name: np.concatenate(rows) for name, rows in parts.items()}, pairs)
    logged = {f"valid/{direction}_{name}": share for direction, each in found.items() for name, share in each.items()}
    return {**logged, RECALL: float(np.mean([each["recall@1"] for each in found.values()]))}


def clean_batches(loader: Batches, reads: str) -> Callable[[], Iterator[Batch]]:
    """Return a maker of iterators over one model's batches of an unshuffled loader."""
    return lambda: (batches[reads] for batches in loader.epoch(0))


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays as safetensors, atomically."""
    with atomic(path) as temporary:
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, temporary)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read what :func:`write_arrays` wrote."""
    return dict(load_file(path))


def subsets_of(modalities: Sequence[str]) -> list[str]:
    """The parts of several modalities, small ones first; of many modalities those of one and those that lack one."""
    sizes = range(1, len(modalities)) if len(modalities) <= ALL_SUBSETS else (1, len(modalities) - 1)
    return [AND.join(chosen) for size in sizes for chosen in combinations(modalities, size)]


def only(batch: Batch, *modalities: str) -> Batch:
    """The same rows with just some modalities present."""
    present = {name: mask if name in modalities else torch.zeros_like(mask) for name, mask in batch.present.items()}
    return batch._replace(present=present)
