"""Encoders that embed their input as tokens and do no more: early fusion, where one joint transformer reads them all.

ViLT (Kim et al. 2021, arXiv 2102.03334) is such a model: ``fusion: {type: self_attention, depth: 6}`` behind them adds
an embedding of the modality to each token. The pooled vector is the mean of the tokens that are there.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.dropout import Dropout
from distill.fusion.base import masked_mean
from distill.multimodal import Encoded, Encoder
from students.series import cut_series
from students.sizes import check_sizes
from students.spectrogram import LogMel
from students.tabular import CodeTable, ColumnTokens
from students.text import TextEncoder, cleared
from students.vision import centred


def learned_positions(count: int, dim: int) -> nn.Parameter:
    """A small random vector for each of ``count`` positions: [count, dim]."""
    return nn.Parameter(torch.randn(count, dim) * 0.02)


def read_patches(embed: nn.Conv2d, x: Tensor) -> Tensor:
    """Embed patches of [B, C, H, W], the last ones filled with zeros: [B, D, H / patch, W / patch], rounded up."""
    rows, columns = (-(-size // patch) * patch for size, patch in zip(x.shape[2:], embed.kernel_size, strict=True))
    return embed(F.pad(x, (0, columns - x.shape[3], 0, rows - x.shape[2])))


class ImagePatches(Encoder):
    """Linear embeddings of an image's patches (ViT: Dosovitskiy et al. 2021, arXiv 2010.11929): ``W p + row + column``.

    Positions are learned, one vector a row and one a column of patches, where ViT has one a patch: images that a
    training shrinks use the first of them.

    Args:
        image_size: pixels of the data's images, at most.
        dim: D, width of the tokens.
        patch: pixels of a patch's side; the last patches are filled with mid-grey.
        dropout: probability of dropping a feature of a token in training.

    Raises:
        ValueError: a size is below 1.
    """

    reads = "image"

    def __init__(self, *, image_size: int, dim: int, patch: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        check_sizes(image_size=image_size, dim=dim, patch=patch)
        self.embed = nn.Conv2d(3, dim, patch, patch)
        side = -(-image_size // patch)
        self.rows, self.columns = learned_positions(side, dim), learned_positions(side, dim)
        self.dropout = Dropout(dropout)
        self.out_dim = dim

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``image`` uint8 [B, 3, H, W]; tokens [B, T, D] with T = H·W / patch^2, row by row."""
        grid = read_patches(self.embed, centred(inputs["image"])).permute(0, 2, 3, 1)
        grid = grid + self.rows[: grid.shape[1], None] + self.columns[: grid.shape[2]]
        tokens = self.dropout(grid.flatten(1, 2))
        return Encoded(tokens, _all_there(tokens), tokens.mean(1))


class TextTokens(TextEncoder):
    """Word embeddings and learned positions: ``E[w_t] + P[t]``, zero at padding.

    Args:
        tokenizer_file: the ``tokenizer.json`` whose ids index the table.
        vocab_size: rows of the table.
        dim: D, width of the table and of the tokens.
        max_length: tokens a text is cut to, closing token included; there are as many positions.
        dropout: probability of dropping a feature of a token in training.

    Raises:
        ValueError: a size is below 1.
    """

    unprunable = "it is a table, without layers"

    def __init__(
        self, *, tokenizer_file: str | Path, vocab_size: int, dim: int, max_length: int = 32, dropout: float = 0.0
    ) -> None:
        super().__init__(tokenizer_file, vocab_size, dim, max_length)
        self.positions = nn.Embedding(max_length, dim)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.dropout = Dropout(dropout)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Look up ``text`` int64 [B, L] under ``text_mask`` bool [B, L]; tokens [B, L, D]."""
        mask = inputs["text_mask"]
        places = torch.arange(mask.shape[1], device=mask.device)
        tokens = cleared(self.dropout(self.table(inputs["text"]) + self.positions(places)), mask)
        return Encoded(tokens, mask, masked_mean(tokens, mask))


class AudioPatches(Encoder):
    """Linear embeddings of a spectrogram's patches (AST: Gong et al. 2021, arXiv 2104.01778): ``W p + band + time``.

    Patches do not overlap, and a patch is there if its first frame is; padding behind a clip's end changes nothing.

    Args:
        sample_rate: of the data, samples a second.
        num_samples: S of the data.
        dim: D, width of the tokens.
        patch: frames of a patch.
        bands: filters of a patch; the last patches are filled with zeros.
        window_ms: length of a frame, milliseconds.
        hop_ms: time from one frame to the next, milliseconds.
        n_mels: filters of the spectrogram.
        dropout: probability of dropping a feature of a token in training.

    Raises:
        ValueError: as :class:`~students.spectrogram.LogMel`, or a size is below 1.
    """

    reads = "audio"
    keep_float = ("spectrogram",)

    def __init__(
        self,
        *,
        sample_rate: int,
        num_samples: int,
        dim: int,
        patch: int = 8,
        bands: int = 10,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        n_mels: int = 40,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(num_samples=num_samples, dim=dim, patch=patch, bands=bands)
        self.spectrogram = LogMel(sample_rate=sample_rate, window_ms=window_ms, hop_ms=hop_ms, n_mels=n_mels)
        self.embed = nn.Conv2d(1, dim, (bands, patch), (bands, patch))
        self.bands = learned_positions(-(-n_mels // bands), dim)
        self.times = learned_positions(-(-self.spectrogram.num_frames(num_samples) // patch), dim)
        self.dropout = Dropout(dropout)
        self.out_dim = dim

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``audio`` int16 [B, S] and ``audio_length`` int64 [B]; tokens [B, T, D], all bands of a time first."""
        levels, mask = self.spectrogram(inputs["audio"], inputs["audio_length"])
        grid = read_patches(self.embed, levels[:, None]).permute(0, 3, 2, 1)
        grid = grid + self.times[: grid.shape[1], None] + self.bands
        mask = mask[:, :: self.embed.stride[1]].repeat_interleave(len(self.bands), dim=1)
        tokens = cleared(self.dropout(grid.flatten(1, 2)), mask)
        return Encoded(tokens, mask, masked_mean(tokens, mask))


