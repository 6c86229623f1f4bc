"""A runtime that every machine has, in ExecuTorch's place: programs of one row, run by torch as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill import bench, bundles
from distill.export.torch_program import read_program
from distill.runtimes import RUNTIMES
from distill.runtimes.base import RowByRow, Tensors

NAME = "executorch"


class StandIn(RowByRow):
    """A program of one row."""

    files, extra, package, needs_torch, modules = ("model.pte",), NAME, "torch", True, ("torch",)

    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1) -> None:
        super().__init__(graph, threads)
        self.version = torch.__version__
        self.call = read_program(path)[0].module()

    def _row(self, values: list[NDArray[Any]]) -> list[NDArray[Any]]:
        with torch.no_grad():
            return [value.numpy() for value in self.call(*[torch.from_numpy(value) for value in values])]


def convert(
    runtime: str,
    source: Path,
    folder: Path,
    *,
    feeds: Iterable[Mapping[str, NDArray[Any]]] | None = None,
    dynamic: bool = False,
    learnt: object = None,
    keep_float: Sequence[str] = (),
    precision: str = "fp32",
    report: object = None,
) -> dict[str, Any]:
    """As the exporters do, without lowering; ``feeds`` are read, and their names and lengths returned."""
    shutil.copyfile(source, folder / "model.pte")
    read = [{name: list(value.shape) for name, value in batch.items()} for batch in feeds or ()]
    _, graph = read_program(source)
    return {**graph, "bytes": (folder / "model.pte").stat().st_size, "calibrated": read, "kept": list(keep_float)}


@contextmanager
def installed() -> Iterator[pytest.MonkeyPatch]:
    """The stand-in, for this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNTIMES, NAME, StandIn)
        patch.setattr(bundles, "convert", convert)
        patch.setattr(bundles, "missing_packages", lambda runtime: [])
        patch.setattr(bench, "peak_memory", lambda model, threads: 1_000_000)  # a process of its own lacks it
        yield patch


def close(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    """All logits and embeddings are the same, but for rounding."""
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-4, err_msg=name)
