"""Pruning of word embeddings: rows of tokens that training hardly has go, and their ids are read as unknown.

The tokenizer stays as it is, since one with fewer pieces would cut texts into others (merges of BPE build on each
other). So texts of kept tokens are read as before, to the bit. What is done is a pruning plan as any other: indices of
the table that stay, and the encoder's attributes ``kept_tokens`` and ``unknown_token``, for which whatever makes its
inputs asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from distill.contracts import UserError
from distill.prune.plans import KEPT_TOKENS, PrunePlan

FIRST = 8
"""Ids that stay in any case: padding is among them, by which some towers count positions, and what examples are of."""
ROLES = ("padding_idx", "eos_token_id")
"""Attributes of modules that are token ids."""


def plan_vocabulary(
    model: nn.Module,
    path: str,
    counts: NDArray[np.int64],
    min_count: int,
    special: Iterable[int],
    unknown: int | None,
) -> PrunePlan:
    """Decide which rows of a text encoder's table stay.

    Args:
        model: any module; it is not changed.
        path: of the encoder in it, which has all rows.
        counts: int64 [V], how often training rows have each token.
        min_count: tokens that come fewer times go.
        special: ids that stay in any case.
        unknown: the one of them that the others are read as; None: they are left out of texts.

    Returns:
        The plan, whose report has ``tokens`` and ``parameters``, each ``[before, after]``; an empty one where no token
        goes.

    Raises:
        UserError: the encoder has no such table, or another part of the model shares it.
    """
    encoder: Any = model.get_submodule(path)
    name = f"{path}.{encoder.word_table}" if encoder.word_table else ""
    if not name:
        raise UserError(f"prune.vocabulary: {path} has no table of word embeddings; leave it out")
    table: Any = model.get_submodule(name)
    _refuse_shared(model, name, table)
    size = table.num_embeddings
    kept = np.zeros(size, dtype=np.bool_)
    kept[:FIRST] = True
    kept[counts >= min_count] = True
    roles = list(_roles(model, path, size))
    for code in (*special, encoder.pad_id, *(code for *_, code in roles)):
        kept[code] = True
    ids = np.flatnonzero(kept)
    if len(ids) == size:
        return PrunePlan()
    places = {int(code): place for place, code in enumerate(ids)}
    attributes: dict[str, dict[str, Any]] = {
        path: {
            KEPT_TOKENS: ids.tolist(),
            "unknown_token": -1 if unknown is None else unknown,
            "pad_id": places[encoder.pad_id],
        },
        name: {"num_embeddings": len(ids)},
    }
    for module, attribute, code in roles:
        attributes.setdefault(module, {})[attribute] = places[code]
    whole = sum(parameter.numel() for parameter in model.parameters())
    gone = (size - len(ids)) * table.embedding_dim
    report = {"tokens": [size, len(ids)], "parameters": [whole, whole - gone]}
    tensors = {f"{name}.weight": {"0": {"of": size, "kept": ids.tolist()}}}
    return PrunePlan(tensors, attributes, report=report)


def _roles(model: nn.Module, path: str, size: int) -> Iterable[tuple[str, str, int]]:
    """Module, attribute and value of ids that modules of an encoder look for."""
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        for attribute in ROLES:
            code = getattr(module, attribute, None)
            if isinstance(code, int) and 0 <= code < size:
                yield name, attribute, code


def _refuse_shared(model: nn.Module, name: str, table: nn.Embedding) -> None:
    """Rows of a matrix that is a decoder's or another encoder's too cannot go."""
    others = [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is table.weight and other != f"{name}.weight"
    ]
    if others:
        raise UserError(
            f"prune.vocabulary: {others[0]!r} is the same matrix as {name!r}, and would lose what it writes or reads "
            "by; leave prune.vocabulary out"
        )
