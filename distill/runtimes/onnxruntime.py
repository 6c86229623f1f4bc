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

CPU = "cpu"
_CPU, _CUDA, _TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
PROVIDERS = {CPU: (_CPU,), "cuda": (_CUDA, _CPU), "tensorrt": (_TENSORRT, _CUDA, _CPU)}
"""Name -> onnxruntime's execution providers: the one that is asked for, and those for operators that it lacks."""
DEVICES = {CPU: "CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}


def check_provider(provider: str) -> None:
    """Check that this onnxruntime was built with a provider.

    Raises:
        UserError: it was not, or there is no such provider.
    """
    if provider not in PROVIDERS:
        raise UserError(f"there is no provider {provider!r}; the providers are {', '.join(PROVIDERS)}")
    if PROVIDERS[provider][0] not in ort.get_available_providers():
        raise UserError(
            f"provider {provider!r}: onnxruntime {ort.__version__} has no {PROVIDERS[provider][0]} here (it has "
            f"{', '.join(ort.get_available_providers())}); pip install onnxruntime-gpu in the place of onnxruntime, or "
            "leave the provider out"
        )


def open_session(path: str | Path, threads: int = 1, provider: str = CPU) -> ort.InferenceSession:
    """Load an ONNX file; prediction and benchmarks share these settings.

    Args:
        path: the file.
        threads: threads inside an operator on the CPU; operators run one after the other.
        provider: one of :data:`PROVIDERS`. Operators that it lacks run on the next of them, as onnxruntime decides, but
            a provider that does not load at all is refused.

    Raises:
        UserError: the file is missing, has weights in other files, or the runtime cannot load it; or the provider is
            not there or did not load.
    """
    check_provider(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors; the runtime warns about every constant that it folds
    if not Path(path).is_file():
        raise UserError(f"no model file {path}; give an ONNX file or a bundle made by `distill export`")
    check_one_file(Path(path))
    try:
        session = ort.InferenceSession(str(path), options, providers=list(PROVIDERS[provider]))
    except Exception as error:  # the runtime's exceptions share no base class of their own
        raise UserError(f"{path}: onnxruntime {ort.__version__} cannot load it: {one_line(error)}") from error
    if PROVIDERS[provider][0] not in session.get_providers():  # it goes on without one that fails
        raise UserError(
            f"provider {provider!r}: onnxruntime {ort.__version__} could not load {PROVIDERS[provider][0]} and would "
            f"run on {session.get_providers()[0]}; install the NVIDIA driver and the CUDA, cuDNN and TensorRT "
            "libraries that this onnxruntime-gpu was built for"
        )
    session.disable_fallback()  # else a failing run would go on with other providers
    return session


class OnnxRuntime(Runtime):
    """An ONNX file with dynamic rows and text length."""

    files, extra, package, modules = ("model.onnx",), None, "onnxruntime", ("onnxruntime",)

    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1, provider: str = CPU) -> None:
        """Open a file, which itself says its inputs and outputs; see :class:`Runtime` and :func:`open_session`."""
        self.session, self.threads, self.version = open_session(path, threads, provider), threads, ort.__version__
        self.device = DEVICES[provider]
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """See :meth:`Runtime.run`."""
        values = self.session.run(None, {name: feeds[name] for name in self.inputs})
        return dict(zip(self.outputs, values, strict=True))
