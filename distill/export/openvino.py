"""An ONNX file as an OpenVINO model, in float32, for bfloat16, or in int8.

For bfloat16 weights are stored in float16, half the bytes, as OpenVINO stores no others; the runtime makes bfloat16 of
them where the processor has it.

Static int8 is NNCF's post-training quantization of the OpenVINO model: weights symmetric and per channel, activations
asymmetric, embedding tables too, calibrated on training rows. Dynamic int8 is NNCF's compression of all weights to 8
bits per channel: processors with VNNI instructions round the inputs of matrix products as they come, in groups of 32
numbers, and compute with integers; others, and convolutions everywhere, compute in float. Of an ONNX file that has
QuantizeLinear pairs, the runtime makes integer layers by itself.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.contracts import UserError
from distill.export.subprocesses import answer, read_feeds
from distill.runtimes import RUNTIMES
from distill.runtimes.base import by_length, missing
from distill.runtimes.openvino import BF16, is_recurrent

DTYPES = {"boolean": "bool", "u8": "uint8", "i16": "int16", "i64": "int64", "f32": "float32"}
"""OpenVINO's name of an element type -> numpy's, of those that graphs take and give."""


def convert(
    source: Path,
    out: Path,
    *,
    feeds: str | None = None,
    dynamic: bool = False,
    keep_float: Sequence[str] = (),
    precision: str = "fp32",
) -> dict[str, Any]:
    """Write a model as ``out`` (XML) and the weights beside it.

    Args:
        source: an ONNX file with named dimensions, as :func:`distill.export.onnx.export_onnx` writes it.
        out: the file to write, ending in ``.xml``.
        feeds: for static int8 the calibration batches' file.
        dynamic: int8 without calibration; without either the precision is the file's.
        keep_float: parts of node names whose operators stay in float.
        precision: ``bf16`` for weights of 16 bits.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape, dynamic dimensions by name) and ``operators``
        (type -> count).

    Raises:
        UserError: a package is missing, or an entry of ``keep_float`` matches no node.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing(RUNTIMES["openvino"], error) from error
    model = openvino.Core().read_model(source)
    if feeds is not None or dynamic:
        model = _quantized(model, feeds, keep_float)
    openvino.save_model(model, out, compress_to_fp16=precision == BF16)
    return {
        "inputs": {port.get_any_name(): _dtype_and_shape(port) for port in model.inputs},
        "outputs": {port.get_any_name(): _dtype_and_shape(port) for port in model.outputs},
        "operators": dict(sorted(Counter(node.get_type_name() for node in model.get_ops()).items())),
    }


def _quantized(model: Any, feeds: str | None, keep_float: Sequence[str]) -> Any:
    """The model in static int8, or without feeds in dynamic."""
    os.environ["NNCF_CI"] = "1"  # else NNCF reports its use to its makers
    try:
        import nncf
    except ImportError as error:
        raise missing(RUNTIMES["openvino"], error) from error
    names = [node.get_friendly_name() for node in model.get_ops()]
    for part in keep_float:
        if not any(part in name for name in names):
            raise UserError(f"export.quantize.keep_float: no node's name has {part!r} in it")
    kept = nncf.IgnoredScope(patterns=[f".*{re.escape(part)}.*" for part in keep_float], validate=False)
    if feeds is None:
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=kept)
    batches = read_feeds(feeds)
    if is_recurrent(model) and "text_mask" in batches[0]:
        batches = [part for batch in batches for _, part in by_length(batch)]
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(batches),
        ignored_scope=kept,
    )


def _dtype_and_shape(port: Any) -> dict[str, Any]:
    """Dimensions of any size are named as in the graphs of :mod:`distill.export.onnx`."""
    sizes = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
    shape = [("batch", "length")[axis] if size is None else size for axis, size in enumerate(sizes)]
    return {"dtype": DTYPES[port.get_element_type().get_type_name()], "shape": shape}


if __name__ == "__main__":
    answer(convert)
