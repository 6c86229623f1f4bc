"""What a student's encoders inherit: of the teacher's, a static embedding a token or weights; or vectors of a file.

The teacher's text tower is run over its own vocabulary, one token at a time, and the outputs are reduced by PCA (as in
Model2Vec, Tulkens & van Dongen 2024). A table with fewer rows than the teacher has tokens is shared: every token stays,
and those that mean nearly the same to the teacher have one row (Model2Vec's vocabulary quantization).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.contracts import UserError
from students.vectors import read_vectors
from students.vocabulary import frame_ids, renumber, special_tokens, word_beginnings, word_pieces

log = logging.getLogger(__name__)
LAYER = re.compile(r"(\blayers?\.)(\d+)\.")  # of a weight's name in transformers
ROUNDS = 1  # of k-means; it starts from the tokens that were kept, and more rounds gave no more accuracy
CHUNK = 1024  # tokens whose distances to all centres are held at once


def embed_tokens(
    encode: Callable[[Tensor, Tensor], Tensor],
    token_ids: NDArray[np.int64],
    frame: tuple[int, int],
    *,
    batch_size: int = 512,
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


def share_rows(table: Tensor, own: NDArray[np.int64], alone: NDArray[np.bool_]) -> tuple[Tensor, NDArray[np.int64]]:
    """Let tokens share rows, by k-means (Lloyd's algorithm) that starts from some of them.

    Args:
        table: float [V, D], an embedding a token.
        own: int64 [K], the tokens at which the K clusters start.
        alone: bool [K], clusters that keep the token they start at, and no other.

    Returns:
        float [K, D], the shared rows, and int64 [V], the row of each token.
    """
    centres, lonely = table[torch.from_numpy(own)].clone(), torch.from_numpy(alone)
    for _ in range(ROUNDS):
        rows = _nearest(table, centres, lonely, own)
        sums = torch.zeros_like(centres).index_add_(0, rows, table)
        counts = torch.bincount(rows, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres, _nearest(table, centres, lonely, own).numpy()


def _nearest(table: Tensor, centres: Tensor, lonely: Tensor, own: NDArray[np.int64]) -> Tensor:
    """The nearest centre of each token, int64 [V]; a lonely centre is only its own token's."""
    offset = (centres.square().sum(1) / 2).masked_fill(lonely, torch.inf)
    rows = torch.cat([(chunk @ centres.T - offset).argmax(1) for chunk in table.split(CHUNK)])
    rows[torch.from_numpy(own)[lonely]] = lonely.nonzero()[:, 0]
    return rows


def token_embeddings(
    *,
    encoder: Any,
    project: Callable[[Tensor], Tensor],
    student: Any,
    token_ids: NDArray[np.int64],
    projected: bool = True,
    freeze: bool = True,
    rarity_weight: bool = False,
    share: bool = True,
) -> None:
    """Fill a student's table with the teacher's static token embeddings.

    Args:
        encoder: the teacher's text encoder: ``encode`` and ``tokenizer_file``.
        project: the teacher's fitted projection of a pooled vector, [V, D] -> [V, P].
        student: the student's text encoder, whose ``table`` is written, and its ``tokenizer_file`` if rows are shared.
        token_ids: int64 [V], the teacher's ids of the tokens that a vocabulary of V tokens keeps, rising.
        projected: reduce the projected embeddings, so that the directions which the tasks use are kept, and not those
            in which the tower varies most.
        freeze: keep the table fixed in training: it then serves words that training never saw as well as those it did.
        rarity_weight: see :func:`reduce_width`.
        share: the V rows serve every token of the teacher; see :func:`share_rows`. Without it, words that are not among
            the V tokens fall apart into shorter ones.
    """
    vocabulary = word_pieces(encoder.tokenizer_file)
    known = np.fromiter(vocabulary.values(), dtype=np.int64) if share else token_ids
    table = embed_tokens(encoder.encode, known, frame_ids(encoder.tokenizer_file))
    with torch.no_grad():
        table = project(table) if projected else table
        table = reduce_width(table, student.table.embedding_dim, rarity_weight=rarity_weight)
        if share and len(token_ids) < len(known):
            special = [vocabulary[token] for token in special_tokens(encoder.tokenizer_file)]
            own = np.searchsorted(known, token_ids)
            table, rows = share_rows(table, own, np.isin(token_ids, special))
            renumber(encoder.tokenizer_file, dict(zip(vocabulary, rows.tolist(), strict=True)), student.tokenizer_file)
        student.table.weight.copy_(table)
    student.table.weight.requires_grad_(not freeze)


def tower_weights(*, encoder: Any, student: Any) -> None:
    """Start a student's transformer tower with a part of the teacher's, which may be deeper and wider.

    Layers are taken evenly, the first and the last among them; of each weight the first rows and columns, and so the
    first heads (the manual inheritance of TinyCLIP: Wu et al. 2023, arXiv 2309.12314).

    Args:
        encoder: the teacher's encoder, with a ``tower`` in transformers format.
        student: the student's encoder, whose ``tower`` is written.

    Raises:
        UserError: the towers are of different kinds.
    """
    given, wanted = encoder.tower.state_dict(), student.tower.state_dict()
    depths = [tower.config.num_hidden_layers for tower in (student.tower, encoder.tower)]
    taken = np.linspace(0, depths[1] - 1, depths[0]).round().astype(int).tolist()
    found = {}
    for name, tensor in wanted.items():
        source = LAYER.sub(lambda match: f"{match[1]}{taken[int(match[2])]}.", name)
        if source not in given or given[source].ndim != tensor.ndim:
            raise UserError(f"the student's tower is of another kind than the teacher's, which has no {source!r}")
        packed = 3 if "in_proj_" in name else 1  # queries, keys and values in one weight
        parts = zip(given[source].chunk(packed), tensor.chunk(packed), strict=True)
        found[name] = torch.cat([big[tuple(slice(size) for size in small.shape)] for big, small in parts])
    try:
        student.tower.load_state_dict(found)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the student's tower is larger than the teacher's: {reason}") from error


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


def word_vectors(*, student: Any, file: str, freeze: bool = False) -> None:
    """Start rows of a student's table with the word vectors of a file; it then trains on, unless it is frozen.

    GloVe's (Pennington et al. 2014) and word2vec's (Mikolov et al. 2013, arXiv 1301.3781) text files are read. Special
    tokens, continuations of words (``##s``) and words that the file lacks keep their initial rows.

    Args:
        student: the student's text encoder, whose ``table`` is written and whose ``tokenizer_file`` names the rows.
        file: the file, relative to the working directory; gzip is unpacked.
        freeze: keep the table fixed in training, the rows that were not found too.

    Raises:
        UserError: the file cannot be read (:func:`~students.vectors.read_vectors`), or has none of the words.
    """
    rows = word_beginnings(student.tokenizer_file)
    found = read_vectors(Path(file), rows, student.table.embedding_dim)
    if not found:
        raise UserError(f"{file}: none of its words is one of the {len(rows)} in the student's vocabulary; give others")
    with torch.no_grad():
        places = torch.tensor([rows[word] for word in found])
        student.table.weight[places] = torch.from_numpy(np.stack([*found.values()])).to(student.table.weight)
    student.table.weight.requires_grad_(not freeze)
    log.info("%s: vectors of %d of the student's %d words", file, len(found), len(rows))
