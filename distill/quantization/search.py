"""Mixed precision: the layers that int8 harms most stay in float, as few as the gate allows.

How much a layer harms is measured on training rows: the model's outputs when that layer alone is int8, against those of
the float graph. Whether a choice is good enough is the gate's to say, on validation rows. The number of float layers
is doubled until the gate holds, and then narrowed down: twice log2(layers) tries, where a scan is one try a layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from distill.predict import open_graph
from distill.progress import Progress, silent
from distill.quantization.errors import decibels, few_rows
from distill.quantization.static import StaticQuantizer


def search_floats(
    quantizer: StaticQuantizer,
    agreement: Callable[[Path], float],
    least: float,
    *,
    outputs: Collection[str],
    report: Progress = silent,
) -> dict[str, Any]:
    """Find the fewest layers, the most harmful first, that have to stay in float.

    Args:
        quantizer: of the graph.
        agreement: of a model file with its source, on validation rows.
        least: the agreement that is asked for.
        outputs: names of the graph's outputs by which harm is measured: those that the gate compares.
        report: called with (layers scanned, layers).

    Returns:
        ``kept``: the names; without success those of the best try. ``scan``: for each layer ``node``, ``operator`` and
        ``sqnr_db`` of the worst output when it alone is int8, the most harmful first; empty where nothing has to stay
        in float. ``tried``: ``num_float`` and ``agreement`` of each try, in order.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, tried = Path(folder) / "try.onnx", {}

        def holds(names: list[str]) -> bool:
            if len(names) not in tried:
                quantizer.write(path, names)
                tried[len(names)] = agreement(path)
            return tried[len(names)] >= least

        if holds([]):
            return {"kept": [], "scan": [], "tried": _told(tried)}
        scan = _scan(quantizer, outputs, Path(folder), report)
        ranked = [layer["node"] for layer in scan]
        most, low, high = len(ranked) - 1, 0, 1  # with all in float nothing would be int8
        while high < most and not holds(ranked[:high]):
            low, high = high, 2 * high
        high = min(high, most)
        if not holds(ranked[:high]):
            best = max(tried, key=lambda count: (tried[count], -count))
            return {"kept": ranked[:best], "scan": scan, "tried": _told(tried)}
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(ranked[:middle]) else (middle, high)
    return {"kept": ranked[:high], "scan": scan, "tried": _told(tried)}


def _scan(quantizer: StaticQuantizer, outputs: Collection[str], folder: Path, report: Progress) -> list[dict[str, Any]]:
    rows = list(few_rows(quantizer.batches))
    onnx.save(quantizer.model, folder / "float.onnx")
    expected = _values(folder / "float.onnx", rows, outputs)
    found = []
    for number, (name, operator) in enumerate(quantizer.layers.items(), start=1):
        quantizer.write(folder / "one.onnx", [other for other in quantizer.layers if other != name])
        worst = min(_sqnr(expected[key], values) for key, values in _values(folder / "one.onnx", rows, outputs).items())
        found.append({"node": name, "operator": operator, "sqnr_db": worst})
        report(number, len(quantizer.layers))
    return sorted(found, key=lambda layer: layer["sqnr_db"])


def _values(path: Path, rows: list[dict[str, NDArray[Any]]], outputs: Collection[str]) -> dict[str, NDArray[Any]]:
    graph = open_graph(path)
    answers = [graph.run(feeds) for feeds in rows]
    joined = {name: np.concatenate([each[name] for each in answers]) for name in outputs}
    whole = {name: np.issubdtype(values.dtype, np.integer) for name, values in joined.items()}
    return {name: values if whole[name] else values.astype(np.float64) for name, values in joined.items()}


def _sqnr(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Of numbers the ratio of signal to error, dB; of token ids, whose distance means nothing, that of their counts."""
    if np.issubdtype(expected.dtype, np.integer):
        return decibels(float(expected.size), float((expected != found).sum()))
    return decibels(float(np.square(expected).sum()), float(np.square(expected - found).sum()))


def _told(tried: dict[int, float]) -> list[dict[str, Any]]:
    return [{"num_float": count, "agreement": value if np.isfinite(value) else None} for count, value in tried.items()]
