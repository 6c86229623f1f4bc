"""Core ML packages on Macs, iPhones and iPads; written on any system, run here on macOS alone. Needs no torch."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.contracts import UserError
from distill.runtimes.base import RowByRow, Tensors, missing, one_line, refused

PACKAGE = "model.mlpackage"
MANIFEST, MODEL = f"{PACKAGE}/Manifest.json", f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"
ROOT, WEIGHTS_FOLDER = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
"""What a manifest names."""
OWN_WEIGHTS = "@model_path/weights/weight.bin"
"""How a program names the package's weights."""
MACOS = "darwin"


class CoreMl(RowByRow):
    """A program of one row, which Core ML puts on the CPU, the GPU and the Neural Engine as it chooses."""

    files, extra, package, modules = (MANIFEST, MODEL, WEIGHTS), "coreml", "coremltools", ("coremltools",)
    device = "CPU, GPU or Neural Engine as Core ML chooses"

    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1) -> None:
        """Open a package by its first file; how many threads it takes is Core ML's choice. See :class:`Runtime`."""
        super().__init__(graph, threads)
        if self.elsewhere():
            raise UserError(f"{path.parent}: {self.elsewhere()}; copy the bundle to a Mac and run it there")
        try:
            self.version = metadata.version(self.package)
            self.start()
            import coremltools
        except ImportError as error:
            raise missing(type(self), error) from error
        try:
            check_package(path.parent)
            self.model = coremltools.models.MLModel(str(path.parent))
        except UserError:
            raise
        except Exception as error:  # Core ML's errors come as plain exceptions of several classes
            raise refused(path.parent, self, error) from error

    @classmethod
    def elsewhere(cls) -> str | None:
        """See :meth:`Runtime.elsewhere`."""
        return None if sys.platform == MACOS else f"Core ML runs on macOS alone, and this system is {sys.platform}"

    @classmethod
    def start(cls) -> None:
        """See :meth:`Runtime.start`."""
        logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of versions and libraries when imported
        super().start()

    def _row(self, values: list[NDArray[Any]]) -> list[NDArray[Any]]:
        given = (value if value.dtype == np.float32 else value.astype(np.int32) for value in values)
        found = self.model.predict(dict(zip(self.inputs, given, strict=True)))
        return [np.asarray(found[name]) for name in self.outputs]


def operations(package: Path) -> Iterator[tuple[str, Any]]:
    """Yield type and message of a package's operations, those of inner blocks too; coremltools reads the file.

    Args:
        package: the folder that ends in ``.mlpackage``.
    """
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model.FromString((package.parent / MODEL).read_bytes())
    blocks = [
        block for function in spec.mlProgram.functions.values() for block in function.block_specializations.values()
    ]
    while blocks:
        for operation in blocks.pop().operations:
            yield operation.type, operation
            blocks += operation.blocks


def check_package(package: Path) -> None:
    """Check that a package is one program with its own weights, before Core ML opens it.

    Raises:
        UserError: its manifest leads elsewhere, it is no program, or a weight lies in another file.
    """
    try:
        entries = json.loads((package.parent / MANIFEST).read_text(encoding="utf-8"))["itemInfoEntries"].values()
        places = {entry["path"] for entry in entries}
        named = {
            value.blobFileValue.fileName
            for _, operation in operations(package)
            for value in operation.attributes.values()
            if value.WhichOneof("value") == "blobFileValue"
        }
    except Exception as error:  # of JSON, of protobuf and of missing keys
        raise UserError(f"{package}: it is no Core ML program ({one_line(error)}); export the bundle again") from error
    inside = {ROOT, WEIGHTS_FOLDER}
    if places != inside or not named <= {OWN_WEIGHTS}:
        odd = sorted((places ^ inside) | (named - {OWN_WEIGHTS}))
        raise UserError(f"{package}: it names {odd[0]!r}, which is none of its own files; export the bundle again")
