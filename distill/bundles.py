"""The bundles that a run can write: for each its runtime, its precision, and the function that makes its model file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill.config import FP32, INT8, ExportConfig, QuantizeConfig, Recipe, nearest
from distill.contracts import UserError
from distill.export.conversion import EXPORTERS, ONNX, convert, missing_packages
from distill.predict import RUNTIME
from distill.progress import Progress
from distill.quantization.common import Feeds
from distill.quantization.dynamic import quantize_dynamic
from distill.quantization.errors import layer_errors
from distill.quantization.half import convert_half
from distill.quantization.search import search_floats
from distill.quantization.static import StaticQuantizer
from distill.quantization.weights import quantize_weights_int4, quantize_weights_int8
from distill.runs import write_json
from distill.runtimes import RUNTIMES
from distill.runtimes.onnxruntime import check_provider
from distill.workspace import PRUNED

NOTHING = float("-inf")
AWARE, QAT = "onnx-int8-qat", "qat"
"""The bundle of a model that was trained for it, and the stage that does so."""
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8, dynamic", "int8, trained"]
CALIBRATED = ("int8", "int8, trained")
SOURCES = {"int8, trained": QAT}
"""Precision -> the stage that trains for it."""
LAYERS_FILE = "quantize.json"
"""What static int8 does to each layer, beside the bundles."""


@dataclass(frozen=True)
class Exported:
    """What the model file of a bundle is made from.

    Attributes:
        graph: the fp32 ONNX file.
        program: writes the model as a program of one row, if it is not there yet.
        feeds: makes the inputs of some batches of training rows.
        config: how it is quantized, with the parts of models that their encoders keep in float.
        agreement: of a model file with its source on the validation rows.
        compared: names of the outputs that agree or not.
        least: the bundle's least agreement.
        folder: of the stage, for what is told beside the bundle.
        progress: opens a bar of this name.
        ranges: of values of the graph, where they were learnt.
    """

    graph: Path
    program: Callable[[], Path]
    feeds: Callable[[], Iterator[Feeds]]
    config: QuantizeConfig
    agreement: Callable[[Path], float]
    compared: Sequence[str]
    least: float
    folder: Path
    progress: Callable[[str], AbstractContextManager[Progress]]
    ranges: Mapping[str, tuple[float, float]] | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of bundle; its name is RUNTIME-PRECISION.

    Attributes:
        runtime: what runs it.
        precision: of its weights and values.
        make: writes the model to the first of the runtime's files, and the others beside it, and returns what it did as
            JSON values, which the bundle holds; of other runtimes with ``inputs`` and ``outputs``. None of the fp32
            graph, which is there.
        source: the stage that trains what it is made from.
        gate: which of ``export.min_agreement_fp32`` and ``export.min_agreement_int8`` holds where
            ``export.min_agreement`` does not name the bundle.
    """

    runtime: str
    precision: str
    make: Callable[[Exported, Path], dict[str, Any]] | None
    gate: Literal["fp32", "int8"]
    source: str = PRUNED

    @property
    def file(self) -> str:
        """The first of the runtime's files."""
        return RUNTIMES[self.runtime].files[0]


def _converted(runtime: str, precision: Precision) -> Kind:
    """The kind of bundle that a runtime's exporter makes."""
    exporter, int8 = EXPORTERS[runtime], precision.startswith("int8")

    def make(exported: Exported, target: Path) -> dict[str, Any]:
        source = exported.graph if exporter.source == ONNX else exported.program()
        with exported.progress(f"convert for {runtime}") as report:
            return convert(
                runtime,
                source,
                RUNTIMES[runtime].root(target),
                feeds=exported.feeds() if precision in CALIBRATED else None,
                dynamic=precision == "int8, dynamic",
                learnt=None if exported.ranges is None else (exported.graph, exported.ranges),
                keep_float=exported.config.keep_float if int8 else (),
                precision="fp32" if int8 else precision,
                report=report,
            )

    return Kind(runtime, precision, make, "int8" if int8 else "fp32", SOURCES.get(precision, PRUNED))


