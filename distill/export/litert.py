"""A program of one row as a LiteRT file, in float32 or int8.

int8 is ai-edge-quantizer's: weights int8 per channel, embedding tables too. Static int8 rounds what flows between
layers within ranges that are calibrated on training rows; dynamic int8 measures these ranges while the model runs.
Inputs and outputs stay as they are.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.export.subprocesses import Feeds, answer, read_feeds
from distill.export.torch_program import example_of, in_plain_layout, read_program
from distill.prints import Seen, ranges_of, told_by
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
"""Operators that compute with integers, and what lies between them.

The rest stays in float: in int8, the variance in a layer norm loses what it is for. (Seen: a cosine to the float model
of 0.978 with all operators in int8, 0.996 with these, both in ranges of the package.)
"""
SIGNATURE = "serving_default"
TABLES = ("EMBEDDING_LOOKUP",)
PRODUCTS = ("BATCH_MATMUL",)
"""The runtime refuses such a product of a float value and an int8 constant, as a spectrogram's filters are one."""
OUTPUTS = f".*{SIGNATURE}_output.*"
"""Layers that write these measure what they read: where one of them reads another's, such as the heads behind an
embedding, the package makes a static layer of mixed types, which the runtime refuses.
"""
NARROWED = {"int64": np.int32}
"""Inputs that the converter makes smaller."""


def convert(
    source: Path,
    out: Path,
    *,
    feeds: str | None = None,
    dynamic: bool = False,
    learnt: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a program as ``out``.

    Args:
        source: a program of one row, as :func:`distill.export.torch_program.export_program` writes it.
        out: the file to write.
        feeds: for static int8 the calibration batches' file.
        dynamic: int8 without calibration; float32 without either.
        learnt: ``graph`` and ``ranges`` of :class:`~distill.prints.LearntRanges`, which go before what is
            calibrated.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape); with ``learnt`` also ``ranges``, how many of them are
        ``learnt`` and how many ``calibrated``.

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
        chosen, told, found = quantizer.Quantizer(str(path)), dict[str, Any](), None
        if feeds is None:
            _choose_dynamic(chosen)
        else:
            _choose_static(chosen)
            batches = [checked(graph["inputs"], each) for each in read_feeds(feeds)]
            found, told = _calibrated(chosen, path, batches, learnt)
        chosen.quantize(found).export_model(out, overwrite=True)
    return {**graph, **told}


def _choose_dynamic(chosen: Any) -> None:
    chosen.add_dynamic_config(regex=".*", operation_name="*", num_bits=8)
    for name in PRODUCTS:
        chosen.update_quantization_recipe(regex=".*", operation_name=name, algorithm_key="no_quantize")


def _choose_static(chosen: Any) -> None:
    for name in STATIC:
        chosen.add_static_config(regex=".*", operation_name=name, activation_num_bits=8, weight_num_bits=8)
    for name in TABLES:
        chosen.add_dynamic_config(regex=".*", operation_name=name, num_bits=8)
    chosen.add_dynamic_config(regex=OUTPUTS, operation_name="FULLY_CONNECTED", num_bits=8)


def _calibrated(
    chosen: Any, path: Path, batches: Sequence[Feeds], learnt: Mapping[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """Ranges of all values that static int8 rounds, and what is told of them."""
    rows = [row for batch in batches for row in _rows(batch)]
    found = chosen.calibrate({SIGNATURE: rows[:1]}, num_threads=1)  # its ranges of many rows are moving averages
    names = {name for name, limits in found.items() if "min" in limits}
    extremes: dict[str, list[float]] = {}
    for values in _values(path, rows, names):
        for name, value in values.items():
            low, high = extremes.setdefault(name, [0.0, 0.0])
            extremes[name] = [min(low, float(value.min(initial=0.0))), max(high, float(value.max(initial=0.0)))]
    told: dict[str, Any] = {}
    if learnt is not None:
        some = told_by(batches[0])
        ranges, seen = ranges_of(learnt, some), defaultdict[str, Seen](Seen)
        for values in _values(path, _rows(some), names):
            for name, value in values.items():
                seen[name].add(value)
        carried = {name: limits for name, value in seen.items() if (limits := ranges.of([value])) is not None}
        extremes |= {name: list(limits) for name, limits in carried.items()}
        told = {"ranges": {"learnt": len(carried), "calibrated": len(extremes) - len(carried)}}
    for name, ends in extremes.items():
        for end, limit in zip(("min", "max"), ends, strict=True):
            found[name][end] = np.full_like(found[name][end], limit)
    return found, told


def _rows(batch: Feeds) -> list[dict[str, NDArray[Any]]]:
    """The rows of a batch one by one, by the converter's names of inputs."""
    arrays = [array.astype(NARROWED.get(array.dtype.name, array.dtype)) for array in batch.values()]
    return [
        {f"args_{number}": array[row : row + 1] for number, array in enumerate(arrays)} for row in range(len(arrays[0]))
    ]


def _values(path: Path, rows: Sequence[Feeds], names: Collection[str]) -> Iterator[dict[str, NDArray[Any]]]:
    """Some values of a model by name, row by row."""
    from ai_edge_litert.interpreter import Interpreter

    model = Interpreter(str(path), num_threads=1, experimental_preserve_all_tensors=True)
    call = model.get_signature_runner(SIGNATURE)
    places = {each["name"]: each["index"] for each in model.get_tensor_details() if each["name"] in names}
    for row in rows:
        call(**row)
        yield {name: model.get_tensor(place) for name, place in places.items()}


if __name__ == "__main__":
    answer(convert)
