"""What a stage is, which of a run's stages are there already, what work a run would replace, and how a stage is run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.config import Recipe
from distill.contracts import Artifact, UserError
from distill.ranks import Ranks
from distill.report.formats import seconds as duration
from distill.resources import cpu_seconds
from distill.runs import copy_stage, discard, find, fingerprint, finish, left_there, start
from distill.workspace import Workspace

PRECIOUS = 600
"""Seconds: work that took longer is not replaced unasked."""
MOST_NAMED = 4  # changes in one sentence


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: also its folder's.
        about: a few words for the plan.
        run: writes the stage's folder and returns what the report should know.
        parents: stages whose artifacts it reads.
        config: the part of the recipe that its content depends on, as JSON values by name.
        version: raised when the stage's code changes what it writes.
        resumes: it can go on in a folder that a killed run left.
        together: all ranks of a launch share its work; the others are the first one's alone.
        wanted: whether a recipe has it; where not, nothing depends on it.
        mends: of a finished folder that was damaged it keeps the whole files, which it checks one by one. Training does
            not: its files are one result.
    """

    name: str
    about: str
    run: Callable[[Workspace, Path], dict[str, Any]]
    parents: tuple[str, ...]
    config: Callable[[Recipe], dict[str, Any]]
    version: int = 1
    resumes: bool = False
    together: bool = False
    mends: bool = False
    wanted: Callable[[Recipe], bool] = lambda recipe: True


@dataclass(frozen=True)
class Planned:
    """One line of a plan.

    Attributes:
        stage: the stage.
        key: its fingerprint.
        made_of: what that is of: the version of the stage, its ``parents`` and its part of the recipe, as JSON values.
        artifact: what is there already, if it is up to date.
        lender: folder of another run that has it, if this one has not.
        changed: what the work that lies there was made with, where that was something else: dotted names.
        replaced: how many seconds that work took.
    """

    stage: Stage
    key: str
    made_of: dict[str, Any]
    artifact: Artifact | None = None
    lender: Path | None = None
    changed: tuple[str, ...] = ()
    replaced: float = 0.0

    @property
    def state(self) -> str:
        """What a plan says of it."""
        if self.artifact is not None:
            return "up to date"
        return "to copy" if self.lender else "to do"

    @property
    def about(self) -> str:
        """What the stage does, and why it does it again."""
        return f"{self.stage.about}; {_other(self.changed)}" if self.changed else self.stage.about


def make_plan(
    recipe: Recipe, stages: Iterable[Stage], folder: Path, others: Sequence[Path], fresh: Collection[str], ranks: Ranks
) -> list[Planned]:
    """Find out which stages of a run are there already. The first rank reads the files, and tells the others.

    Args:
        recipe: the validated recipe.
        stages: in order, with all that they need.
        folder: the run's.
        others: folders of other runs, whose stages are copied where they are the same.
        fresh: names of stages that run in any case.
        ranks: who plans together.

    Raises:
        UserError: the folder is not shared by all ranks.
    """
    planned: dict[str, Planned] = {}
    for stage in stages:
        parents = {parent: planned[parent].key for parent in stage.parents if parent in planned}
        made_of = json.loads(json.dumps({"stage version": stage.version, "parents": parents, **stage.config(recipe)}))
        planned[stage.name] = Planned(stage, fingerprint(stage.name, made_of), made_of)
    if ranks.first:
        for name, item in planned.items():
            planned[name] = item if name in fresh else _look_up(item, planned, folder, others)
    if ranks.count > 1:
        _share(planned, folder, ranks)
    return list(planned.values())


def refuse_loss(planned: Iterable[Planned], folder: Path) -> None:
    """Stop before a run replaces long work that was made with other settings.

    Raises:
        UserError: there is such work; what changed and both ways on are named.
    """
    precious = [item for item in planned if item.artifact is None and item.replaced > PRECIOUS]
    if precious:
        found = ", ".join(f"{item.stage.name} ({duration(item.replaced)} of work)" for item in precious)
        force = " ".join(f"--force {item.stage.name}" for item in precious)
        raise UserError(
            f"{folder} holds {found} that this run would replace, as {_other(precious[0].changed)}; "
            f"choose another name=... to keep it, or replace it with {force}"
        )


def descendants(names: Iterable[str], stages: Sequence[Stage]) -> list[str]:
    """These stages and all of a run's that read their artifacts, directly or not, in order."""
    found = set(names)
    for stage in stages:
        if found.intersection(stage.parents):
            found.add(stage.name)
    return [stage.name for stage in stages if stage.name in found]


