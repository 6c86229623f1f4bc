"""ExecuTorch's programs; its Python package needs torch, its C++, Android and iOS runtimes do not."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.runtimes.base import RowByRow, Tensors, missing, refused


class ExecuTorch(RowByRow):
    """A program of one row, whose convolutions and products run on XNNPACK."""

    files, extra, package, needs_torch = ("model.pte",), "executorch", "executorch", True
    modules = (
        "executorch.kernels.quantized",  # registers operators
        "executorch.extension.pybindings.portable_lib",
        "executorch.runtime",
    )

    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1) -> None:
        """Open a program; the number of threads is the process's, and is set. See :class:`Runtime`.

        A program keeps the threads that it was loaded with: those of another number must not run any more.
        """
        try:
            self.start()
            from executorch.extension.pybindings.portable_lib import (
                _threadpool_get_thread_count,
                _unsafe_reset_threadpool,
            )
            from executorch.runtime import Runtime as Loader
        except ImportError as error:
            raise missing(type(self), error) from error
        super().__init__(graph, threads)
        self.version = metadata.version(self.package)
        if _threadpool_get_thread_count() != threads:  # a reset ends the threads of programs that are loaded
            _unsafe_reset_threadpool(threads)
        try:
            self.method = Loader.get().load_program(path).load_method("forward")
        except RuntimeError as error:
            raise refused(path, self, error) from error

    def _row(self, values: list[NDArray[Any]]) -> list[NDArray[Any]]:
        import torch

        found = self.method.execute([torch.from_numpy(np.ascontiguousarray(value)) for value in values])
        return [value.numpy().copy() for value in found]  # the program writes its next outputs to the same memory
