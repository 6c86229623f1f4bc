"""What every runtime offers: a model file opened, named arrays in, named float32 arrays out."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from distill.contracts import UserError

Tensors = Mapping[str, Mapping[str, Any]]
"""Name -> ``dtype`` and ``shape``, in the graph's order; dimensions of any size are names."""
TEXTS = ("text", "text_mask")


class Runtime(ABC):
    """A model that is opened and runs.

    Attributes:
        files: names of the model's files inside a bundle; the first is the one to open. They lie in a folder of their
            own where the format is one.
        extra: the extra of multidistill that brings the packages; None where every installation has them.
        package: the package that ``runtime_version`` is of.
        modules: what opening a model imports.
        needs_torch: whether the runtime's own Python package imports torch.
        device: what computes, for people.
        inputs: names of the inputs, in the graph's order.
        outputs: names of the outputs.
        threads: threads inside an operator.
        version: of the runtime.
    """

    files: ClassVar[tuple[str, ...]]
    extra: ClassVar[str | None]
    package: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    needs_torch: ClassVar[bool] = False
    device: str = "CPU"
    inputs: list[str]
    outputs: list[str]
    threads: int
    version: str

    @abstractmethod
    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1) -> None:
        """Open a model.

        Args:
            path: its first file.
            graph: ``inputs`` and ``outputs`` as ``bundle.json`` describes them.
            threads: threads inside an operator.

        Raises:
            UserError: the runtime's package is missing, or it cannot load the file.
        """

    @classmethod
    def elsewhere(cls) -> str | None:
        """Why no model of this runtime runs on this system, as a clause; None where it does once it is installed."""
        return None

    @classmethod
    def root(cls, first: Path) -> Path:
        """The folder that a model's files lie in, by the first of them."""
        return first.parents[len(Path(cls.files[0]).parts) - 1]

    @classmethod
    def beside(cls, first: Path) -> dict[str, Path]:
        """Name in a bundle -> file, of a model by the first of its files; one that is no folder may have any stem."""
        if len(Path(cls.files[0]).parts) > 1:
            return {file: cls.root(first) / file for file in cls.files}
        return {file: first.with_suffix(Path(file).suffix) for file in cls.files}

    @classmethod
    def start(cls) -> None:
        """Load what the runtime needs for any model, so that its memory is none of a model's.

        Raises:
            ImportError: a package is missing.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages' own, of their imports
            for module in cls.modules:
                import_module(module)

    @abstractmethod
    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Run the graph.

        Args:
            feeds: the inputs, B rows each; other keys are ignored.

        Returns:
            output name -> float32 [B, ...].

        Raises:
            ValueError: an input has the wrong type or shape (or what the runtime's package raises then).
        """


class RowByRow(Runtime):
    """A graph of one row and of texts of one length, run once a row; shorter texts are padded under their mask."""

    def __init__(self, graph: Mapping[str, Tensors], threads: int) -> None:
        """Keep what goes in and out; the runtime's class opens the file."""
        self.tensors, self.threads = graph["inputs"], threads
        self.inputs, self.outputs = list(graph["inputs"]), list(graph["outputs"])

    @abstractmethod
    def _row(self, values: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run one row: the inputs [1, ...] in their order to the outputs [1, ...] in theirs."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """See :meth:`Runtime.run`."""
        arrays = list(checked(self.tensors, feeds).values())
        rows = [self._row([array[row : row + 1] for array in arrays]) for row in range(len(arrays[0]))]
        return {
            name: np.concatenate(parts).astype(np.float32, copy=False)
            for name, parts in zip(self.outputs, zip(*rows, strict=True), strict=True)
        }


def checked(tensors: Tensors, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return a graph's inputs in its order; texts that are shorter than its fixed length get padding, mask False.

    Raises:
        ValueError: an input has the wrong type or shape, another number of rows than the first, or a longer text.
    """
    arrays = {name: _padded(name, feeds[name], tensors[name]["shape"]) for name in tensors}
    rows = len(next(iter(arrays.values())))
    for name, array in arrays.items():
        dtype, shape = tensors[name]["dtype"], tensors[name]["shape"]
        sizes = [rows, *shape[1:]]
        fits = array.ndim == len(sizes) and all(
            isinstance(size, str) or size == found for size, found in zip(sizes, array.shape, strict=True)
        )
        if array.dtype != dtype or not fits:
            raise ValueError(f"{name!r} is {array.dtype} {list(array.shape)}, expected {dtype} {sizes}")
    return arrays


def _padded(name: str, array: NDArray[Any], shape: list[int | str]) -> NDArray[Any]:
    if name not in TEXTS or array.ndim < 2 or isinstance(shape[1], str) or array.shape[1] >= shape[1]:
        return array
    return np.pad(array, ((0, 0), (0, shape[1] - array.shape[1])))


def by_length(feeds: Mapping[str, NDArray[Any]]) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
    """Yield, for each length of text that occurs, its rows and their inputs without padding."""
    lengths = np.maximum(feeds["text_mask"].sum(axis=1), 1)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        yield rows, {name: array[rows, :length] if name in TEXTS else array[rows] for name, array in feeds.items()}


def missing(runtime: type[Runtime], error: ImportError) -> UserError:
    """Return the error of a runtime whose package is not installed."""
    return UserError(
        f"bundles for {runtime.package} need a package that is missing ({one_line(error)}); "
        f"pip install 'multidistill[{runtime.extra}]'"
    )


def refused(path: Path, runtime: Runtime, error: Exception) -> UserError:
    """Return the error of a file that a runtime cannot load."""
    return UserError(f"{path}: {runtime.package} {runtime.version} cannot load it: {one_line(error)}")


def one_line(error: Exception) -> str:
    """Return what an error says without line breaks."""
    return " ".join(str(error).split())
