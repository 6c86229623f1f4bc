"""Text encoders that begin with a table of token embeddings: their base, and the table alone, averaged."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from distill.dropout import Dropout
from distill.fusion.base import masked_mean
from distill.multimodal import Encoded, Encoder
from students.sizes import check_sizes
from students.vocabulary import reduce_vocabulary


class TextEncoder(Encoder):
    """Base of text encoders whose vocabulary the pipeline makes and whose first layer is a table.

    Args:
        tokenizer_file: the ``tokenizer.json`` whose ids index the table.
        vocab_size: rows of the table.
        dim: width of the table.
        max_length: tokens a text is cut to, closing token included.

    Raises:
        ValueError: a size is not positive.
    """

    reads = "text"
    word_table = "table"
    reduce_vocabulary = staticmethod(reduce_vocabulary)  # makes the tokenizer file, from the teacher's

    def __init__(self, tokenizer_file: str | Path, vocab_size: int, dim: int, max_length: int) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, dim=dim, max_length=max_length)
        self.tokenizer_file, self.max_length, self.pad_id = Path(tokenizer_file), max_length, 0
        self.table = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        self.out_dim = dim


class StaticEmbeddings(TextEncoder):
    """Mean of static token embeddings; the cheapest text encoder there is.

    With a table inherited from a transformer (see :mod:`students.inherit`) it keeps much of its accuracy.

    Args:
        tokenizer_file: the ``tokenizer.json`` whose ids index the table.
        vocab_size: rows of the table.
        dim: width of the table.
        max_length: tokens a text is cut to, closing token included.
        dropout: probability of dropping a feature in training.
    """

    unprunable = "it is a table, without layers"

    def __init__(
        self, *, tokenizer_file: str | Path, vocab_size: int, dim: int, max_length: int = 32, dropout: float = 0.0
    ) -> None:
        super().__init__(tokenizer_file, vocab_size, dim, max_length)
        self.dropout = Dropout(dropout)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Look up ``text`` int64 [B, L] under ``text_mask`` bool [B, L]."""
        tokens, mask = self.table(inputs["text"]), inputs["text_mask"]
        return Encoded(tokens, mask, self.dropout(masked_mean(tokens, mask)))


def cleared(states: Tensor, mask: Tensor) -> Tensor:
    """States [B, L, D], with zeros where bool [B, L] says that there is no token."""
    return states * mask.to(states.dtype)[..., None]
