"""Values of models told by their numbers: what two forms of the same model compute in different shapes and orders.

So is found in a model, or in the program of an exporter, what an ONNX graph names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

SAME = 1e-4
"""Relative difference of two runtimes in the statistics of the same numbers."""
TINY = 1e-30
POWERS = (1, 2, 3, 4)
ROWS = 8
"""By which values are told, once as they are and once with modalities missing."""
PRESENT = "_present"

Feeds = Mapping[str, NDArray[Any]]
Range = tuple[float, float]
Print = tuple[float, NDArray[np.float64]]
"""The largest absolute number, and sums that do not depend on order and zeros."""


def fingerprint(values: NDArray[Any]) -> Print:
    """The print of an array of any shape."""
    seen = Seen()
    seen.add(values)
    return seen.print()


class Seen:
    """The numbers of a value that comes in parts.

    Attributes:
        low: the least one, at most 0.
        high: the largest one, at least 0.
    """

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self._largest, self._sums = 0.0, np.zeros(1 + len(POWERS))

    def add(self, values: NDArray[Any]) -> None:
        """Take a part, of any shape."""
        numbers = values.astype(np.float64).ravel()
        self.low, self.high = float(numbers.min(initial=self.low)), float(numbers.max(initial=self.high))
        largest = max(self._largest, -self.low, self.high)
        self._sums *= (self._largest / (largest or 1.0)) ** np.array((1, *POWERS))
        unit = numbers / (largest or 1.0)
        self._sums += [np.abs(unit).sum(), *(np.sum(unit**power) for power in POWERS)]
        self._largest = largest

    def print(self) -> Print:
        """What tells the value from others."""
        return self._largest, self._sums.copy()


def distance(ours: Sequence[Print], theirs: Sequence[Print]) -> float:
    """The largest relative difference of two values' statistics."""
    return max(
        max(
            abs(one[0] - other[0]) / max(one[0], TINY),
            float(np.abs(one[1] - other[1]).max()) / max(float(one[1][0]), TINY),
        )
        for one, other in zip(ours, theirs, strict=True)
    )


def graph_values(model: onnx.ModelProto, feeds: Feeds, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Compute some values of a graph, by name."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    known = {value.name for value in (*told.graph.output, *told.graph.input)}
    told.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(told.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {name: feeds[name] for name in names if name in feeds}
    wanted = [name for name in names if name not in given]
    return {**given, **dict(zip(wanted, session.run(wanted, dict(feeds)), strict=True))}


class LearntRanges:
    """Ranges that were learnt for values of a float graph, to be found again in another form of the same model.

    Args:
        graph: the ONNX file.
        ranges: name of a value in it -> the least and the largest number that is left.
        rows: by which values are told.
    """

    def __init__(self, graph: Path, ranges: Mapping[str, Range], rows: Feeds) -> None:
        model = onnx.load(graph)
        known = {name for node in model.graph.node for name in (*node.input, *node.output)}
        names = [name for name in ranges if name in known]
        values = graph_values(model, rows, names) if names else {}
        self._known = [(fingerprint(values[name]), ranges[name]) for name in names]

    def of(self, values: Sequence[Seen]) -> Range | None:
        """The range that was learnt for some values, None if others among them lie beyond, or it was for none."""
        found = [self._nearest(value.print()) for value in values]
        known = [limits for limits in found if limits is not None]
        if not known:
            return None
        low, high = min(low for low, _ in known), max(high for _, high in known)
        others = [value for value, limits in zip(values, found, strict=True) if limits is None]
        return (low, high) if all(low <= value.low and value.high <= high for value in others) else None

    def _nearest(self, ours: Print) -> Range | None:
        apart = [(distance([ours], [theirs]), limits) for theirs, limits in self._known] if ours[0] > 0 else []
        least = min(apart, key=lambda each: each[0], default=(1.0, None))
        return least[1] if least[0] <= SAME else None


def ranges_of(learnt: Mapping[str, Any], rows: Feeds) -> LearntRanges:
    """Learnt ranges from JSON values: ``graph``, a file, and ``ranges``."""
    return LearntRanges(Path(learnt["graph"]), learnt["ranges"], rows)


def told_by(rows: Feeds) -> dict[str, NDArray[Any]]:
    """A few rows, and the same once more with modalities missing, each in some rows: this tells what stands in for a
    missing modality from what it stands in for.
    """
    some = {name: value[:ROWS] for name, value in rows.items()}
    flags = [name for name in some if name.endswith(PRESENT)]
    numbers = np.arange(len(next(iter(some.values()))))
    gaps = {name: (numbers + at) % (len(flags) + 1) != 0 for at, name in enumerate(flags)}
    return {name: np.concatenate([value, gaps.get(name, value)]) for name, value in some.items()}
