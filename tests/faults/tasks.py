"""What the children of the fork server do."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch

from distill import checkpoint, engine, evaluate, pipeline, report, results  # noqa: F401 (children need them)
from distill.build import example_batch, input_spec
from distill.cli import main
from distill.config import TrainConfig
from distill.contracts import Batch, Outputs
from distill.data.prepare import PreparedData, prepare
from distill.data_config import DataConfig
from distill.export.onnx import export_onnx

KILL_EPOCHS = 5


def warm_up() -> None:
    """Do once what is slow the first time, and starts no thread: imports, and the export of a graph."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = {"type": "table", "path": "rows.csv"}
        modalities = {"image": "image", "text": "text"}
        data = DataConfig(source=source, modalities=modalities, working_size=tiny.SIZE)
        bert = tiny.write_bert(Path(folder))
        model = tiny.make_model(bert / "tokenizer.json").eval()
        export_onnx(model, example_batch(input_spec(model), data), Path(folder) / "a.onnx", opset=18)


def distill(arguments: Sequence[str], at: float = 0.0) -> None:
    """The command line, from a moment of ``time.time()`` on."""
    while time.time() < at:
        pass
    main(arguments)


def distill_offline(arguments: Sequence[str]) -> None:
    """The command line where no socket can be connected and no name looked up; prints each try."""

    def refuse(*address: Any, **options: Any) -> Any:
        print(f"NETWORK {address}", flush=True)
        raise OSError("no network in this test")

    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.socket.connect_ex = refuse  # type: ignore[method-assign]
    socket.getaddrinfo = refuse
    main(arguments)


def train(data: str, tokenizer: str, folder: str, log: str, die: Sequence[int] | None = None) -> None:
    """Train a small model with a checkpoint after each step; ``log`` gets a line a batch and two a save.

    Args:
        data: prepared data.
        tokenizer: ``tokenizer.json``.
        folder: the run's; a checkpoint in it is gone on from.
        log: file that lines are appended to.
        die: (save, touch): kill this process inside that save, at that touch of the disk.
    """
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(line: str) -> None:
        os.write(handle, f"{line}\n".encode())

    def note_rows(batches: dict[str, Batch]) -> Outputs:
        """A teacher, which is asked about what is trained on; batches are made ahead."""
        note("rows " + " ".join(map(str, batches["student"].ids.tolist())))
        return Outputs({}, {}, {})

    file = Path(tokenizer)
    loader = tiny.make_loader(PreparedData.open(data), file)
    model = tiny.make_model(file, dropout=0.2, modality_dropout=0.2)
    tapped, objective = tiny.make_objective(model, tiny.LABELS, loader.at(0, 0)["student"])
    data = loader.data
    valid = tiny.make_loader(data, file, split="valid", shuffle=False, augment=None)
    budget = {"epochs": KILL_EPOCHS, "batch_size": 16, "lr": 0.02, "ema": 0.9, "checkpoint_minutes": 1e-9}
    _announce_saves(note, die)
    engine.fit(
        engine.Job(
            tapped=tapped,
            objective=objective,
            loader=loader,
            reads="student",
            config=TrainConfig.model_validate(budget),
            folder=Path(folder),
            seed=0,
            validate=partial(
                evaluate.validation_scores, batches=evaluate.clean_batches(valid, "student"), tasks=data.tasks
            ),
            teacher=note_rows,
        )
    )


def _announce_saves(note: Callable[[str], None], die: Sequence[int] | None) -> None:
    save, write, saves, touches = checkpoint.save, checkpoint._write, [0], [0]

    def announced(*arguments: Any) -> None:
        note("save")
        saves[0], touches[0] = saves[0] + 1, 0
        save(*arguments)
        note("saved")

    def touched() -> bool:
        touches[0] += 1
        return die is not None and [saves[0], touches[0]] == list(die)

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(path: Path, data: bytes) -> None:
        if touched():
            path.write_bytes(data[: len(data) // 2])
            kill()
        write(path, data)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **options: Any) -> Any:
            if touched():
                kill()
            return function(*arguments, **options)

        return inner

    checkpoint.save, checkpoint._write = announced, half
    Path.rename, shutil.rmtree = before(Path.rename), before(shutil.rmtree)  # type: ignore[method-assign]


def prepare_data(config: dict[str, Any], folder: str, base: str) -> None:
    """Prepare data; print as JSON what it found and by how many bytes the peak of memory rose."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = prepare(DataConfig.model_validate(config), Path(folder), Path(base))
    risen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({**found, "peak_rise_bytes": risen * 1024}))
