"""What a stage is, and which of a run's stages are there already, in its folder or in another run's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import Recipe
from distill.contracts import Artifact
from distill.runs import find
from distill.workspace import Workspace


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: also its folder's.
        about: a few words for the plan.
        run: writes the stage's folder and returns what the report should know.
        parents: stages whose artifacts it reads.
        config: the part of the recipe that its content depends on, as JSON values.
        version: raised when the stage's code changes what it writes.
        resumes: it can go on in a folder that a killed run left.
        together: all ranks of a launch share its work; the others are the first one's alone.
        mends: of a finished folder that was damaged it keeps the whole files, which it checks one by one. Training does
            not: its files are one result.
    """

    name: str
    about: str
    run: Callable[[Workspace, Path], dict[str, Any]]
    parents: tuple[str, ...]
    config: Callable[[Recipe], Any]
    version: int = 1
    resumes: bool = False
    together: bool = False
    mends: bool = False


@dataclass(frozen=True)
class Planned:
    """One line of a plan.

    Attributes:
        stage: the stage.
        key: its fingerprint.
        artifact: what is there already, if it is up to date.
        lender: folder of another run that has it, if this one has not.
    """

    stage: Stage
    key: str
    artifact: Artifact | None
    lender: Path | None = None

    @property
    def state(self) -> str:
        """What a plan says of it."""
        if self.artifact is not None:
            return "up to date"
        return "to copy" if self.lender else "to do"


def look_up(stage: Stage, key: str, folder: Path, others: Iterable[Path], *, fresh: bool) -> Planned:
    """Find a stage in a run's folder, or else in those of other runs.

    A fingerprint says all that a stage's content depends on, so one that another run has finished is the same.

    Args:
        stage: the stage.
        key: its fingerprint.
        folder: the run's.
        others: folders of other runs.
        fresh: it is to run in any case.
    """
    if fresh:
        return Planned(stage, key, None)
    artifact = find(folder / stage.name, stage.name, key)
    having = (run for run in others if artifact is None and find(run / stage.name, stage.name, key))
    return Planned(stage, key, artifact, next(having, None))