def _openvino_aware(exported: Exported, target: Path) -> dict[str, Any]:
    """The graph of :data:`AWARE`, converted: OpenVINO runs layers between such pairs in integers."""
    with tempfile.TemporaryDirectory() as folder, exported.progress("convert for openvino") as report:
        graph = Path(folder) / "model.onnx"
        _aware(exported, graph)
        return convert("openvino", graph, target.parent, report=report)


def _from_graph(
    make: Callable[[Path, Path, Iterable[Feeds], QuantizeConfig], dict[str, Any]],
) -> Callable[[Exported, Path], dict[str, Any]]:
    """A maker that needs the graph, training rows and the config."""
    return lambda exported, target: make(exported.graph, target, exported.feeds(), exported.config)


def _static(exported: Exported, target: Path) -> dict[str, Any]:
    """Static int8, with the layers in float that the gate needs if the recipe searches them, and a table of errors."""
    quantizer = StaticQuantizer(exported.graph, exported.feeds(), exported.config)
    found: dict[str, Any] = {}
    if exported.config.search:
        with exported.progress("scan layers") as report:
            searched = search_floats(
                quantizer, exported.agreement, exported.least, outputs=exported.compared, report=report
            )
            found = {"search": searched}
    made = quantizer.write(target, found["search"]["kept"] if found else ())
    layers = layer_errors(quantizer.model, target, quantizer.batches)
    write_json(exported.folder / LAYERS_FILE, {"layers": layers, **found})
    return {**made, **found}


def _aware(exported: Exported, target: Path) -> dict[str, Any]:
    """Static int8 with ranges that were learnt."""
    return StaticQuantizer(exported.graph, exported.feeds(), exported.config, exported.ranges).write(target)


BUNDLES = {
    FP32: Kind(RUNTIME, "fp32", None, "fp32"),
    "onnx-fp16": Kind(RUNTIME, "fp16", _from_graph(convert_half), "fp32"),
    INT8: Kind(RUNTIME, "int8", _static, "int8"),
    AWARE: Kind(RUNTIME, "int8, trained", _aware, "int8", QAT),
    "onnx-int8-dynamic": Kind(RUNTIME, "int8, dynamic", _from_graph(quantize_dynamic), "int8"),
    "onnx-int8-weights": Kind(RUNTIME, "int8 weights", _from_graph(quantize_weights_int8), "int8"),
    "onnx-int4-weights": Kind(RUNTIME, "int4 weights", _from_graph(quantize_weights_int4), "int8"),
    "openvino-fp32": _converted("openvino", "fp32"),
    "openvino-bf16": _converted("openvino", "bf16"),
    "openvino-int8": _converted("openvino", "int8"),
    "openvino-int8-qat": Kind("openvino", "int8, trained", _openvino_aware, "int8", QAT),
    "openvino-int8-dynamic": _converted("openvino", "int8, dynamic"),
    "executorch-fp32": _converted("executorch", "fp32"),
    "executorch-int8": _converted("executorch", "int8"),
    "executorch-int8-qat": _converted("executorch", "int8, trained"),
    "executorch-int8-dynamic": _converted("executorch", "int8, dynamic"),
    "litert-fp32": _converted("litert", "fp32"),
    "litert-int8": _converted("litert", "int8, dynamic"),
    "litert-int8-static": _converted("litert", "int8"),
    "litert-int8-qat": _converted("litert", "int8, trained"),
    "coreml-fp32": _converted("coreml", "fp32"),
    "coreml-fp16": _converted("coreml", "fp16"),
}
"""Name -> kind of bundle."""


def not_run(name: str) -> str | None:
    """The sentence about a bundle that this system cannot run; None of all others."""
    why = RUNTIMES[BUNDLES[name].runtime].elsewhere()
    return f"{why}: not run here, so neither compared with its source nor measured" if why else None


def best_found(made: Mapping[str, Any], setting: str) -> str:
    """The end of a refusal: the best that a search has found; empty of a bundle that was not searched for.

    Args:
        made: what its maker says.
        setting: of the recipe, that refused it.
    """
    if "search" not in made:
        return ""
    tried, layers = made["search"]["tried"], sum(made["quantized"].values()) + sum(made["kept_float"].values())
    best = max(tried, key=lambda one: NOTHING if one["agreement"] is None else one["agreement"])
    agreed = "nothing finite" if best["agreement"] is None else f"an agreement of {best['agreement']:.4f}"
    return (
        f"; the search found {agreed} at best, with {best['num_float']} of {layers} layers in "
        f"float: lower {setting} or train longer"
    )


