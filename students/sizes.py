"""Checks of the sizes that recipes give to encoders."""

from __future__ import annotations

from collections.abc import Sequence


def check_sizes(**sizes: float) -> None:
    """Check that sizes are positive.

    Raises:
        ValueError: one is below 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected at least 1")


def check_stages(widths: Sequence[int], blocks: Sequence[int]) -> None:
    """Check that there is a width and a number of blocks for each stage.

    Raises:
        ValueError: there is no stage, the lists differ in length, a width is below 1 or a number of blocks below 0.
    """
    if len(widths) != len(blocks):
        raise ValueError(f"widths has {len(widths)} stages and blocks has {len(blocks)}; give as many of each")
    if not widths or min(widths) < 1 or min(blocks) < 0:
        raise ValueError(
            f"widths is {list(widths)} and blocks is {list(blocks)}; give one stage or more, each with 1 or more "
            "channels and 0 or more blocks"
        )


def check_halvings(name: str, size: int, stages: int) -> None:
    """Check that an axis still has two positions behind all stages: BatchNorm makes no statistics of one.

    Raises:
        ValueError: it has fewer.
    """
    if size <= 2**stages:
        raise ValueError(
            f"{name} is {size}, and {stages} stages that halve it leave less than two of them; give fewer stages"
        )
