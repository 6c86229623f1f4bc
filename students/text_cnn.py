"""A text encoder of parallel 1-D convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.dropout import Dropout
from distill.multimodal import Encoded
from students.sizes import check_sizes
from students.text import TextEncoder, cleared


class TextCNN(TextEncoder):
    """Convolutions of several widths over token embeddings, and the maximum over time (Kim 2014, arXiv 1408.5882).

    ``map_w = ReLU(conv_w(E))``, ``pooled = [max_t map_w[t] for each width w]``. Each token is the middle of a window
    whose outside is zeros, so that maps of all widths have the text's length, and a text shorter than the widest window
    is read too. Tokens are the maps side by side, zero at padding. Kim's windows lie inside of the text; he has widths
    3, 4 and 5 with 100 channels each, and dropout 0.5.

    Args:
        tokenizer_file: the ``tokenizer.json`` whose ids index the table.
        vocab_size: rows of the table.
        dim: width of the table.
        max_length: tokens a text is cut to, closing token included.
        widths: tokens of a window, one convolution each.
        channels: of each convolution; D is that times the number of widths.
        dropout: probability of dropping a feature of the pooled vector in training.

    Raises:
        ValueError: a size is not positive, or there is no width.
    """

    def __init__(
        self,
        *,
        tokenizer_file: str | Path,
        vocab_size: int,
        dim: int,
        max_length: int = 32,
        widths: Sequence[int] = (3, 4, 5),
        channels: int = 100,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(tokenizer_file, vocab_size, dim, max_length)
        if not widths:
            raise ValueError("widths is empty; give the tokens of at least one window")
        check_sizes(channels=channels, widths=min(widths))
        self.widths = tuple(widths)
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, channels, width) for width in widths)
        self.activation = nn.ReLU()
        self.dropout = Dropout(dropout)
        self.out_dim = channels * len(widths)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Read ``text`` int64 [B, L] under ``text_mask`` bool [B, L]; tokens [B, L, D], pooled [B, D]."""
        mask = inputs["text_mask"]
        x = cleared(self.table(inputs["text"]), mask).transpose(1, 2)
        padded = [F.pad(x, ((width - 1) // 2, width // 2)) for width in self.widths]
        maps = [convolve(each) for convolve, each in zip(self.convolutions, padded, strict=True)]
        states = cleared(self.activation(torch.cat(maps, dim=1)).transpose(1, 2), mask)
        return Encoded(states, mask, self.dropout(states.amax(1)))