def check_bundles(config: ExportConfig, *, retrieves: bool = False) -> None:
    """Check the names of bundles, and what they give.

    Args:
        config: the recipe's ``export``.
        retrieves: whether the recipe measures what embeddings find.

    Raises:
        UserError: one that is not known, a least agreement of one that is not made, or no embeddings where they are
            measured.
    """
    if retrieves and not config.embeddings:
        raise UserError("export.embeddings is false, and retrieval compares embeddings; set it to true")
    for name in config.bundles:
        if name not in BUNDLES:
            raise UserError(f"export.bundles: there is no bundle {name!r}; {nearest(name, BUNDLES)}")
    for name in config.min_agreement:
        if name not in config.bundles:
            raise UserError(
                f"export.min_agreement: {name!r} is no bundle of export.bundles; {nearest(name, config.bundles)}"
            )


def check_packages(config: ExportConfig) -> None:
    """Check that what makes and runs the bundles is installed.

    Raises:
        UserError: a package is missing.
    """
    for name in config.bundles:
        runtime = BUNDLES[name].runtime
        missing = missing_packages(runtime)
        if missing:
            raise UserError(
                f"export.bundles: {name!r} needs {' and '.join(missing)}, which this installation lacks; "
                f"pip install 'multidistill[{RUNTIMES[runtime].extra}]', or leave it out"
            )


def check_machine(recipe: Recipe, stages: Iterable[str]) -> None:
    """Check that this machine has what stages need that are to be done.

    Raises:
        UserError: a package is missing, or the provider that the recipe's ``bench`` names.
    """
    if "quantize" in stages:
        check_packages(recipe.export)
    if "bench" in stages:
        try:
            check_provider(recipe.bench.provider)
        except UserError as error:
            raise UserError(f"bench.provider: {error}") from None


def least_agreement(config: ExportConfig, name: str) -> float:
    """The least agreement of a bundle with its source."""
    families = {"fp32": config.min_agreement_fp32, "int8": config.min_agreement_int8}
    return config.min_agreement.get(name, families[BUNDLES[name].gate])


def least_setting(config: ExportConfig, name: str) -> str:
    """The setting that :func:`least_agreement` reads."""
    own = name in config.min_agreement
    return f"export.min_agreement.{name}" if own else f"export.min_agreement_{BUNDLES[name].gate}"


def stages_of(config: ExportConfig) -> dict[str, str]:
    """Bundle -> the stage whose folder holds it."""
    return {name: "export" if name == FP32 else "quantize" for name in config.bundles}


YOUNGER = (("", "bundles"), ("", "embeddings"), ("", "min_agreement"), ("", "check_rows"), ("quantize", "search"))
"""Keys of ``export`` and of its parts that finished runs may lack."""


def settings(config: ExportConfig) -> dict[str, Any]:
    """The recipe's ``export`` as fingerprints see it: keys that are younger than finished runs count if they are set.

    So a run that was made without them stays up to date.
    """
    tree, fresh = config.model_dump(), ExportConfig().model_dump()
    for part, younger in YOUNGER:
        ours, theirs = (whole[part] if part else whole for whole in (tree, fresh))
        if ours[younger] == theirs[younger]:
            del ours[younger]
    del tree["quantize"][QAT]  # the stage of that name knows
    return tree


def aware_settings(config: QuantizeConfig) -> dict[str, Any]:
    """What the student that is trained for int8 depends on."""
    return config.model_dump(exclude={"qat": {"train": {"shard"}}, "search": True})


def graph_settings(config: ExportConfig) -> dict[str, Any]:
    """The part of it that fp32 graphs depend on."""
    return {"opset": config.opset} | ({} if config.embeddings else {"embeddings": False})


def fp32_settings(config: ExportConfig) -> dict[str, Any]:
    """The part of it that the fp32 graph and its bundle depend on."""
    return {**graph_settings(config), "min_agreement_fp32": least_agreement(config, FP32)}
