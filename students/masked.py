"""Convolutions over rows of different lengths, which what lies behind a row's end does not reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def within(lengths: Tensor, size: int) -> Tensor:
    """Which of ``size`` positions lie before each row's end: int64 [B] -> bool [B, size]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class MaskedStage(nn.Module):
    """A strided convolution, which halves height and time, and residual blocks, each behind a BatchNorm.

    Maps are zero behind a row's end before every convolution, as they are beyond their edges: so longer padding gives
    the same values at the positions that are there. (Statistics of BatchNorm count the zeros in training.)

    Args:
        in_channels: channels of what comes in.
        width: channels of what goes out.
        blocks: residual blocks (He et al. 2016, arXiv 1512.03385) behind the strided convolution.
        kernel: height and time of the kernels, odd numbers; with a height of 1 only the time is halved.
        step: positions in time from one to the next that stays: 2, or 1 where only the height is halved.
    """

    def __init__(self, in_channels: int, width: int, blocks: int, kernel: tuple[int, int], step: int = 2) -> None:
        super().__init__()
        self.step = step
        self.entry = _conv_bn(in_channels, width, kernel, (1 if kernel[0] == 1 else 2, step))
        self.blocks = nn.ModuleList(MaskedBlock(width, kernel) for _ in range(blocks))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map [B, C, H, T] to [B, width, H / 2, T / step] (rounded up), zero where bool [B, T / step] is False."""
        there = mask.to(x.dtype)[:, None, None]
        x = self.activation(self.entry(x)) * there
        for block in self.blocks:
            x = block(x, there)
        return x


class MaskedBlock(nn.Module):
    """Two convolutions around an identity, zero behind each row's end."""

    def __init__(self, width: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.conv1, self.conv2 = (_conv_bn(width, width, kernel, (1, 1)) for _ in range(2))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """Map [B, width, H, T] to the same shape; ``there`` [B, 1, 1, T] is 1 before the end and 0 behind it."""
        y = self.activation(self.conv1(x)) * there
        return self.activation(x + self.conv2(y)) * there


def masked_stages(
    in_channels: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    kernel: tuple[int, int],
    halve_time: int | None = None,
) -> nn.ModuleList:
    """Stages one behind the other, for :func:`run_stages`; the first ``halve_time`` halve the time, or all of them."""
    halving = len(widths) if halve_time is None else halve_time
    steps = [2 if number < halving else 1 for number in range(len(widths))]
    inputs = [in_channels, *widths[:-1]]
    sizes = zip(inputs, widths, blocks, steps, strict=True)
    stages = (MaskedStage(before, width, depth, kernel, step) for before, width, depth, step in sizes)
    return nn.ModuleList(stages).to(memory_format=torch.channels_last)


def run_stages(stages: nn.ModuleList, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Run stages on maps [B, C, H, T] under a mask bool [B, T].

    Args:
        stages: of :func:`masked_stages`.
        x: finite, and zero behind each row's end.
        mask: True before the end.

    Returns:
        Maps [B, width, H', T'] and the mask bool [B, T']: a position is there if its strided kernel's centre is.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    for stage in stages:
        mask = mask[:, :: stage.step]
        x = stage(x, mask)
    return x, mask


def _conv_bn(in_channels: int, out_channels: int, kernel: tuple[int, int], stride: tuple[int, int]) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2)
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
