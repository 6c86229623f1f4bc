"""ResNets for images of 32 pixels, as the literature on CIFAR has them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from distill.exchange import HIDDEN, Hidden
from distill.multimodal import Encoded, Encoder
from students.vision import conv_bn

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
STAGES = 3


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity, or around a strided 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(in_channels, out_channels, stride=stride)
        self.conv2 = conv_bn(out_channels, out_channels)
        self.activation = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, out, H / stride, W / stride]."""
        return self.activation(self.shortcut(x) + self.conv2(self.activation(self.conv1(x))))


class CifarResNet(Encoder):
    """ResNet of 6n + 2 layers without its classifier (He et al. 2016, arXiv 1512.03385, section 4.2).

    A stem at full resolution and three stages of n blocks, the last two of which halve it. Shortcuts that change the
    shape are 1x1 convolutions, and convolutions begin with He's normal weights over their outputs, both as in the codes
    that CIFAR-100's distillation tables come from. ResNet8x4 has depth 8 and ResNet32x4 depth 32, both with the widths
    [32, 64, 128, 256]: 1.23 M and 7.43 M parameters with a linear head of 100 classes.

    Args:
        depth: 6n + 2, the head's layer included.
        widths: channels of the stem and of each of three stages.
        mean: of red, green and blue, as shares of 255; CIFAR-100's by default.
        std: their standard deviation.

    Raises:
        ValueError: no such depth, or not four widths.
    """

    reads = "image"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        depth: int,
        widths: Sequence[int] = (16, 16, 32, 64),
        mean: Sequence[float] = CIFAR100_MEAN,
        std: Sequence[float] = CIFAR100_STD,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 2 * STAGES)
        if rest or blocks < 1:
            raise ValueError(f"depth is {depth}; it is 6n + 2: 8, 14, 20, 32, 44, 56, 110")
        if len(widths) != STAGES + 1 or len(mean) != 3 or len(std) != 3:
            raise ValueError("widths are four (stem and stages), and mean and std have three numbers each")
        self.stem = nn.Sequential(conv_bn(3, widths[0]), nn.ReLU())
        stages = []
        for number, (before, width) in enumerate(pairwise(widths)):
            first = BasicBlock(before, width, 1 if number == 0 else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1))))
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.out_dim, self.stage_widths = widths[-1], tuple(widths[1:])

    def begin(self, inputs: dict[str, Tensor]) -> Hidden:
        """As :meth:`Encoder.begin`, the stem included."""
        return Hidden.of_map(self.stem((inputs["image"].float() - self.mean) / self.std))

    def advance(self, stage: int, hidden: Hidden) -> Hidden:
        """As :meth:`Encoder.advance`."""
        return Hidden.of_map(self.stages[stage](hidden.values))

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``image`` uint8 [B, 3, H, W]; tokens [B, H·W / 16, D], pooled their mean."""
        features = inputs[HIDDEN] if HIDDEN in inputs else self.stages(self.begin(inputs).values)
        tokens = features.flatten(2).transpose(1, 2)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Encoded(tokens, mask, features.mean(dim=(2, 3)))
