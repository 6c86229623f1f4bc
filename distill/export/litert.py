"""A program of one row as a LiteRT file, in float32 or int8.

int8 is ai-edge-quantizer's: weights int8 per channel, embedding tables too. Static int8 rounds what flows between
layers within ranges that are calibrated on training rows; dynamic int8 measures these ranges while the model runs.
Inputs and outputs stay as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.export.subprocesses import Feeds, answer, read_feeds
from distill.export.torch_program import example_of, in_plain_layout, read_program
from distill.runtimes import RUNTIMES
from distill.runtimes.base import checked, missing

STATIC = (
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "CONV_2D_TRANSPOSE",
    "FULLY_CONNECTED",
    "PAD",
    "RELU",
    "MAX_POOL_2D",
    "AVERAGE_POOL_2D",
)
TABLES = ("EMBEDDING_LOOKUP",)
PRODUCTS = ("BATCH_MATMUL",)
IDS = {"int64": np.int32}
"""The converter narrows these inputs."""


def convert(source: Path, out: Path, *, feeds: str | None = None, dynamic: bool = False) -> dict[str, Any]:
    """Write a program as ``out``.

    Args:
        source: a program of one row, as :func:`distill.export.torch_program.export_program` writes it.
        out: the file to write.
        feeds: for static int8 the calibration batches' file.
        dynamic: int8 without calibration; float32 without either.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape).

    Raises:
        UserError: a package is missing.
    """
    try:
        import litert_torch
        from ai_edge_quantizer import quantizer
    except ImportError as error:
        raise missing(RUNTIMES["litert"], error) from error
    program, graph = read_program(source)
    model = litert_torch.convert(in_plain_layout(program, graph).module(), example_of(graph))
    if feeds is None and not dynamic:
        model.export(str(out))
        return graph
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        model.export(str(path))
        chosen = quantizer.Quantizer(str(path))
        if feeds is None:
            _dynamic(chosen)
            found = None
        else:
            found = _calibrated(chosen, rows_of(graph, read_feeds(feeds)))
        chosen.quantize(found).export_model(out, overwrite=True)
    return graph


def rows_of(graph: dict[str, Any], batches: Sequence[Feeds]) -> list[dict[str, NDArray[Any]]]:
    """Batches as single rows [1, ...], by the converter's names of inputs."""
    whole = [list(checked(graph["inputs"], batch).values()) for batch in batches]
    return [
        {
            f"args_{number}": array[row : row + 1].astype(IDS.get(array.dtype.name, array.dtype))
            for number, array in enumerate(arrays)
        }
        for arrays in whole
        for row in range(len(arrays[0]))
    ]


def _dynamic(chosen: Any) -> None:
    chosen.add_dynamic_config(regex=".*", operation_name="*", num_bits=8)
    for name in PRODUCTS:
        chosen.update_quantization_recipe(regex=".*", operation_name=name, algorithm_key="no_quantize")


def _calibrated(chosen: Any, rows: list[dict[str, NDArray[Any]]]) -> Any:
    for name in STATIC:
        chosen.add_static_config(regex=".*", operation_name=name, activation_num_bits=8, weight_num_bits=8)
    for name in TABLES:
        chosen.add_dynamic_config(regex=".*", operation_name=name, num_bits=8)
    return chosen.calibrate({"serving_default": rows}, num_threads=1)


if __name__ == "__main__":
    answer(convert)
