"""The runtimes that a bundle may be for. Loading these files imports none of their packages but onnxruntime."""

from __future__ import annotations

from distill.runtimes.base import Runtime
from distill.runtimes.coreml import CoreMl
from distill.runtimes.executorch import ExecuTorch
from distill.runtimes.litert import LiteRT
from distill.runtimes.onnxruntime import OnnxRuntime
from distill.runtimes.openvino import OpenVino

RUNTIMES: dict[str, type[Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "executorch": ExecuTorch,
    "litert": LiteRT,
    "coreml": CoreMl,
}
"""What ``bundle.json`` calls a runtime -> the class that opens its files."""

__all__ = ["RUNTIMES", "Runtime"]
