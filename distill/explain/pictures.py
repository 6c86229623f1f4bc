"""Pictures of explanations: red speaks for the class, blue against it, violet is read, for whatever reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FOR, AGAINST, READ = (196, 48, 36), (36, 88, 196), (118, 58, 172)
INK, SOFT, PAPER = (32, 40, 50), (150, 158, 168), (255, 255, 255)
SIDE, WIDTH = 224, 420
"""Pixels: the least height of an image, the width of other pictures."""
ROW, LABEL = 22, 130  # pixels of a bar's row and of its label
STRONGEST = 0.99  # quantile of heat that is drawn in full colour

Array = NDArray[np.floating]


def scaled(values: Array) -> Array:
    """Values in [-1, 1]: divided by nearly the largest size among them; zeros stay."""
    sizes = np.abs(values)
    most = (float(np.quantile(sizes, STRONGEST)) or float(sizes.max())) if sizes.size else 0.0
    return np.clip(values / most, -1, 1) if most else np.zeros_like(values)


def coloured(values: Array, positive: tuple[int, int, int] = FOR) -> NDArray[np.uint8]:
    """Values in [-1, 1] as colours on white: [...] to [..., 3]."""
    strength = np.abs(values)[..., None]
    hue = np.where(values[..., None] >= 0, np.array(positive), np.array(AGAINST))
    return np.rint(hue * strength + np.array(PAPER) * (1 - strength)).astype(np.uint8)


def over_image(
    pixels: NDArray[np.uint8], heat: Array, most: float | None = None, positive: tuple[int, int, int] = FOR
) -> Image.Image:
    """Heat [H, W], signed or not, over a grey copy of an image uint8 [3, H, W].

    Args:
        pixels: the image.
        heat: of each pixel.
        most: heat that has the full colour; nearly the largest where None.
        positive: colour of heat above 0.
    """
    grey = pixels.mean(0)[..., None] * 0.5 + 255 * 0.5
    share = scaled(heat) if most is None else np.clip(heat / most, -1, 1)
    strength = np.abs(share)[..., None] * 0.85
    hue = np.where(heat[..., None] >= 0, np.array(positive), np.array(AGAINST))
    return _at_least(Image.fromarray(np.rint(grey * (1 - strength) + hue * strength).astype(np.uint8)))


def beside(images: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Images of one height in a row."""
    width = sum(image.width + gap for image in images) - gap
    whole = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + gap
    return whole


def heat_map(values: Array, levels: Array, height: int = 120) -> Image.Image:
    """Signed heat [rows, columns] over levels of the same shape in grey, higher ones darker, the first row below."""
    span = float(np.ptp(levels)) or 1.0
    grey = (255 - 110 * (levels - levels.min()) / span)[..., None]
    heat = scaled(values)
    strength = np.abs(heat)[..., None] * 0.85
    hue = np.where(heat[..., None] >= 0, np.array(FOR), np.array(AGAINST))
    small = Image.fromarray(np.rint(grey * (1 - strength) + hue * strength).astype(np.uint8)[::-1].copy())
    return small.resize((WIDTH, height), Image.Resampling.NEAREST)


def curves(series: Array, heat: Array, height: int = 64) -> Image.Image:
    """Curves of a series [T, C], one below the other, each on its heat [T, C]."""
    steps, channels = series.shape
    whole = Image.new("RGB", (WIDTH, height * channels), PAPER)
    draw, colours = ImageDraw.Draw(whole), coloured(scaled(heat) * 0.8)
    for channel in range(channels):
        top, values = channel * height, series[:, channel]
        for step in range(steps):
            left, right = (WIDTH * edge // steps for edge in (step, step + 1))
            draw.rectangle((left, top, max(left, right - 1), top + height - 2), fill=tuple(colours[step, channel]))
        low, span = float(values.min()), float(np.ptp(values)) or 1.0
        points = [
            ((step + 0.5) * WIDTH / steps, top + (height - 8) * (1 - (float(value) - low) / span) + 3)
            for step, value in enumerate(values)
        ]
        draw.line(points if len(points) > 1 else points * 2, fill=INK, width=2)
    return whole


def bars(values: Mapping[str, float], digits: int = 2) -> Image.Image:
    """Horizontal bars with names and numbers, to the right for the class and to the left against it."""
    whole = Image.new("RGB", (WIDTH, ROW * max(1, len(values)) + 4), PAPER)
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(13)
    most = max((abs(value) for value in values.values()), default=0.0) or 1.0
    room = (WIDTH - LABEL - 120) / 2
    middle = LABEL + 60 + room
    for place, (name, value) in enumerate(values.items()):
        top = 2 + place * ROW
        draw.text((0, top + 2), _cut(name, 20), fill=INK, font=font)
        end = middle + room * value / most
        draw.rectangle(
            (min(middle, end), top + 3, max(middle, end), top + ROW - 5), fill=FOR if value >= 0 else AGAINST
        )
        at, anchor = (end + 4, "la") if value >= 0 else (end - 4, "ra")
        draw.text((at, top + 2), f"{value:+.{digits}f}", fill=INK, font=font, anchor=anchor)
    draw.line((middle, 0, middle, whole.height), fill=SOFT)
    return whole


def matrix(rows: Sequence[str], columns: Sequence[str], values: Array) -> Image.Image:
    """Shares in [0, 1] as a table of cells: who reads (rows) whom (columns); NaN cells stay empty."""
    wide = max(64, (WIDTH - LABEL) // max(1, len(columns)))
    whole = Image.new("RGB", (LABEL + wide * len(columns), ROW * (len(rows) + 2)), PAPER)
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for column, name in enumerate(columns):
        for line, part in enumerate(_cut(name, 24).split(" ", 1)):
            draw.text((LABEL + (column + 0.5) * wide, line * ROW * 0.8), part, fill=INK, font=font, anchor="ma")
    for row, name in enumerate(rows):
        top = (row + 2) * ROW
        draw.text((0, top + 3), _cut(name, 22), fill=INK, font=font)
        for column in range(len(columns)):
            share = float(values[row, column])
            if math.isnan(share):
                continue
            left = LABEL + column * wide
            draw.rectangle((left, top, left + wide - 2, top + ROW - 2), fill=tuple(coloured(np.array(share), READ)))
            ink = PAPER if share > 0.6 else INK
            draw.text((left + wide / 2, top + 3), f"{share:.0%}", fill=ink, font=font, anchor="ma")
    return whole


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _at_least(image: Image.Image) -> Image.Image:
    """An image enlarged, pixel by pixel, to at least ``SIDE``."""
    factor = max(1, math.ceil(SIDE / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
