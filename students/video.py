"""A small encoder for video: an image ConvNet on each frame, and what sums frames up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distill.dropout import Dropout
from distill.multimodal import Encoded, Encoder
from students.sizes import check_sizes
from students.vision import centred, convnet_stages


class FrameConvNet(Encoder):
    """The stages of :class:`~students.vision.ConvNet` on each frame, and pooling over frames; a token is a frame.

    - ``mean``: the mean of the frames' vectors h_f, which knows no order.
    - ``attention``: ``sum_f a_f h_f`` with ``a = softmax_f(w tanh(V (h_f + position_f)))`` (Ilse et al. 2018, arXiv
      1802.04712).
    - ``gru``: tokens are the states of a GRU (Cho et al. 2014, arXiv 1406.1078) that reads the frames in their order,
      and the last one is the pooled vector. GRUs stay float in int8 graphs.

    With ``gru`` pruning leaves the last stage whole, with ``attention`` its width. Stages read the frames of all rows
    as rows of their own, so taps have to be of the encoder itself.

    Args:
        num_frames: F of the data.
        widths: channels of each stage; D is the last.
        blocks: residual blocks in each stage; the first may have none.
        pooling: how the frames become one vector.
        dropout: probability of dropping a feature of the pooled vector in training.

    Raises:
        ValueError: lists of stages that do not fit, a size that is too small, or another pooling.
    """

    reads = "video"

    def __init__(
        self,
        *,
        num_frames: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        pooling: Literal["gru", "attention", "mean"] = "gru",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(num_frames=num_frames)
        if pooling not in ("gru", "attention", "mean"):
            raise ValueError(f"pooling is {pooling!r}; expected gru, attention or mean")
        self.stages = convnet_stages(widths, blocks)
        self.out_dim = widths[-1]
        self.recurrent = nn.GRU(self.out_dim, self.out_dim, batch_first=True) if pooling == "gru" else None
        self.attention = FrameAttention(num_frames, self.out_dim) if pooling == "attention" else None
        self.stages[-1].splits_channels = pooling == "gru"  # type: ignore[assignment]  # torch-pruning knows no GRU
        self.dropout = Dropout(dropout)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``video`` uint8 [B, F, 3, H, W]; tokens [B, F, D]."""
        video = inputs["video"]
        features = self.stages(centred(video.flatten(0, 1)))
        tokens = features.mean(dim=(2, 3)).unflatten(0, (-1, video.shape[1]))
        if self.recurrent is not None:
            tokens, _ = self.recurrent(tokens)
            pooled = tokens[:, -1]
        else:
            pooled = tokens.mean(1) if self.attention is None else self.attention(tokens)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Encoded(tokens, mask, self.dropout(pooled))


class FrameAttention(nn.Module):
    """A mean of frames, weighted by what each one shows and where it stands."""

    def __init__(self, num_frames: int, dim: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(num_frames, dim) * 0.02)
        self.hidden, self.score = nn.Linear(dim, dim), nn.Linear(dim, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """Map [B, F, D] to [B, D]."""
        weights = self.score(self.hidden(frames + self.positions).tanh()).softmax(dim=1)
        return (weights * frames).sum(1)
