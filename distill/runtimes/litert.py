"""LiteRT's (TensorFlow Lite's) flat files on phones and small boards; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.runtimes.base import RowByRow, Tensors, missing, refused


class LiteRT(RowByRow):
    """A model of one row, whose tensors have the exporter's own names and our order."""

    files, extra, package = ("model.tflite",), "litert", "ai-edge-litert"
    modules = ("ai_edge_litert.interpreter",)

    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1) -> None:
        """Open a model; see :class:`Runtime`."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise missing(type(self), error) from error
        super().__init__(graph, threads)
        self.version = metadata.version(self.package)
        try:
            self.call = Interpreter(str(path), num_threads=threads).get_signature_runner()
        except (RuntimeError, ValueError) as error:
            raise refused(path, self, error) from error
        self.dtypes = {name: value["dtype"] for name, value in self.call.get_input_details().items()}

    def _row(self, values: list[NDArray[Any]]) -> list[NDArray[Any]]:
        named = {f"args_{number}": value for number, value in enumerate(values)}
        found = self.call(**{name: value.astype(self.dtypes[name]) for name, value in named.items()})  # ids are int32
        return [np.asarray(found[f"output_{number}"]) for number in range(len(self.outputs))]
