"""Batches and outputs in parts: rows taken out, put together again, and a batch read in parts for want of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill.contracts import Batch, Outputs
from distill.resources import first_line, out_of_memory

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


def take(item: Any, rows: Tensor) -> Any:
    """Rows of a Batch or of Outputs.

    Args:
        item: the batch, whose inputs may end before it does, or the outputs.
        rows: int64 [M], ascending.
    """

    def pick(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: pick(tensor) for name, tensor in value.items()}
        return value[rows[rows < len(value)]]

    return type(item)(*(pick(value) for value in item))


def rows_of(batch: Batch, some: slice) -> Batch:
    """Neighbouring rows of a batch; all of them without a copy."""
    if some == slice(0, len(batch.ids)):
        return batch
    taken: Batch = take(batch, torch.arange(len(batch.ids), device=batch.ids.device)[some])
    return taken


class TeacherMemoryError(RuntimeError):
    """The memory does not suffice for a teacher to read single rows."""


class InParts:
    """Asks a teacher about rows in as many parts as the memory needs; its answer to a row is of that row alone.

    Attributes:
        count: in how many; once more were needed, they stay.
    """

    def __init__(self) -> None:
        self.count = 1

    def __call__(self, ask: Callable[[slice], Answer], rows: int, join: Callable[[list[Answer]], Answer]) -> Answer:
        """Return the answer to all rows.

        Args:
            ask: gives the answer to some rows.
            rows: how many there are; a rank may have none.
            join: puts answers together.

        Raises:
            TeacherMemoryError: the memory does not suffice for single rows.
        """
        while True:
            size, parts = max(1, -(-rows // self.count)), []
            try:
                parts += [ask(slice(start, min(start + size, rows))) for start in range(0, max(rows, 1), size)]
                return parts[0] if len(parts) == 1 else join(parts)
            except (RuntimeError, MemoryError) as error:
                parts.clear()
                if not out_of_memory(error):
                    raise
                if size == 1:
                    message = f"out of memory in the teacher with one row at a time ({first_line(error)})"
                    raise TeacherMemoryError(f"{message}; use a smaller teacher") from error
            self.count *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.warning("out of memory in the teacher: it now reads batches in %d parts", self.count)


def join_rows(parts: list[Outputs]) -> Outputs:
    """Outputs of neighbouring rows as those of all."""
    return Outputs(
        *({name: torch.cat([part[name] for part in some]) for name in some[0]} for some in zip(*parts, strict=True))
    )
