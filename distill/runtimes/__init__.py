"""The runtimes that a bundle may be for. Loading these files imports none of their packages but onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill.contracts import UserError
from distill.runtimes.base import Runtime, Tensors
from distill.runtimes.coreml import CoreMl
from distill.runtimes.executorch import ExecuTorch
from distill.runtimes.litert import LiteRT
from distill.runtimes.onnxruntime import CPU, OnnxRuntime
from distill.runtimes.openvino import OpenVino

RUNTIMES: dict[str, type[Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "executorch": ExecuTorch,
    "litert": LiteRT,
    "coreml": CoreMl,
}
"""What ``bundle.json`` calls a runtime -> the class that opens its files."""

__all__ = ["CPU", "RUNTIMES", "Runtime", "open_model"]


def open_model(
    runtime: str, path: Path, graph: Mapping[str, Tensors], threads: int = 1, provider: str = CPU
) -> Runtime:
    """Open a model on its runtime.

    Args:
        runtime: one of :data:`RUNTIMES`.
        path: the first of the model's files.
        graph: ``inputs`` and ``outputs`` as ``bundle.json`` describes them.
        threads: threads inside an operator.
        provider: of onnxruntime; see :func:`~distill.runtimes.onnxruntime.open_session`.

    Raises:
        UserError: as the runtime's class, or another runtime is asked for a provider.
    """
    chosen = RUNTIMES[runtime]
    if provider == CPU:
        return chosen(path, graph, threads)
    if not issubclass(chosen, OnnxRuntime):
        raise UserError(
            f"provider {provider!r}: providers are onnxruntime's, and this bundle is for {runtime}; give an ONNX "
            "bundle such as onnx-fp32, or leave the provider out"
        )
    return chosen(path, graph, threads, provider)
