"""Images: squares of RGB pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from distill.formats.base import Arrays, BadInput, Content, Format, check_content, opened, reason

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, pixels (Pillow's own limit: a quarter of a gigabyte as RGB)."""

FILE_TYPES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Types of files that are read: of Pillow's others, some start programs (EPS), and all are more code to attack."""

WHITE = (255, 255, 255)


@dataclass(frozen=True)
class ImageFormat(Format):
    """Images of one size.

    Attributes:
        size: side, pixels.
        crop: cut what is no square instead of padding it.
    """

    size: int
    crop: bool = False

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As :attr:`Format.arrays`."""
        return {"image": ("uint8", (3, self.size, self.size))}

    @property
    def parameters(self) -> dict[str, int]:
        """As :attr:`Format.parameters`."""
        return {"image_size": self.size}

    def doubt(self, arrays: Arrays) -> str:
        """As :meth:`Format.doubt`: all pixels are alike."""
        return "of one colour" if one_colour(arrays["image"]) else ""

    def read(self, value: Any) -> Arrays:
        """Decode an image file, or take an array of this shape as it is; see :func:`decode_image`."""
        if isinstance(value, np.ndarray):
            return {"image": check_pixels(value, (3, self.size, self.size), "image")}
        return {"image": decode_image(check_content(value, "image"), self.size, crop=self.crop)}


def one_colour(pixels: NDArray[np.uint8]) -> bool:
    """Whether all pixels of a picture, uint8 [3, H, W], are alike."""
    return bool((pixels == pixels[:, :1, :1]).all())


def check_pixels(value: NDArray[Any], shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """Return decoded pixels; BadInput if they are not uint8 of this shape."""
    if value.shape != shape or value.dtype != np.uint8:
        raise BadInput(f"{what} array is {value.dtype} {value.shape}; expected uint8 {shape}")
    return value


def decode_image(source: Content, size: int, *, crop: bool = False) -> NDArray[np.uint8]:
    """Decode an image file to a square of RGB pixels.

    The EXIF orientation is applied, transparency is laid on white, the longer side is resized to ``size``
    (bicubic, aspect kept) and the rest is filled with white on both sides; with ``crop`` the shorter side is, and the
    centre is kept. Of an animation the first frame counts.

    Args:
        source: the bytes of an image file, or its path.
        size: side of the result, pixels.
        crop: cut what is no square instead of padding it.

    Returns:
        uint8 array [3, size, size], red first.

    Raises:
        BadInput: the image is missing, damaged, of a type not in ``FILE_TYPES``, or larger than ``MAX_PIXELS``.
    """
    try:
        with opened(source) as file, Image.open(file, formats=FILE_TYPES) as image:
            check_size(*image.size, "image")
            image.draft("RGB", (2 * size, 2 * size))  # lets a JPEG decode at a fraction of its size
            return fitted(ImageOps.exif_transpose(image), size, crop=crop)
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"no such image file: {source!s}") from None
    except Exception as error:  # damaged files make Pillow's parsers raise nearly any type
        raise BadInput(f"not a readable image ({type(error).__name__}: {reason(error)})") from error


def check_size(width: int, height: int, what: str) -> None:
    """Refuse what would fill the memory; BadInput."""
    if width * height > MAX_PIXELS:
        raise BadInput(f"{what} of {width}x{height} pixels is above the limit of {MAX_PIXELS} pixels")


def fitted(image: Image.Image, size: int, *, crop: bool) -> NDArray[np.uint8]:
    """Bring a picture to a square of RGB pixels, uint8 [3, size, size]."""
    pixels = (_centre if crop else _square)(_flatten(image), size)
    return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """Resize, then pad: the other order would let a long thin image ask for its square in memory."""
    longest = max(image.size)
    width, height = (max(1, round(side * size / longest)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    if width == height:
        return resized
    canvas = Image.new("RGB", (size, size), WHITE)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return canvas


def _centre(image: Image.Image, size: int) -> Image.Image:
    """Resize the largest square in the middle."""
    side = min(image.size)
    left, top = ((whole - side) / 2 for whole in image.size)
    return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
