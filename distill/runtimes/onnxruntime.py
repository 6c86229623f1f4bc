"""ONNX files on onnxruntime, which every installation has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from distill.contracts import UserError
from distill.onnx_file import check_one_file
from distill.runtimes.base import Runtime, Tensors, one_line


def open_session(path: str | Path, threads: int = 1) -> ort.InferenceSession:
    """Load an ONNX file on the CPU; prediction and benchmarks share these settings.

    Args:
        path: the file.
        threads: threads inside an operator; operators run one after the other.

    Raises:
        UserError: the file is missing, has weights in other files, or the runtime cannot load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors; the runtime warns about every constant that it folds
    if not Path(path).is_file():
        raise UserError(f"no model file {path}; give an ONNX file or a bundle made by `distill export`")
    check_one_file(Path(path))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class of their own
        raise UserError(f"{path}: onnxruntime {ort.__version__} cannot load it: {one_line(error)}") from error


class OnnxRuntime(Runtime):
    """An ONNX file with dynamic rows and text length."""

    files, extra, package, modules = ("model.onnx",), None, "onnxruntime", ("onnxruntime",)

    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1) -> None:
        """Open a file, which itself says its inputs and outputs; see :class:`Runtime`."""
        self.session, self.threads, self.version = open_session(path, threads), threads, ort.__version__
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """See :meth:`Runtime.run`."""
        values = self.session.run(None, {name: feeds[name] for name in self.inputs})
        return dict(zip(self.outputs, values, strict=True))
