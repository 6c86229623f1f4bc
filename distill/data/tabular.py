"""The records of all rows as a source has them, and what training rows tell about their columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill.contracts import UserError
from distill.data.cells import Cells, encoded
from distill.data.moments import Moments
from distill.data.scratch import scratch
from distill.formats.tabular import LARGEST, TabularFormat, text_of

MISSING = -1
CATEGORIES = "if its values are names, add it to data.tabular.categories"


@dataclass(frozen=True)
class Table:
    """Columns of records; all of one length N, large ones on disk.

    Attributes:
        format: which columns there are.
        numbers: float64 [N, columns of numbers], NaN where missing.
        codes: int32 [N, columns of categories], numbers of the values in order of first appearance, MISSING elsewhere.
        values: of each column of categories, its values -> their numbers.
    """

    format: TabularFormat
    numbers: NDArray[np.float64]
    codes: NDArray[np.int32]
    values: list[dict[str, int]]

    @classmethod
    def empty(cls, format: TabularFormat, num_rows: int, folder: Path) -> Table:
        """A table to read pieces into."""
        numbers = scratch(folder, (num_rows, len(format.numbers)), np.float64)
        codes = scratch(folder, (num_rows, len(format.categories)), np.int32)
        return cls(format, numbers, codes, [{} for _ in format.categories])

    def read(self, cells: Cells) -> tuple[NDArray[np.bool_], dict[int, str]]:
        """Take the records of a piece.

        Returns:
            Which rows hold anything, bool [B]; row -> why its record cannot be used.

        Raises:
            UserError: a column of numbers holds something else.
        """
        bad: dict[int, str] = {}
        for place, name in enumerate(self.format.numbers):
            found = numbers_of(cells, name, CATEGORIES)
            beyond = np.flatnonzero(np.abs(found) > LARGEST).tolist()
            bad |= {row: f"column {name!r} holds {found[row]:g}, which is beyond 32 bits" for row in beyond}
            self.numbers[cells.rows, place] = found
        for place, name in enumerate(self.format.categories):
            array = cells.plain(name)
            if pa.types.is_nested(array.type):
                raise UserError(f"{cells.source}: column {name!r} holds {array.type}; categories are names or numbers")
            values, numbers = encoded(array)
            known, texts = self.values[place], [text_of(value) for value in values]
            codes = [MISSING if text == "" else known.setdefault(text, len(known)) for text in texts]
            self.codes[cells.rows, place] = np.array([*codes, MISSING], np.int32)[numbers]
        there = ~np.isnan(self.numbers[cells.rows]).all(axis=1) if self.format.numbers else False
        return there | (self.codes[cells.rows] != MISSING).any(axis=1), bad

    def fit(self, rows: Iterable[NDArray[np.int64]]) -> TabularFormat:
        """Return the format with what rows tell: means and deviations, and the values that are frequent enough.

        Args:
            rows: positions of the training rows, some at a time.
        """
        moments = Moments(len(self.format.numbers))
        seen = [np.zeros(len(known), np.int64) for known in self.values]
        for some in rows:
            moments.add(self.numbers[some])
            for counts, codes in zip(seen, self.codes[some].T, strict=True):
                counts += np.bincount(codes[codes != MISSING], minlength=len(counts))
        return replace(
            self.format,
            mean=tuple(moments.mean.tolist()),
            std=tuple(moments.std.tolist()),
            values=tuple(self._frequent(known, counts) for known, counts in zip(self.values, seen, strict=True)),
        )

    def encode(self, format: TabularFormat, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the arrays of some rows as the fitted format has them, float32 [B, width]."""
        codes = np.zeros((len(rows), len(self.values)), np.int64)
        for place, (known, frequent) in enumerate(zip(self.values, format.values, strict=True)):
            numbers = {value: number + 1 for number, value in enumerate(frequent)}
            table = np.array([*(numbers.get(value, 0) for value in known), 0], np.int64)  # MISSING is -1, the last
            codes[:, place] = table[self.codes[rows, place]]
        return format.encode(self.numbers[rows], codes)

    def _frequent(self, known: dict[str, int], counts: NDArray[np.int64]) -> tuple[str, ...]:
        """The values that training rows have, most frequent first, as many as there are codes."""
        order = sorted((value for value in known if counts[known[value]]), key=lambda v: (-counts[known[v]], v))
        return tuple(order[: self.format.code_size - 1])


def numbers_of(cells: Cells, column: str, advice: str) -> NDArray[np.float64]:
    """Return a column of numbers, float64 [B], NaN where there is none.

    Raises:
        UserError: it holds something else; ``advice`` ends the sentence.
    """
    array = cells.plain(column)
    kind = array.type
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not plain and not pa.types.is_null(kind) and not pa.types.is_decimal(kind):
        raise UserError(f"{cells.source}: column {column!r} holds {kind} and no numbers; {advice}")
    numbers = array.cast(pa.int8() if pa.types.is_boolean(kind) else kind).cast(pa.float64(), safe=False)
    return np.array(numbers.to_numpy(zero_copy_only=False), np.float64)
