"""OpenVINO's own format on Intel and ARM processors; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.runtimes.base import Runtime, Tensors, by_length, checked, missing, refused

BF16 = "bf16"
RECURRENT = "Sequence"
"""Ends the names of recurrent operators."""


class OpenVino(Runtime):
    """An OpenVINO model with dynamic rows and text length.

    Its recurrent operators read padding where the length is dynamic (seen in 2026.4: states of padded rows are wrong),
    so rows of models that have some are run by the length of their text.
    """

    files, extra, package, modules = ("model.xml", "model.bin"), "openvino", "openvino", ("openvino",)

    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1) -> None:
        """Open a model for its latency, in float32 wherever it is not quantized; see :class:`Runtime`.

        Bundles in bf16 compute in bfloat16 where the processor has it, and in float32 elsewhere; ``device`` says which.
        """
        try:
            import openvino
        except ImportError as error:
            raise missing(type(self), error) from error
        self.tensors, self.threads, self.version = graph["inputs"], threads, metadata.version(self.package)
        self.inputs, self.outputs = list(graph["inputs"]), list(graph["outputs"])
        core = openvino.Core()
        half = graph.get("info", {}).get("precision") == BF16
        has = half and BF16.upper() in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if half:
            self.device = "CPU in bfloat16" if has else "CPU in float32, as it has no bfloat16"
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": BF16 if has else "f32",  # processors with bfloat16 would use that for all
        }
        try:
            model = core.read_model(str(path))
            self.request = core.compile_model(model, "CPU", settings).create_infer_request()
        except RuntimeError as error:
            raise refused(path, self, error) from error
        self.recurrent = is_recurrent(model)

    @classmethod
    def start(cls) -> None:
        """Load the plugin for the CPU too; see :meth:`Runtime.start`."""
        super().start()
        import openvino

        openvino.Core().get_versions("CPU")

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """See :meth:`Runtime.run`."""
        arrays = checked(self.tensors, feeds)
        if not (self.recurrent and "text_mask" in arrays):
            return self._infer(arrays)
        parts = [(rows, self._infer(part)) for rows, part in by_length(arrays)]
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        return {name: np.concatenate([found[name] for _, found in parts])[order] for name in self.outputs}

    def _infer(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        found = self.request.infer(arrays)
        return {name: found[name] for name in self.outputs}


def is_recurrent(model: Any) -> bool:
    """Whether an OpenVINO model has recurrent operators."""
    return any(node.get_type_name().endswith(RECURRENT) for node in model.get_ops())
