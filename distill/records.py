"""Rows of named tensors as records: the floating values of a row lie side by side, so that a row is read at once.

A teacher's outputs are a dozen small tensors; read one by one, a batch would cost a dozen times the start of a copy,
and on a disk a dozen pages a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RECORD = "record"

Described = Mapping[str, Mapping[str, Any]]
"""Name -> ``shape`` of a row and ``dtype``, in order of the names."""


def describe(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return what is known of tensors [N, ...] without their values."""
    return {
        name: {"shape": list(tensor.shape[1:]), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in sorted(tensors.items())
    }


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``record`` [N, W], the values of all floating tensors [N, ...] in order of their names, and the others."""
    assert RECORD not in tensors, f"no output may be called {RECORD!r}"
    floating = [tensors[name].reshape(len(tensors[name]), -1) for name in sorted(tensors) if _floats(tensors[name])]
    others = {name: tensor.contiguous() for name, tensor in tensors.items() if not _floats(tensor)}
    return {RECORD: torch.cat(floating, dim=1), **others} if floating else others


def describe_packed(described: Described) -> dict[str, dict[str, Any]]:
    """Return what :func:`describe` says of the tensors that :func:`pack` makes of some so described."""
    floating = [spec for spec in described.values() if _is_floating(spec)]
    packed = {name: dict(spec) for name, spec in described.items() if not _is_floating(spec)}
    if floating:
        width = sum(math.prod(spec["shape"]) for spec in floating)
        packed[RECORD] = {"shape": [width], "dtype": floating[0]["dtype"]}
    return dict(sorted(packed.items()))


def unpack(packed: Mapping[str, Tensor], described: Described, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Undo :func:`pack`.

    Args:
        packed: what it returned, or rows of it.
        described: what it was given, as :func:`describe` says.
        dtype: of floating tensors; None keeps the stored type.

    Returns:
        Name -> [N, ...], views of one tensor.
    """
    result = {name: packed[name] for name, spec in described.items() if not _is_floating(spec)}
    floating = {name: spec["shape"] for name, spec in described.items() if _is_floating(spec)}
    if floating:
        record = packed[RECORD] if dtype is None else packed[RECORD].to(dtype)
        parts = record.split([math.prod(shape) for shape in floating.values()], dim=1)
        result |= {name: part.view(-1, *shape) for part, (name, shape) in zip(parts, floating.items(), strict=True)}
    return {name: result[name] for name in described}


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _is_floating(spec: Mapping[str, Any]) -> bool:
    return getattr(torch, spec["dtype"]).is_floating_point
