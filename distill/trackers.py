"""Trackers: TensorBoard, wandb, mlflow or trackio are told how each training goes, through Accelerate's classes.

They are a copy for the eye: ``metrics.jsonl`` is the record, and a tracker that fails is left out with a warning.
A training that goes on after a stop goes on in the tracker's run, too.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

from distill.config import one_line
from distill.contracts import UserError
from distill.runs import read_json, write_json

DEFAULT = "tensorboard"
EVERY = 20  # steps; a record of a TensorBoard waits for its file
RUN_FILE = "run.json"

Note = Callable[[int, Mapping[str, float]], None]
"""Takes a step (of the whole training, from 1) and values by name."""
Tracking = Callable[[int], AbstractContextManager[Note]]
"""Takes the step from which training starts or goes on; what it gives is told of the steps behind it."""

log = logging.getLogger(__name__)


def untracked(step: int) -> AbstractContextManager[Note]:
    """A :data:`Tracking` that tells nobody."""
    return nullcontext(lambda step, values: None)


def check_trackers(names: Sequence[str], *, asked_for: bool) -> None:
    """Check that trackers are installed, without importing them.

    Args:
        names: those of the recipe, which are also those of the packages.
        asked_for: the recipe names them; a default that is not installed is worth a warning alone.

    Raises:
        UserError: one is not installed.
    """
    for name in names:
        if util.find_spec(name) is None:
            what = f"trackers: {name} is not installed"
            if asked_for:
                extra = name if name == DEFAULT else "'multidistill[trackers]'"
                raise UserError(f"{what}; pip install {extra}, or take it out of trackers")
            log.warning("%s, so training is recorded in metrics.jsonl alone", what)


@dataclass
class Trackers:
    """The trackers of a run; one that has failed once is not asked again.

    Attributes:
        names: which; a rank that does not write has none.
        folder: where runs are noted, and TensorBoard and wandb keep their files, a folder for each training. It lies
            outside of the stages' folders, which manifests describe.
        project: under what they list the trainings.
    """

    names: list[str]
    folder: Path
    project: str

    def __post_init__(self) -> None:
        """Ask a tracker once that is named twice: two of a kind would write over each other."""
        self.names = list(dict.fromkeys(self.names))

    def of(self, training: str, key: str, settings: Mapping[str, Any]) -> Tracking:
        """Return what tells the trackers about one training.

        Args:
            training: its name; that of the run in the tracker.
            key: fingerprint of its stage. A training of another key is another run.
            settings: shown beside the curves.
        """

        @contextmanager
        def tracking(step: int) -> Iterator[Note]:
            opened: dict[str, Any] = {}
            for name in [name for name in self.names if util.find_spec(name) is not None]:
                self._try(opened, name, partial(self._open, opened, name, training, key, step, settings))

            def tell(step: int, values: Mapping[str, float]) -> None:
                named = {re.sub(r"[^\w./: -]", "_", name): value for name, value in values.items()}  # as MLflow wants
                for name, tracker in list(opened.items()):
                    self._try(opened, name, partial(tracker.log, named, step=step))

            try:
                yield tell
            finally:
                for name, tracker in list(opened.items()):
                    self._try(opened, name, tracker.finish)

        return tracking

    def _open(
        self, opened: dict[str, Any], name: str, training: str, key: str, step: int, settings: Mapping[str, Any]
    ) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        folder = self.folder / training
        run = None if step == 0 else _noted_run(folder, name, key)
        begins = run is None  # also where a training goes on that this tracker was not told of
        if run is None:
            run = _new_run(folder, name, key)
        tracker = LOGGER_TYPE_TO_CLASS[name](**_arguments(name, self.project, training, folder, run, step))
        tracker.start()
        if name == "mlflow":  # it makes the id itself
            run["id"] = tracker.tracker.info.run_id
        write_json(folder / name / RUN_FILE, run)
        if begins and name != "tensorboard":  # which would show them as a run of their own
            tracker.store_init_configuration(dict(settings))
        opened[name] = tracker

    def _try(self, opened: dict[str, Any], name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker does, training goes on
            log.warning("tracker %s failed and is left out from here on: %s", name, one_line(error))
            self.names.remove(name)
            opened.pop(name, None)


def _noted_run(folder: Path, name: str, key: str) -> dict[str, Any] | None:
    """The run in which a training goes on, if there is one."""
    file = folder / name / RUN_FILE
    run: dict[str, Any] | None = read_json(file) if file.is_file() else None
    return run if run is not None and run["key"] == key else None


def _new_run(folder: Path, name: str, key: str) -> dict[str, Any]:
    """A run whose files replace those of the one before."""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    return {"key": key, "id": None if name == "mlflow" else uuid.uuid4().hex}


def _arguments(
    name: str, project: str, training: str, folder: Path, run: Mapping[str, Any], step: int
) -> dict[str, Any]:
    """What the tracker's class in Accelerate is given."""
    place = folder / name
    if name == "tensorboard":  # a stopped run may have recorded steps that are made again
        return {"run_name": name, "logging_dir": folder, "purge_step": step + 1 if step else None}
    if name == "mlflow":
        return {"experiment_name": project, "run_name": training, "run_id": run["id"]}
    if name == "trackio":
        return {"run_name": project, "name": f"{training}-{run['id'][:8]}", "resume": "allow"}
    return {"run_name": project, "name": training, "id": run["id"], "resume": "allow", "dir": str(place)}
