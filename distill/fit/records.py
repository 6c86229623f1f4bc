"""The trials of a search, one line of JSON each as soon as it has ended: a killed search goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from distill.config import Recipe
from distill.contracts import UserError
from distill.fit.budget import Figures

TRIALS_FILE = "trials.jsonl"


@dataclass(frozen=True)
class Trial:
    """How a choice ended.

    Attributes:
        number: from 1 on, in the order of asking; 0 is the recipe itself.
        values: path -> choice.
        state: "outside" was dropped before its training, "short" was trained with a share of the epochs, "full" with
            all or more, "failed" could not be made.
        share: of the epochs.
        figures: of its bundle, untrained where it was dropped; None where it failed.
        retention: of each task.
        why: it was dropped or failed.
        changes: what of the values is not the recipe's.
        seconds: it took.
    """

    number: int
    values: dict[str, Any]
    state: Literal["outside", "short", "full", "failed"]
    share: float
    figures: Figures | None
    retention: dict[str, float] = field(default_factory=dict)
    why: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def said(self) -> str:
        """The trial in a line."""
        chosen = ", ".join(f"{path} {value}" for path, value in self.changes.items())
        figures = self.figures.said if self.figures else ""
        ended = {"outside": f"{figures}: {self.why}", "failed": f"failed: {self.why}"}.get(self.state, figures)
        return f"trial {self.number} ({chosen}): {ended} ({self.seconds:.0f} s)"

    def as_json(self) -> dict[str, Any]:
        """The trial as JSON values."""
        return {**asdict(self), "figures": self.figures._asdict() if self.figures else None}


def key_of(values: Mapping[str, Any]) -> str:
    """The same text for the same choice."""
    return json.dumps(values, sort_keys=True)


class Records:
    """The trials of a search in a folder.

    Attributes:
        search: what the search is of; its yardstick too, from the first measurement on.
        trials: choice -> how it ended.
    """

    def __init__(self, folder: Path, search: Mapping[str, Any]) -> None:
        """Read what an earlier call has left; a line that a kill has cut short does not count.

        Raises:
            UserError: the folder holds another search.
        """
        self._file = folder / TRIALS_FILE
        self.trials: dict[str, Trial] = {}
        self.yardstick_ms: float | None = None
        self._search = json.loads(json.dumps(search))
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        whole = [line for line in lines if _is_json(line)]
        if whole:
            before = json.loads(whole[0])
            searched = _filled(before["search"])
            other = [name for name, value in self._search.items() if searched.get(name) != value]
            if other:
                raise UserError(
                    f"{folder} holds a search with another {' and '.join(other)}; choose another --output, or delete it"
                )
            self.yardstick_ms = before["yardstick_ms"]
        for line in whole[1:]:
            entry = json.loads(line)
            figures = None if entry["figures"] is None else Figures(**entry["figures"])
            self.trials[key_of(entry["values"])] = Trial(**{**entry, "figures": figures})
        if len(whole) < len(lines):
            self._file.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def begin(self, yardstick_ms: float) -> None:
        """Write down what the search is of, unless an earlier call has."""
        if self.yardstick_ms is None:
            self.yardstick_ms = yardstick_ms
            self._append({"search": self._search, "yardstick_ms": yardstick_ms})

    def add(self, trial: Trial) -> Trial:
        """Keep a trial."""
        self.trials[key_of(trial.values)] = trial
        self._append(trial.as_json())
        return trial

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _filled(search: dict[str, Any]) -> dict[str, Any]:
    """What a search was of, with the defaults of keys that recipes did not have then."""
    try:
        return search | {"recipe": json.loads(Recipe(**search.get("recipe", {})).model_dump_json())}
    except ValidationError:
        return search


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
