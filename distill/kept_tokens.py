"""Which of a tokenizer's ids a model still has embeddings for, after its vocabulary was pruned. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEFT_OUT = -1
"""The place of a token that a text loses, where no token stands for unknown ones."""


@dataclass(frozen=True)
class KeptTokens:
    """A tokenizer's ids to the rows of a pruned table; texts are cut into the same tokens as before.

    Attributes:
        ids: the tokenizer's ids that have a row, rising; the place of an id is its row.
        unknown: the one of them that all other ids are read as; None: these are left out of texts.
    """

    ids: tuple[int, ...]
    unknown: int | None

    def __post_init__(self) -> None:
        """Check the ids.

        Raises:
            ValueError: they are none, negative, not rising, or lack ``unknown``.
        """
        if not all(type(value) is int for value in (*self.ids, self.unknown or 0)):
            raise ValueError("kept tokens are not whole numbers")
        if not self.ids or self.ids[0] < 0 or any(a >= b for a, b in zip(self.ids, self.ids[1:], strict=False)):
            raise ValueError("kept tokens are not rising ids from 0 on")
        if self.unknown is not None and self.unknown not in self.ids:
            raise ValueError(f"the unknown token {self.unknown} is not among the kept ones")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> KeptTokens:
        """Read what :meth:`to_json` made.

        Raises:
            ValueError, KeyError or TypeError: it is malformed.
        """
        return cls(tuple(value["kept"]), value["unknown"])

    def to_json(self) -> dict[str, Any]:
        """Return ``{"kept": [ids], "unknown": id or None}``."""
        return {"kept": list(self.ids), "unknown": self.unknown}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of each id, of the same shape; :data:`LEFT_OUT` where a text loses the token."""
        known = self._sorted
        places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return np.where(known[places] == ids, places, self._other)

    @cached_property
    def _sorted(self) -> NDArray[np.int64]:
        return np.array(self.ids, dtype=np.int64)

    @cached_property
    def _other(self) -> int:
        return LEFT_OUT if self.unknown is None else self.ids.index(self.unknown)
