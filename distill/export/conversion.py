"""Which exporter makes a runtime's model, and from what."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

from distill.contracts import UserError
from distill.export.subprocesses import Feeds, run_exporter, write_feeds
from distill.progress import Progress, silent
from distill.runtimes import RUNTIMES


class Exporter(NamedTuple):
    """How a runtime's model is made.

    Attributes:
        module: below ``distill.export``.
        source: what it converts, as the file's suffix: an ONNX file or a program of one row.
        packages: names that it and the runtime import, of the runtime's extra.
        keeps_float: whether parts can be kept from quantization.
        halves: whether it makes 16-bit models.
    """

    module: str
    source: str
    packages: tuple[str, ...]
    keeps_float: bool = False
    halves: bool = False


ONNX, PROGRAM = ".onnx", ".pt2"
EXPORTERS = {
    "openvino": Exporter("openvino", ONNX, ("openvino", "nncf"), keeps_float=True, halves=True),
    "executorch": Exporter("executorch", PROGRAM, ("executorch", "torchao")),
    "litert": Exporter("litert", PROGRAM, ("litert_torch", "ai_edge_litert", "ai_edge_quantizer")),
    "coreml": Exporter("coreml", PROGRAM, ("coremltools",), halves=True),
}
"""Runtime -> its exporter; ``onnxruntime`` runs what ``export_onnx`` writes."""


def missing_packages(runtime: str) -> list[str]:
    """What a runtime's bundles need and this installation has not; nothing is imported to find out."""
    packages = EXPORTERS[runtime].packages if runtime in EXPORTERS else ()
    return [name for name in packages if util.find_spec(name) is None]


def convert(
    runtime: str,
    source: Path,
    folder: Path,
    *,
    feeds: Iterable[Feeds] | None = None,
    dynamic: bool = False,
    learnt: tuple[Path, Mapping[str, tuple[float, float]]] | None = None,
    keep_float: Sequence[str] = (),
    precision: str = "fp32",
    report: Progress = silent,
) -> dict[str, Any]:
    """Write a runtime's model, in a process of its own.

    Args:
        runtime: one of :data:`EXPORTERS`.
        source: the model as the exporter takes it.
        folder: where the files that the runtime's class names are written.
        feeds: for static int8 the graph's inputs for some batches of *training* rows.
        dynamic: int8 whose activations are measured while it runs; without either, the source's own precision.
        learnt: with ``feeds``, the model's ONNX file and ranges of its values that go before what is calibrated; of a
            runtime that converts programs.
        keep_float: of int8 parts of node names whose operators stay in float, where the exporter has it.
        precision: ``fp16`` or ``bf16`` for 16-bit models, where the exporter makes them.
        report: told how long it has taken.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape, dynamic dimensions by name), ``bytes`` of the files, and
        what else the exporter says.

    Raises:
        UserError: a package is missing, there are no feeds, or ``keep_float`` has an entry that matches nothing.
        ExportError: the exporter cannot convert the model.
    """
    exporter = EXPORTERS[runtime]
    if source.suffix != exporter.source:
        raise UserError(f"{source}: the exporter for {runtime} converts {exporter.source} files")
    folder.mkdir(parents=True, exist_ok=True)
    files = RUNTIMES[runtime].files
    arguments: dict[str, Any] = {"dynamic": True} if dynamic else {}
    with tempfile.TemporaryDirectory() as temporary:
        if feeds is not None:
            arguments["feeds"] = str(write_feeds(Path(temporary) / "feeds.safetensors", feeds))
        if learnt is not None:
            arguments["learnt"] = {"graph": str(learnt[0]), "ranges": dict(learnt[1])}
        if arguments and exporter.keeps_float:
            arguments["keep_float"] = list(keep_float)
        if exporter.halves:
            arguments["precision"] = precision
        made = run_exporter(exporter.module, source, folder / files[0], arguments, report=report)
    return made | {"bytes": sum((folder / file).stat().st_size for file in files)}
