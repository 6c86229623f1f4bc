"""A transfer set: texts without labels, on which a student learns what its teacher says (Hinton et al. 2015,
arXiv 1503.02531).

They are training texts in which random words of the teacher's vocabulary stand in the place of some (word replacement,
as in Tang et al. 2019, arXiv 1903.12136). So the student learns what the teacher makes of words that no training text
has, which labels cannot teach.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from distill.contracts import UserError

SHORTEST = 3  # letters of a word; shorter entries of a vocabulary are mostly no words


def whole_words(tokenizer_file: Path) -> list[str]:
    """Return the words, of three letters or more, that a tokenizer keeps in one piece, sorted.

    Raises:
        UserError: it has none, or the file is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{tokenizer_file} is not a tokenizer.json: {' '.join(str(error).split())}") from error
    tokenizer.no_padding()
    found = {tokenizer.decode([token]).strip() for token in range(tokenizer.get_vocab_size())}
    words = sorted(word for word in found if word.isalpha() and len(word) >= SHORTEST)
    whole = [len(encoding.ids) == 1 for encoding in tokenizer.encode_batch(words, add_special_tokens=False)]
    if not any(whole):
        raise UserError(
            f"{tokenizer_file}: no word is a token of its own, so transfer.texts cannot be made; set it to 0"
        )
    return [word for word, kept in zip(words, whole, strict=True) if kept]


def replace_words(
    texts: Sequence[str], words: Sequence[str], count: int, *, probability: float, seed: int
) -> list[str]:
    """Make texts: each is a random one of ``texts`` with some words replaced by random ``words``.

    A word is a run of letters and digits, so a text without spaces between its words counts as one.

    Args:
        texts: to start from.
        words: to put in.
        count: number of texts wanted.
        probability: of replacing a word.
        seed: of every choice.
    """
    random = np.random.default_rng(seed)

    def other(match: re.Match[str]) -> str:
        return words[int(random.integers(len(words)))] if random.random() < probability else match[0]

    return [re.sub(r"\w+", other, texts[int(random.integers(len(texts)))]) for _ in range(count)]
