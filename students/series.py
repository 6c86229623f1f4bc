"""Small encoders for series of measurements: convolutional, recurrent, and a transformer over patches.

Each reads ``series`` float32 [B, T, C], standardised by the data, and ``series_length`` int64 [B]. What lies behind a
row's end changes nothing, not even NaN, and a row of length 0 gives finite values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.dropout import Dropout
from distill.exchange import HIDDEN, HIDDEN_MASK, Hidden
from distill.fusion.base import masked_mean
from distill.multimodal import Encoded, Encoder
from students.masked import masked_stages, run_stages, within
from students.sizes import check_halvings, check_sizes, check_stages
from students.transformer import Block

CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}


class SeriesConvNet(Encoder):
    """Stages of convolutions over time that halve it; tokens are the last stage's steps, pooled their mean.

    Maps are [B, D, 1, T] inside: what taps and runtimes' kernels know as maps.

    Args:
        channels: C of the data.
        num_steps: T of the data.
        widths: channels of each stage.
        blocks: residual blocks in each stage.
        kernel: steps that a convolution reads, an odd number.
        dropout: probability of dropping a channel of the pooled vector in training.

    Raises:
        ValueError: a size below 1, an even kernel, lists of stages that do not fit, or too many stages.
    """

    reads = "series"

    def __init__(
        self,
        *,
        channels: int,
        num_steps: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        kernel: int = 5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, kernel=kernel)
        check_stages(widths, blocks)
        check_halvings("the number of steps", num_steps, len(widths))
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}, expected an odd number of steps")
        self.stages = masked_stages(channels, widths, blocks, (1, kernel))
        self.dropout = Dropout(dropout)
        self.out_dim, self.stage_widths = widths[-1], tuple(widths)

    def begin(self, inputs: dict[str, Tensor]) -> Hidden:
        """As :meth:`Encoder.begin`."""
        series, mask = cut_series(inputs)
        return Hidden(series.transpose(1, 2)[:, :, None], mask)

    def advance(self, stage: int, hidden: Hidden) -> Hidden:
        """As :meth:`Encoder.advance`."""
        return Hidden(*run_stages(self.stages[stage : stage + 1], *hidden))

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode a batch; tokens [B, T / 2^stages, D]."""
        if HIDDEN in inputs:
            features, mask = inputs[HIDDEN], inputs[HIDDEN_MASK]
        else:
            features, mask = run_stages(self.stages, *self.begin(inputs))
        tokens = features[:, :, 0].transpose(1, 2)
        return Encoded(tokens, mask, self.dropout(masked_mean(tokens, mask)))


class SeriesRecurrent(Encoder):
    """A recurrent network that reads steps in their order; tokens are its states.

    GRU (Cho et al. 2014, arXiv 1406.1078) or LSTM (Hochreiter & Schmidhuber 1997). A state depends on the steps before
    it alone. Recurrent layers stay whole in pruning, and float in int8 graphs.

    Args:
        channels: C of the data.
        dim: D, width of the states.
        layers: how many lie on each other.
        cell: "gru" or "lstm".
        pooling: the state behind a row's "last" step, or the "mean" of its states.
        dropout: probability of dropping a feature between layers, and of the pooled vector, in training.

    Raises:
        ValueError: a size below 1, or another cell or pooling.
    """

    reads = "series"
    unprunable = "it is a recurrent network, whose states pruning cannot follow"

    def __init__(
        self,
        *,
        channels: int,
        dim: int,
        layers: int = 1,
        cell: Literal["gru", "lstm"] = "gru",
        pooling: Literal["last", "mean"] = "last",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, dim=dim, layers=layers)
        if cell not in CELLS or pooling not in ("last", "mean"):
            raise ValueError(f"cell is {cell!r} and pooling {pooling!r}; expected gru or lstm, and last or mean")
        between = dropout if layers > 1 else 0.0
        self.recurrent = CELLS[cell](channels, dim, layers, batch_first=True, dropout=between)
        self.pooling, self.dropout, self.out_dim = pooling, Dropout(dropout), dim

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode a batch; tokens [B, T, D]."""
        series, mask = cut_series(inputs)
        states, _ = self.recurrent(series)
        tokens = torch.where(mask[..., None], states, 0.0)
        if self.pooling == "mean":
            return Encoded(tokens, mask, self.dropout(masked_mean(tokens, mask)))
        last = (inputs["series_length"] - 1).clamp(min=0)[:, None, None]
        pooled = tokens.gather(1, last.expand(-1, 1, tokens.shape[2]))[:, 0]
        return Encoded(tokens, mask, self.dropout(pooled))


class SeriesTransformer(Encoder):
    """A transformer over patches: ``x = W [s_1, ..., s_p] + position``, pre-norm blocks, LayerNorm; pooled is the mean.

    Patches of steps as tokens are PatchTST's (Nie et al. 2023, arXiv 2211.14730); here a patch holds all channels.

    Args:
        channels: C of the data.
        num_steps: T of the data.
        dim: D, width of the tokens.
        patch: p, steps of a patch; the last one is filled with zeros.
        depth: number of blocks.
        heads: attention heads; divides ``dim``.
        dropout: probability of dropping a feature or an attention weight in training.

    Raises:
        ValueError: a size below 1, or ``heads`` does not divide ``dim``.
    """

    reads = "series"

    def __init__(
        self,
        *,
        channels: int,
        num_steps: int,
        dim: int,
        patch: int = 8,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, num_steps=num_steps, dim=dim, patch=patch, depth=depth, heads=heads)
        self.patch = patch
        self.embed = nn.Linear(patch * channels, dim)
        self.positions = nn.Parameter(torch.randn(-(-num_steps // patch), dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, 2 * dim, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        self.out_dim = dim

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode a batch; tokens [B, T / patch, D]."""
        series, mask = cut_series(inputs)
        mask = mask[:, :: self.patch]
        series = F.pad(series, (0, 0, 0, mask.shape[1] * self.patch - series.shape[1]))
        tokens = self.embed(series.unflatten(1, (mask.shape[1], self.patch)).flatten(2))
        tokens = tokens + self.positions[: mask.shape[1]]
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens)
        return Encoded(tokens, mask, self.dropout(masked_mean(tokens, mask)))


def cut_series(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The series [B, T, C] with zeros behind each row's end, and the mask bool [B, T] of what lies before it."""
    series = inputs["series"]
    mask = within(inputs["series_length"], series.shape[1])
    return torch.where(mask[..., None], series, 0.0), mask
