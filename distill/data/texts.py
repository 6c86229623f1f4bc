"""The texts of many rows in little memory: one Arrow buffer in place of a Python string a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Texts(Sequence[str]):
    """A sequence of strings; a slice is a list.

    Args:
        column: strings, none of them null.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        joined = column.cast(pa.large_string()).combine_chunks()  # 64-bit offsets: all texts may exceed 2 GB
        self._array: Any = joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._array)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        """Return a text, or a list of them."""
        if isinstance(index, slice):
            return self._array[index].to_pylist()
        return self._array[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""
        return (text.as_py() for text in self._array)

    def take(self, rows: NDArray[np.int64]) -> Texts:
        """Return the texts of these rows, in this order."""
        return Texts(pa.chunked_array([self._array.take(pa.array(rows))]))

    def distinct(self) -> tuple[Texts, NDArray[np.int32]]:
        """Return the distinct texts in order of first appearance, and the number of each row's text among them."""
        encoded = self._array.dictionary_encode()
        return Texts(pa.chunked_array([encoded.dictionary])), encoded.indices.to_numpy()


def distinct_texts(texts: Sequence[str], rows: NDArray[np.int64]) -> tuple[Texts, NDArray[np.int32]]:
    """Return the distinct ones among the texts of some rows, and the number of each row's text among them, int32 [N].

    Args:
        texts: of all rows.
        rows: int64 [N], positions in ``texts``.
    """
    if isinstance(texts, Texts):
        return texts.take(rows).distinct()
    return Texts(pa.chunked_array([pa.array([texts[row] for row in rows.tolist()], pa.large_string())])).distinct()
