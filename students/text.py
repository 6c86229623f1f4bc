"""A text encoder that is a table: static token embeddings, averaged."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from distill.dropout import Dropout
from distill.multimodal import Encoded, Encoder
from students.vocabulary import reduce_vocabulary


class StaticEmbeddings(Encoder):
    """Mean of static token embeddings; the cheapest text encoder there is.

    With a table inherited from a transformer (see :mod:`students.inherit`) it keeps much of its accuracy.

    Args:
        tokenizer_file: the ``tokenizer.json`` whose ids index the table.
        vocab_size: rows of the table.
        dim: width of the table.
        max_length: tokens a text is cut to, closing token included.
        dropout: probability of dropping a feature in training.
    """

    prunable = False
    reduce_vocabulary = staticmethod(reduce_vocabulary)  # makes the tokenizer file, from the teacher's

    def __init__(
        self, *, tokenizer_file: str | Path, vocab_size: int, dim: int, max_length: int = 32, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tokenizer_file, self.max_length, self.pad_id = Path(tokenizer_file), max_length, 0
        self.table = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        self.dropout = Dropout(dropout)
        self.out_dim = dim

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Look up ``text`` int64 [B, L] under ``text_mask`` bool [B, L]."""
        mask = inputs["text_mask"]
        tokens = self.table(inputs["text"])
        weights = mask.to(tokens.dtype)[..., None]
        pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
        return Encoded(tokens, mask, self.dropout(pooled))
