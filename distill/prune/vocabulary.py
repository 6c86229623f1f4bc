"""Pruning of word embeddings: tokens that training hardly has lose their row, and are read as another one.

The tokenizer stays as it is, since one with fewer pieces would cut texts into others (merges of BPE build on each
other). So texts of kept tokens are read as before, to the bit. What is done is a pruning plan as any other: indices of
the table that stay, and the encoder's attribute ``token_rows``, for which whatever makes its inputs asks.

A dropped token takes the row of the kept one whose embedding has the highest cosine with its own, as words that a model
never met in training would otherwise all mean the same; the idea is that of vocabulary quantization in Model2Vec.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.contracts import UserError
from distill.prune.plans import TOKEN_ROWS, PrunePlan

FIRST = 8
"""Ids that stay in any case: padding is among them, by which some towers count positions, and what examples are of."""
ROLES = ("padding_idx", "eos_token_id")
"""Attributes of modules that are token ids."""
CHUNK = 1024
"""Dropped tokens that are compared with the kept ones at a time."""


def plan_vocabulary(
    model: nn.Module,
    path: str,
    counts: NDArray[np.int64],
    min_count: int,
    special: Iterable[int],
    unknown: int | None = None,
) -> PrunePlan:
    """Decide which rows of a text encoder's table stay.

    Args:
        model: any module; it is not changed.
        path: of the encoder in it, which has all rows.
        counts: int64 [V], how often training rows have each token.
        min_count: tokens that come fewer times go.
        special: ids that stay in any case.
        unknown: the one of them that dropped tokens are read as; None: each is read as the kept one most like it.

    Returns:
        The plan, whose report has ``tokens`` and ``parameters``, each ``[before, after]``; an empty one where no token
        goes.

    Raises:
        UserError: the encoder has no such table, another part of the model shares it, or no token is so frequent.
    """
    encoder: Any = model.get_submodule(path)
    name = f"{path}.{encoder.word_table}" if encoder.word_table else ""
    if not name:
        raise UserError(f"prune.vocabulary: {path} has no table of word embeddings; leave it out")
    table: Any = model.get_submodule(name)
    _refuse_shared(model, name, table)
    frequent, kept = counts >= min_count, np.arange(len(counts)) < FIRST
    frequent[list(special)] = False
    if not frequent.any():
        raise UserError(f"prune.vocabulary.min_count: no token comes {min_count} times in the training rows; lower it")
    roles = list(_roles(model, path, len(counts)))
    kept[[*special, encoder.pad_id, *(code for *_, code in roles)]] = True
    kept |= frequent
    if kept.all():
        return PrunePlan()
    ids, rows = np.flatnonzero(kept), np.cumsum(kept) - 1
    targets = _nearest(table.weight, kept, frequent) if unknown is None else unknown
    rows[~kept] = rows[targets]
    attributes: dict[str, dict[str, Any]] = {
        path: {TOKEN_ROWS: rows.tolist(), "pad_id": int(rows[encoder.pad_id])},
        name: {"num_embeddings": len(ids)},
    }
    for module, attribute, code in roles:
        attributes.setdefault(module, {})[attribute] = int(rows[code])
    whole = sum(parameter.numel() for parameter in model.parameters())
    gone = (len(counts) - len(ids)) * table.embedding_dim
    report = {"tokens": [len(counts), len(ids)], "parameters": [whole, whole - gone]}
    tensors = {f"{name}.weight": {"0": {"of": len(counts), "kept": ids.tolist()}}}
    return PrunePlan(tensors, attributes, report=report)


@torch.no_grad()
def _nearest(weight: Tensor, kept: NDArray[np.bool_], frequent: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each dropped id the frequent one whose embedding has the highest cosine with its own."""
    directions = F.normalize(weight.detach().cpu().float(), dim=1)
    candidates = torch.from_numpy(np.flatnonzero(frequent))
    whole = directions[candidates].T
    chunks = directions[torch.from_numpy(~kept)].split(CHUNK)
    return candidates[torch.cat([(chunk @ whole).argmax(dim=1) for chunk in chunks])].numpy()


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
