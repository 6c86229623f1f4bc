"""What passes between the parts: a batch, a model's outputs, a finished stage, a user's mistake.

This module imports no torch, so that every file may import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100
"""Label of a row whose integer target is missing; a missing float target is NaN."""

TRAIN, VALID, TEST = SPLITS = ("train", "valid", "test")

AND = "+"
"""Between the names of modalities that are read together, as in "image+text"."""

CLEAN_VIEW = -1
"""The view that is not augmented: evaluation, calibration and export read it."""


INPUTS = {
    "image": "uint8 [B, 3, H, W]",
    "text": "int64 [B, L] token ids",
    "text_mask": "bool [B, L], True where there is a token",
    "audio": "int16 [B, S], one channel at the data's sampling rate, zeros behind its end",
    "audio_length": "int64 [B], samples that are there: 0 to S",
    "video": "uint8 [B, F, 3, H, W], frames evenly spread over the clip",
    "series": "float32 [B, T, C], zeros behind its end",
    "series_length": "int64 [B], steps that are there: 0 to T",
    "tabular": "float32 [B, 2 N + K]: N standardised numbers, 0 where missing; N flags, 1 where missing; K codes of "
    "categories, whole numbers from 0, which is a missing or unknown one",
}
"""The inputs of models: those of a modality begin with its name. Rows that lack it hold zeros."""


SHARE = "share"


class Batch(NamedTuple):
    """One model's inputs for the same rows and views that every other model of the run sees.

    Dicts are empty, never ``None``, where there is nothing: so a batch survives collation, device placement
    and ``torch.export``. An input may end before the batch does; the rows behind it lack its modality.
    """

    ids: Tensor  # int64 [B], stable row ids
    views: Tensor  # int64 [B], augmentation view: the epoch when live, epoch mod K when cached, -1 = clean
    inputs: dict[str, Tensor]  # as INPUTS says
    present: dict[str, Tensor]  # modality -> bool [B]
    targets: dict[str, Tensor]  # task -> int64 [B] class labels, IGNORE where missing, or as distill.targets says
    # of rows with others' images mixed in: SHARE -> float32 [B], their own, the same in all; "target.TASK" -> [B, ...],
    # what targets the others have
    mixed: dict[str, Tensor] = {}  # noqa: RUF012 - never written to

    def inputs_of(self, modality: str) -> dict[str, Tensor]:
        """Return the inputs of one modality, in the order of their names."""
        names = sorted(key for key in self.inputs if key == modality or key.startswith(f"{modality}_"))
        return {name: self.inputs[name] for name in names}

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; itself when it is there already."""
        return self if self.ids.device == device else Batch(*(_moved(value, device) for value in self))


class Outputs(NamedTuple):
    """What a model says about a batch: a live teacher, a teacher cache and a student all return it."""

    logits: dict[str, Tensor]  # task -> [B, C], of captions [B, L, V]; "task.image" etc.: heads of single modalities
    embeddings: dict[str, Tensor]  # "image", "text", "fused" -> [B, D]
    features: dict[str, Tensor]  # tap (module path) -> any shape, rows first

    def to(self, device: torch.device) -> Outputs:
        """Return the outputs on a device; themselves when they are there already."""
        there = all(tensor.device == device for part in self for tensor in part.values())
        return self if there else Outputs(*(_moved(part, device) for part in self))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return value.to(device, non_blocking=True)


class UserError(ValueError):
    """Something the user can mend: one sentence saying what, where, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


@dataclass(frozen=True)
class Artifact:
    """A finished stage: a folder whose ``manifest.json`` was written last.

    Attributes:
        stage: the stage's name.
        path: the folder.
        fingerprint: hash of everything that the content depends on.
        info: what the stage wants later stages and the report to know (JSON values only).
    """

    stage: str
    path: Path
    fingerprint: str
    info: dict[str, Any] = field(default_factory=dict)
