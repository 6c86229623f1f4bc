"""What a student's encoders inherit from the teacher's: a vocabulary with a static embedding a token, or all weights.

The teacher's text tower is run over its own vocabulary, one token at a time, and the outputs are reduced by PCA (as in
Model2Vec, Tulkens & van Dongen 2024). A smaller vocabulary leaves parameters for wider embeddings: dropped word pieces
fall apart into shorter ones that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from distill.contracts import UserError
from distill.runs import read_json, write_json


def reduce_vocabulary(tokenizer_file: Path, texts: Iterable[str], size: int, target: Path) -> np.ndarray:
    """Write a tokenizer with at most ``size`` word pieces and return the old ids of its tokens.

    Kept, in this order: special tokens, single characters (so that every word can still be spelled), the tokens of
    ``texts``, then the rest in the order of the vocabulary, which for BERT's is by falling frequency.

    Args:
        tokenizer_file: a WordPiece ``tokenizer.json``.
        texts: training texts.
        size: largest number of tokens.
        target: where the smaller ``tokenizer.json`` goes.

    Returns:
        int64 [V], V <= size: position = new id, value = old id.

    Raises:
        UserError: the tokenizer is no WordPiece one, or ``size`` cannot hold the necessary tokens.
    """
    tree = read_json(tokenizer_file)
    if tree["model"]["type"] != "WordPiece":
        raise UserError(
            f"{tokenizer_file}: only WordPiece vocabularies can be reduced, this is {tree['model']['type']}"
        )
    vocab: dict[str, int] = tree["model"]["vocab"]
    full = Tokenizer.from_file(str(tokenizer_file))
    added = [entry["content"] for entry in tree["added_tokens"]]
    special = [*added, tree["model"]["unk_token"], *_frame_tokens(tree.get("post_processor"))]
    prefix = tree["model"]["continuing_subword_prefix"]
    characters = [token for token in vocab if len(token.removeprefix(prefix)) == 1]
    counts: dict[str, int] = {}
    for encoding in full.encode_batch(list(texts)):
        for token in encoding.tokens:
            counts[token] = counts.get(token, 0) + 1
    seen = sorted(counts, key=lambda token: (-counts[token], vocab[token]))
    rest = [token for token in vocab if not token.startswith("[unused")]
    order = list(dict.fromkeys([*special, *characters, *seen, *rest]))
    needed = len(dict.fromkeys([*special, *characters]))
    if not needed <= size <= len(order):
        raise UserError(
            f"vocab_size {size} does not fit {tokenizer_file.parent.name}: special tokens and single characters alone "
            f"are {needed}, the whole vocabulary is {len(order)}; choose a size between"
        )
    kept = sorted(order[:size], key=lambda token: vocab[token])
    tree["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    for entry in tree["added_tokens"]:
        entry["id"] = tree["model"]["vocab"][entry["content"]]
    _renumber(tree.get("post_processor"), tree["model"]["vocab"])
    tree["padding"] = tree["truncation"] = None
    write_json(target, tree)
    return np.array([vocab[token] for token in kept], dtype=np.int64)


def _frame_tokens(node: object) -> list[str]:
    """The tokens that a template post-processor (or BERT's) puts around a text."""
    if not isinstance(node, dict):
        return []
    return [*(node.get("special_tokens") or {}), *(node[side][0] for side in ("sep", "cls") if side in node)]


def _renumber(node: object, vocab: dict[str, int]) -> None:
    """Give the special tokens of a template post-processor (or BERT's) their new ids."""
    if not isinstance(node, dict):
        return
    for name, entry in (node.get("special_tokens") or {}).items():
        entry["ids"] = [vocab[name]]
    for side in ("sep", "cls"):
        if side in node:
            node[side] = [node[side][0], vocab[node[side][0]]]


def embed_tokens(
    encode: Callable[[Tensor, Tensor], Tensor], token_ids: np.ndarray, frame: tuple[int, int], *, batch_size: int = 512
) -> Tensor:
    """Run a text tower over single tokens: the masked mean of its outputs for ``[open] token [close]``.

    Args:
        encode: int64 [B, 3], bool [B, 3] -> [B, 3, D].
        token_ids: int64 [V], the teacher's ids.
        frame: ids of the opening and closing token.
        batch_size: tokens a forward of the tower.

    Returns:
        float32 [V, D].
    """
    parts = []
    with torch.inference_mode():
        for chunk in np.array_split(token_ids, max(1, len(token_ids) // batch_size)):
            middle = torch.from_numpy(chunk)
            text = torch.stack([torch.full_like(middle, frame[0]), middle, torch.full_like(middle, frame[1])], dim=1)
            parts.append(encode(text, torch.ones_like(text, dtype=torch.bool)).float().mean(1))
    return torch.cat(parts)


def reduce_width(table: Tensor, dim: int, *, rarity_weight: bool = True) -> Tensor:
    """Reduce a token table to its first ``dim`` principal components, whole table scaled to unit variance.

    Args:
        table: [V, D].
        dim: width wanted, at most D.
        rarity_weight: scale row r by log(1 + r), the vocabulary being ordered by falling frequency: common words then
            count less in the mean, as in smooth inverse frequency weighting (Arora et al. 2017).

    Returns:
        [V, dim] float32.
    """
    if dim > table.shape[1]:
        raise UserError(f"cannot inherit {dim}-wide embeddings from {table.shape[1]}-wide ones; use at most that width")
    centred = table.double() - table.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    basis = vectors.flip(-1)[:, :dim]
    basis = basis * basis.sum(0).sign()  # eigenvectors have no sign of their own; this one is the same everywhere
    reduced = centred @ basis
    if rarity_weight:
        reduced = reduced * torch.log1p(torch.arange(1, len(reduced) + 1, dtype=torch.float64))[:, None]
    return (reduced / reduced.std()).float()


def frame_ids(tokenizer_file: Path) -> tuple[int, int]:
    """The ids that a tokenizer puts before and after a text."""
    ids = Tokenizer.from_file(str(tokenizer_file)).encode("a").ids
    return ids[0], ids[-1]


def token_embeddings(
    *,
    encoder: Any,
    project: Callable[[Tensor], Tensor],
    student: Any,
    token_ids: np.ndarray,
    projected: bool = True,
    freeze: bool = True,
    rarity_weight: bool = False,
) -> None:
    """Fill a student's table with the teacher's static token embeddings.

    Args:
        encoder: the teacher's text encoder: ``encode`` and ``tokenizer_file``.
        project: the teacher's fitted projection of a pooled vector, [V, D] -> [V, P].
        student: the student's text encoder, whose ``table`` is written.
        token_ids: int64 [V], the teacher's id of each of the student's tokens.
        projected: reduce the projected embeddings, so that the directions which the tasks use are kept, and not those
            in which the tower varies most.
        freeze: keep the table fixed in training: it then serves words that training never saw as well as those it did.
        rarity_weight: see :func:`reduce_width`.
    """
    table = embed_tokens(encoder.encode, token_ids, frame_ids(encoder.tokenizer_file))
    with torch.no_grad():
        table = project(table) if projected else table
        student.table.weight.copy_(reduce_width(table, student.table.embedding_dim, rarity_weight=rarity_weight))
    student.table.weight.requires_grad_(not freeze)


def encoder_weights(*, encoder: Any, student: Any) -> None:
    """Start a student's encoder with the weights of the teacher's, which is built alike; it then trains on.

    Args:
        encoder: the teacher's encoder.
        student: the student's encoder, which is written.

    Raises:
        UserError: they are not built alike.
    """
    try:
        student.load_state_dict(encoder.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the student's encoder is not built as the teacher's: {reason}") from error
