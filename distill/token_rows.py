"""Which row of a pruned table of word embeddings a tokenizer's id is read from. Without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TokenRows:
    """A tokenizer's ids to rows of a table that has fewer; several ids may share one.

    The tokenizer stays as it was, so that texts are cut into the same tokens. Equal ones are the same dictionary key.

    Attributes:
        rows: int64 [V], the row of each id.
        count: rows of the table.
    """

    def __init__(self, rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Take the row of each id.

        Raises:
            ValueError: there are none, or some are no whole numbers from 0 on.
        """
        given = np.asarray(rows)
        if given.ndim != 1 or not len(given) or given.dtype.kind != "i" or given.min() < 0:
            raise ValueError("the rows of token ids are not whole numbers from 0 on")
        self.rows = given.astype(np.int64)
        self.count = int(self.rows.max()) + 1

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        """Return whether all ids have the same rows."""
        return isinstance(other, TokenRows) and self._digest == other._digest

    def __hash__(self) -> int:
        """Return the same for the same rows."""
        return hash(self._digest)

    def to_json(self) -> list[Any]:
        """Return the rows as a list."""
        return self.rows.tolist()

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.rows.tobytes()).digest()
