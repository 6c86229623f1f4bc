"""A vocabulary learnt from the training texts, for encoders that bring none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from distill.contracts import UserError
from distill.runs import read_json, write_json

PAD, UNKNOWN, FIRST, LAST = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LONGEST = 100  # characters of a word; a longer one is unknown


def learn_vocabulary(texts: Iterable[str], size: int, target: Path) -> int:
    """Write the ``tokenizer.json`` of a WordPiece vocabulary (Schuster and Nakajima 2012), in lower case.

    Frequent words are tokens, and others are spelled from their parts, the last of which are single characters.

    Args:
        texts: of the training rows.
        size: most tokens.
        target: where the file goes.

    Returns:
        How many tokens there are.

    Raises:
        UserError: there is no text, or ``size`` cannot hold the characters that occur.
    """
    known = sorted({text for text in texts if text})
    if not known:
        raise UserError("no training row has a text, so no vocabulary can be learnt; leave the text encoder out")
    tokenizer = Tokenizer(models.WordPiece({UNKNOWN: 0}, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(known, trainer)
    learnt = tokenizer.get_vocab_size()
    if learnt > size:
        raise UserError(f"vocab_size is {size}, and the characters of the training texts alone are {learnt}; raise it")
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.BertProcessing((LAST, ids[LAST]), (FIRST, ids[FIRST]))
    write_json(target, {})  # the library makes no folder
    tokenizer.save(str(target))
    write_json(target, read_json(target))
    return learnt
