"""From a file and a sentence to a model's inputs, without torch.

Training and ``predict`` call this code, so that a deployed bundle reads exactly the numbers that the student
was trained on. Normalisation is not here: every exported graph takes uint8 images and normalises inside.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from PIL import Image, ImageOps

from distill.contracts import UserError

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, pixels (Pillow's own limit: a quarter of a gigabyte as RGB)."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Image formats that are read: of Pillow's others, some start programs (EPS), and all are more code to attack."""

SPEC_FILE = "preprocess.json"
TOKENIZER_FILE = "tokenizer.json"

WHITE = (255, 255, 255)


class BadInput(UserError):
    """An image that cannot be used; the message is the reason."""


def decode_image(source: bytes | str | Path, size: int, *, crop: bool = False) -> NDArray[np.uint8]:
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
        BadInput: the image is missing, damaged, of a format not in ``FORMATS``, or larger than ``MAX_PIXELS``.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadInput(f"image of {width}x{height} pixels is above the limit of {MAX_PIXELS} pixels")
            image.draft("RGB", (2 * size, 2 * size))  # lets a JPEG decode at a fraction of its size
            pixels = _flatten(ImageOps.exif_transpose(image))
            return np.ascontiguousarray(np.asarray((_centre if crop else _square)(pixels, size)).transpose(2, 0, 1))
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"no such image file: {source!s}") from None
    except Exception as error:  # damaged files make Pillow's parsers raise nearly any type
        raise BadInput(f"not a readable image ({type(error).__name__}: {_reason(error)})") from error


def _reason(error: Exception) -> str:
    return re.sub(r" <_io.BytesIO[^>]*>", "", " ".join(str(error).split()))  # no addresses: reports stay comparable


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


