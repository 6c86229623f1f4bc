"""Rows as their source has them, before any format: what somebody who deploys a model would give it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill import runs
from distill.data.columns import Source
from distill.data.prepared import ROWS_FILE, PreparedData
from distill.data.sources import open_source
from distill.data_config import DataConfig
from distill.formats import TABULAR, TEXT


class RawRows:
    """Raw values of prepared rows.

    Args:
        data: the prepared data.
        config: the recipe's ``data``.
        base: folder that its relative paths start from.

    Raises:
        UserError: the source has gone.
    """

    def __init__(self, data: PreparedData, config: DataConfig, base: Path = Path()) -> None:
        self._data, self._config = data, config
        self._numbers = np.asarray(runs.read_array(data.folder / ROWS_FILE, mmap_mode="r")["source_row"])
        self._source: Source = open_source(config.source, base, data.folder)

    def values(self, modality: str, rows: NDArray[np.int64]) -> list[Any]:
        """Return a modality's values of some rows, as :class:`~distill.preprocess.Preprocessor` takes them.

        Records are read from the source's first row up to the last of these.

        Raises:
            BadInput: a cell is none that the modality can have.
        """
        if modality == TEXT:
            return [self._data.texts[int(row)] for row in rows]
        columns = self._config.columns(modality)
        if modality == TABULAR:
            return self._records(columns, self._numbers[rows].tolist())
        return [self._source.media(int(row), columns[0]) for row in self._numbers[rows]]

    def first(self, rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Return those of some rows that come first in the source."""
        order = np.argsort(self._numbers[rows], kind="stable")
        return rows[order[:count]]

    def _records(self, columns: Sequence[str], wanted: Sequence[int]) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        start = 0
        for piece in self._source.read(columns):
            here = [row for row in wanted if start <= row < start + piece.table.num_rows]
            for row in here:
                found[row] = {name: piece.table.column(name)[row - start].as_py() for name in columns}
            start += piece.table.num_rows
            if start > max(wanted):
                break
        return [found[row] for row in wanted]
