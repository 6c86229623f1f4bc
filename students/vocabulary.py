"""Vocabularies of students, made from their teacher's: cut to fewer tokens, or with tokens that share an id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from distill.contracts import UserError
from distill.runs import read_json, write_json


def word_pieces(tokenizer_file: Path) -> dict[str, int]:
    """Token -> id of a WordPiece ``tokenizer.json``, placeholders such as ``[unused1]`` left out, by rising id.

    Raises:
        UserError: the tokenizer is no WordPiece one.
    """
    vocab, special = _wordpiece(tokenizer_file)["model"]["vocab"], special_tokens(tokenizer_file)
    kept = {token: code for token, code in vocab.items() if token in special or not token.startswith("[unused")}
    return dict(sorted(kept.items(), key=lambda item: item[1]))


def word_beginnings(tokenizer_file: Path) -> dict[str, int]:
    """Those of :func:`word_pieces` that begin a word: neither special tokens nor continuations such as ``##s``."""
    prefix, special = _continuation(tokenizer_file), special_tokens(tokenizer_file)
    pieces = word_pieces(tokenizer_file).items()
    return {token: code for token, code in pieces if token not in special and not token.startswith(prefix)}


def special_tokens(tokenizer_file: Path) -> list[str]:
    """Added tokens, the unknown token and those around a text, of a WordPiece ``tokenizer.json``."""
    tree = _wordpiece(tokenizer_file)
    added = [entry["content"] for entry in tree["added_tokens"]]
    return list(dict.fromkeys([*added, tree["model"]["unk_token"], *_frame_tokens(tree.get("post_processor"))]))


def reduce_vocabulary(tokenizer_file: Path, texts: Iterable[str], size: int, target: Path) -> NDArray[np.int64]:
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
    vocab, special = word_pieces(tokenizer_file), special_tokens(tokenizer_file)
    full = Tokenizer.from_file(str(tokenizer_file))
    prefix = _continuation(tokenizer_file)
    characters = [token for token in vocab if len(token.removeprefix(prefix)) == 1]
    counts: dict[str, int] = {}
    for encoding in full.encode_batch(list(texts)):
        for token in encoding.tokens:
            counts[token] = counts.get(token, 0) + 1
    seen = sorted(counts, key=lambda token: (-counts[token], vocab[token]))
    order = list(dict.fromkeys([*special, *characters, *seen, *vocab]))
    needed = len(dict.fromkeys([*special, *characters]))
    if not needed <= size <= len(order):
        raise UserError(
            f"vocab_size {size} does not fit {tokenizer_file.parent.name}: special tokens and single characters alone "
            f"are {needed}, the whole vocabulary is {len(order)}; choose a size between"
        )
    kept = sorted(order[:size], key=lambda token: vocab[token])
    renumber(tokenizer_file, {token: index for index, token in enumerate(kept)}, target)
    return np.array([vocab[token] for token in kept], dtype=np.int64)


def renumber(tokenizer_file: Path, ids: Mapping[str, int], target: Path) -> None:
    """Write a WordPiece tokenizer again, with these tokens and ids; several tokens may have one id.

    Args:
        tokenizer_file: a WordPiece ``tokenizer.json``.
        ids: token -> new id, special tokens included.
        target: where the new ``tokenizer.json`` goes.
    """
    tree = _wordpiece(tokenizer_file)
    tree["model"]["vocab"] = dict(ids)
    for entry in tree["added_tokens"]:
        entry["id"] = ids[entry["content"]]
    _renumber_frame(tree.get("post_processor"), ids)
    tree["padding"] = tree["truncation"] = None
    write_json(target, tree)


def frame_ids(tokenizer_file: Path) -> tuple[int, int]:
    """The ids that a tokenizer puts before and after a text."""
    ids = Tokenizer.from_file(str(tokenizer_file)).encode("a").ids
    return ids[0], ids[-1]


def _wordpiece(tokenizer_file: Path) -> dict[str, Any]:
    tree = read_json(tokenizer_file)
    if tree["model"]["type"] != "WordPiece":
        raise UserError(
            f"{tokenizer_file}: only WordPiece vocabularies can be reduced, this is {tree['model']['type']}"
        )
    return tree


def _continuation(tokenizer_file: Path) -> str:
    """What tokens begin with that continue a word."""
    return _wordpiece(tokenizer_file)["model"]["continuing_subword_prefix"]


def _frame_tokens(node: object) -> list[str]:
    """The tokens that a template post-processor (or BERT's) puts around a text."""
    if not isinstance(node, dict):
        return []
    return [*(node.get("special_tokens") or {}), *(node[side][0] for side in ("sep", "cls") if side in node)]


def _renumber_frame(node: object, ids: Mapping[str, int]) -> None:
    """Give the special tokens of a template post-processor (or BERT's) their new ids."""
    if not isinstance(node, dict):
        return
    for name, entry in (node.get("special_tokens") or {}).items():
        entry["ids"] = [ids[name]]
    for side in ("sep", "cls"):
        if side in node:
            node[side] = [node[side][0], ids[node[side][0]]]