class Tokenizer:
    """A ``tokenizer.json`` with the truncation and padding of the recipe, not of the file.

    Attributes:
        path: the file.
        max_length: most tokens a text keeps, special tokens included.
        pad_id: id that fills the positions where the mask is False.
    """

    def __init__(self, path: str | Path, max_length: int, pad_id: int = 0) -> None:
        """Read the file.

        Raises:
            UserError: the file is missing or no tokenizer, or ``max_length`` leaves no room for a word.
        """
        self.path, self.max_length, self.pad_id = Path(path), max_length, pad_id
        if not self.path.is_file():
            raise UserError(f"no tokenizer file {self.path}; it should be a Hugging Face tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{self.path} is not a tokenizer.json: {' '.join(str(error).split())}") from error
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length <= special:
            raise UserError(f"max_length {max_length} leaves no room beside {special} special tokens; raise it")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return ids int64 [B, L] and mask bool [B, L], L being the longest of the batch (at least 1).

        An empty text has no tokens at all: its row is padding.
        """
        return self._pad([encoding.ids for encoding in self._encode(texts)])

    def words(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
        """Return ids and mask like a call, and the index of the whitespace word of every token, int64 [B, L].

        Special tokens and padding have word -1. The indices do not depend on the tokenizer, so two tokenizers
        can drop the same words.
        """
        encodings = self._encode(texts)
        ids, mask = self._pad([encoding.ids for encoding in encodings])
        words = np.full(ids.shape, -1, dtype=np.int64)
        for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            words[row, : len(encoding.ids)] = _word_indices(text, encoding)
        return ids, mask, words

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        empty = tokenizers.Encoding()
        filled = iter(self._tokenizer.encode_batch([text for text in texts if has_text(text)]))
        return [next(filled) if has_text(text) else empty for text in texts]

    def _pad(self, rows: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        mask = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        ids[mask] = np.concatenate([np.array(row, dtype=np.int64) for row in rows]) if rows else []
        return ids, mask


def has_text(text: str | None) -> bool:
    """Return whether a text counts as present: more than white space."""
    return bool(text and text.strip())


def _word_indices(text: str, encoding: tokenizers.Encoding) -> NDArray[np.int64]:
    starts = np.array([match.start() for match in re.finditer(r"\S+", text)], dtype=np.int64)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)  # also where there are no tokens
    # the last character decides: byte-level tokens may begin with the space before their word
    words = np.searchsorted(starts, offsets[:, 1] - 1, side="right") - 1
    special = np.array(encoding.special_tokens_mask, dtype=bool)
    return np.where(special, -1, np.maximum(words, 0))


class Preprocessor:
    """Rows to the feeds of an exported graph; saved in every bundle as ``preprocess.json``.

    Attributes:
        image_size: side of the graph's image input, pixels; None for a model without images.
        tokenizer: the model's tokenizer; None for a model without text.
        crop: whether images that are no squares are cut instead of padded.
    """

    def __init__(self, image_size: int | None, tokenizer: Tokenizer | None, *, crop: bool = False) -> None:
        """Take the parts; a part that is None is a modality that the model does not read."""
        self.image_size, self.tokenizer, self.crop = image_size, tokenizer, crop

    @classmethod
    def load(cls, folder: str | Path) -> Preprocessor:
        """Read ``preprocess.json`` and the tokenizer beside it.

        Raises:
            UserError: a file is missing or malformed.
        """
        file = Path(folder) / SPEC_FILE
        try:
            spec = json.loads(file.read_text(encoding="utf-8"))
            image, text = spec.get("image"), spec.get("text")
            size, crop = (None, False) if image is None else (int(image["size"]), bool(image.get("crop", False)))
            options = None if text is None else (str(text["tokenizer"]), int(text["max_length"]), int(text["pad_id"]))
        except FileNotFoundError:
            raise UserError(f"no {SPEC_FILE} in {folder}; is it a bundle made by `distill export`?") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is malformed ({error!r}); export the bundle again") from error
        if options is None:
            return cls(size, None, crop=crop)
        name, max_length, pad_id = options
        return cls(size, Tokenizer(file.parent / Path(name).name, max_length, pad_id), crop=crop)

    def save(self, folder: str | Path) -> None:
        """Write ``preprocess.json`` and copy the tokenizer beside it; the folder is made if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec: dict[str, dict[str, Any]] = {}
        if self.image_size is not None:
            spec["image"] = {"size": self.image_size, **({"crop": True} if self.crop else {})}
        if self.tokenizer is not None:
            spec["text"] = {
                "tokenizer": TOKENIZER_FILE,
                "max_length": self.tokenizer.max_length,
                "pad_id": self.tokenizer.pad_id,
            }
            if self.tokenizer.path.resolve() != (folder / TOKENIZER_FILE).resolve():
                shutil.copyfile(self.tokenizer.path, folder / TOKENIZER_FILE)
        (folder / SPEC_FILE).write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
        """Turn rows into the graph's named inputs.

        Args:
            rows: mappings with ``image`` (file bytes, a path, or a uint8 array [3, S, S] of an already decoded
                image) and ``text`` (a string); an absent key, None or an empty text is an absent modality.

        Returns:
            ``image`` uint8 [B, 3, S, S], ``image_present`` bool [B], ``text`` int64 [B, L], ``text_mask`` bool
            [B, L], ``text_present`` bool [B]: those of the model's modalities. Absent images are zeros.

        Raises:
            BadInput: an image is undecodable, or a value has the wrong type; the message names the row.
        """
        feeds: dict[str, NDArray[Any]] = {}
        if self.image_size is not None:
            images = [self._image(number, row.get("image"), self.image_size) for number, row in enumerate(rows)]
            blank = np.zeros((3, self.image_size, self.image_size), dtype=np.uint8)
            filled = [blank if image is None else image for image in images]
            feeds["image"] = np.stack(filled) if filled else blank[None][:0]
            feeds["image_present"] = np.array([image is not None for image in images], dtype=bool)
        if self.tokenizer is not None:
            texts = [self._text(number, row.get("text")) for number, row in enumerate(rows)]
            feeds["text"], feeds["text_mask"] = self.tokenizer(texts)
            feeds["text_present"] = np.array([has_text(text) for text in texts], dtype=bool)
        return feeds

    def _image(self, number: int, value: Any, size: int) -> NDArray[np.uint8] | None:
        if value is None:
            return None
        if isinstance(value, np.ndarray):
            if value.shape != (3, size, size) or value.dtype != np.uint8:
                expected = f"uint8 (3, {size}, {size})"
                raise BadInput(f"row {number}: image array is {value.dtype} {value.shape}; expected {expected}")
            return value
        if not isinstance(value, bytes | str | Path):
            raise BadInput(f"row {number}: image is a {type(value).__name__}; give file bytes, a path or an array")
        try:
            return decode_image(value, size, crop=self.crop)
        except BadInput as error:
            raise BadInput(f"row {number}: {error}") from error

    @staticmethod
    def _text(number: int, value: Any) -> str:
        if value is not None and not isinstance(value, str):
            raise BadInput(f"row {number}: text is a {type(value).__name__}; give a string")
        return value or ""