class SeriesPatches(Encoder):
    """Linear embeddings of windows of steps and learned positions: ``W [s_1, ..., s_p] + position``.

    As the first layer of :class:`~students.series.SeriesTransformer`. What lies behind a row's end changes nothing.

    Args:
        channels: C of the data.
        num_steps: T of the data.
        dim: D, width of the tokens.
        patch: p, steps of a window; the last one is filled with zeros.
        dropout: probability of dropping a feature of a token in training.

    Raises:
        ValueError: a size is below 1.
    """

    reads = "series"

    def __init__(self, *, channels: int, num_steps: int, dim: int, patch: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        check_sizes(channels=channels, num_steps=num_steps, dim=dim, patch=patch)
        self.patch = patch
        self.embed = nn.Linear(patch * channels, dim)
        self.positions = learned_positions(-(-num_steps // patch), dim)
        self.dropout = Dropout(dropout)
        self.out_dim = dim

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``series`` float32 [B, T, C] and ``series_length`` int64 [B]; tokens [B, T / patch, D]."""
        series, mask = cut_series(inputs)
        mask = mask[:, :: self.patch]
        series = F.pad(series, (0, 0, 0, mask.shape[1] * self.patch - series.shape[1]))
        tokens = self.embed(series.unflatten(1, (mask.shape[1], self.patch)).flatten(2))
        tokens = cleared(self.dropout(tokens + self.positions[: mask.shape[1]]), mask)
        return Encoded(tokens, mask, masked_mean(tokens, mask))


class TabularTokens(Encoder):
    """A token a column: FT-Transformer's feature tokenizer (Gorishniy et al. 2021, arXiv 2106.11959, section 3.3).

    ``w_j x_j + m_j missing_j + b_j`` of a number, ``V e + b_j`` of a code's embedding e.

    Args:
        num_numbers: N of the data.
        num_codes: K of the data.
        code_size: codes that a category may have, 0 for missing or unknown ones included.
        dim: D, width of the tokens.
        code_dim: width of the embedding of a code.
        dropout: probability of dropping a feature of a token in training.

    Raises:
        ValueError: there is no column, or a size is below 1.
    """

    reads = "tabular"
    unprunable = "its tokens come of one vector a column, without layers"

    def __init__(
        self, *, num_numbers: int, num_codes: int, code_size: int, dim: int, code_dim: int = 8, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, code_dim=code_dim)
        if min(num_numbers, num_codes) < 0 or num_numbers + num_codes < 1:
            raise ValueError(f"num_numbers is {num_numbers} and num_codes {num_codes}; a table has at least one column")
        self.num_numbers = num_numbers
        self.codes = CodeTable(num_codes, code_size, code_dim) if num_codes else None
        self.columns = ColumnTokens(num_numbers, num_codes, code_dim, dim)
        self.dropout = Dropout(dropout)
        self.out_dim = dim

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``tabular`` float32 [B, 2 N + K]; tokens [B, N + K, D]."""
        plain, codes = inputs["tabular"].tensor_split([2 * self.num_numbers], dim=1)
        tokens = self.dropout(self.columns(plain, None if self.codes is None else self.codes(codes)))
        return Encoded(tokens, _all_there(tokens), tokens.mean(1))


def _all_there(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
