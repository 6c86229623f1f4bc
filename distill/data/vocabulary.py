"""A vocabulary of the training texts' words, for encoders that bring none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from distill.contracts import UserError
from distill.runs import read_json, write_json
from distill.targets import CONTINUES

PAD, UNKNOWN, FIRST, LAST = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LONGEST = 100  # characters of a word; a longer one is unknown


def learn_vocabulary(texts: Iterable[str], size: int, target: Path) -> int:
    """Write the ``tokenizer.json`` of :func:`learnt_tokenizer`; return how many tokens there are.

    Args:
        texts: of the training rows.
        size: most tokens.
        target: where the file goes.

    Raises:
        UserError: there is no text, or ``size`` cannot hold the characters that occur.
    """
    tokenizer = learnt_tokenizer(texts, size)
    tokenizer.save(str(target))
    write_json(target, read_json(target))  # in one order
    return int(tokenizer.get_vocab_size())


def learnt_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Return a tokenizer in lower case that knows the frequent words of texts, and characters to spell the others.

    The library's own trainers number tokens in another order in each process, so words are counted here.

    Raises:
        UserError: there is no text, or ``size`` cannot hold the characters that occur.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    if not counts:
        raise UserError("no training row has a text, so no vocabulary can be learnt; leave out what reads or writes")
    characters = sorted({character for word in counts for character in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    needed = [*SPECIAL, *characters, *(f"{CONTINUES}{character}" for character in characters)]
    if len(needed) > size:
        raise UserError(
            f"vocab_size is {size}, and the characters of the training texts alone take {len(needed)}; raise it"
        )
    vocabulary = {token: number for number, token in enumerate([*needed, *words[: size - len(needed)]])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing((LAST, vocabulary[LAST]), (FIRST, vocabulary[FIRST]))
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