def discard_again(folder: Path, names: Iterable[str], planned: Iterable[Planned]) -> None:
    """Let go of what is to run again, and of what earlier runs made from it; what they made otherwise stays.

    Args:
        folder: the run's.
        names: the stages that are forced, with all that read them, in order.
        planned: what the run does.
    """
    keys = {item.stage.name: item.key for item in planned}
    gone: set[str] = set()
    for name in names:
        key, made_of, _ = left_there(folder / name)
        parents = made_of["parents"].values() if isinstance(made_of, dict) else ()
        if name in keys or gone.intersection(parents):
            gone.add(keys.get(name, key))
            discard(folder / name)


def copy_planned(item: Planned, ranks: Ranks, folder: Path) -> Artifact | None:
    """Copy a stage that another run has; None if that run has changed by now."""
    assert item.lender is not None
    name, key = item.stage.name, item.key
    copied = ranks.first and copy_stage(item.lender / name, folder, name, key)
    return find(folder, name, key, read=False) if ranks.largest([copied], ranks.device)[0] else None


def run_planned(item: Planned, work: Workspace, folder: Path) -> Artifact:
    """Run a stage in its folder, and finish it."""
    stage, ranks = item.stage, work.ranks
    if ranks.first:
        start(folder, item.key, made_of=item.made_of, resume=stage.resumes, mend=stage.mends)
    ranks.wait()
    work.done[stage.name] = Artifact(stage.name, folder, item.key)
    wall, cpu = time.monotonic(), cpu_seconds()
    info = stage.run(work, folder) if stage.together or ranks.first else {}
    cost = {"seconds": time.monotonic() - wall, "cpu_seconds": cpu_seconds() - cpu}
    ranks.wait()
    if ranks.first:
        finish(folder, stage.name, item.key, {**info, "cost": cost})
    ranks.wait()
    found = find(folder, stage.name, item.key, read=False)
    assert found is not None, f"{folder} is not shared by all ranks"
    return found


def _look_up(item: Planned, planned: dict[str, Planned], folder: Path, others: Iterable[Path]) -> Planned:
    """Find a stage in a run's folder, or else in those of other runs.

    A fingerprint says all that a stage's content depends on, so one that another run has finished is the same.
    """
    name, key = item.stage.name, item.key
    artifact = find(folder / name, name, key)
    if artifact is not None:
        return replace(item, artifact=artifact)
    lender = next((run for run in others if find(run / name, name, key)), None)
    there, made_of, seconds = left_there(folder / name)
    if there in ("", key):
        return replace(item, lender=lender)
    before = made_of if isinstance(made_of, dict) else {}  # empty where an earlier version was at work
    changed = [
        what for parent in item.made_of["parents"] for what in planned[parent].changed or _key(before, item, parent)
    ]
    changed += _changes(before | {"parents": {}}, item.made_of | {"parents": {}}) if before else []
    return replace(item, lender=lender, changed=tuple(dict.fromkeys(changed)) or ("stage version",), replaced=seconds)


def _key(before: dict[str, Any], item: Planned, parent: str) -> list[str]:
    """The parent's name, if it is another one than before."""
    known = before.get("parents", {}).get(parent)
    return [] if known in (None, item.made_of["parents"][parent]) else [parent]


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted names of what differs, of what only one of them has if nothing else does."""
    differing = [name for name in old if name in new and old[name] != new[name]]
    found = []
    for name in differing or [name for name in (*old, *new) if (name in old) != (name in new)]:
        before, after = old.get(name), new.get(name)
        deeper = _changes(before, after) if isinstance(before, dict) and isinstance(after, dict) else [""]
        found += [f"{name}.{what}" if what else name for what in deeper]
    return found


def _other(changed: Sequence[str]) -> str:
    more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
    return f"what lies there was made with another {', '.join(changed[:MOST_NAMED])}{more}"


def _share(planned: dict[str, Planned], folder: Path, ranks: Ranks) -> None:
    """Tell all ranks what the first one has found; in place."""
    told = {
        name: [item.key, item.artifact is not None, str(item.lender or ""), item.changed, item.replaced]
        for name, item in planned.items()
    }
    data = json.dumps(told).encode() if ranks.first else b""
    found = json.loads(ranks.gather_bytes(data, ranks.device)[0])
    if ranks.first:
        return
    for name, (key, there, lender, changed, seconds) in found.items():
        item = planned[name]
        if item.key != key:
            raise UserError(f"{name}: the files that the recipe names differ between machines; share one copy of them")
        artifact = find(folder / name, name, item.key, read=False) if there else None
        if there and artifact is None:
            raise UserError(f"{folder / name} is not seen by all ranks; set output to a folder that all machines share")
        lends = Path(lender) if lender else None
        planned[name] = replace(item, artifact=artifact, lender=lends, changed=tuple(changed), replaced=seconds)
