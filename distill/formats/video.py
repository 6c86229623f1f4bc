"""Clips: a fixed number of frames, evenly spread, each a square of RGB pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from distill.contracts import UserError
from distill.formats.base import Arrays, BadInput, Content, Format, check_content, opened, reason
from distill.formats.image import FILE_TYPES, check_pixels, check_size, fitted


@dataclass(frozen=True)
class VideoFormat(Format):
    """Clips of one size and number of frames.

    Attributes:
        size: side of a frame, pixels.
        frames: their number; a shorter clip repeats some.
        crop: cut what is no square instead of padding it.
    """

    size: int
    frames: int
    crop: bool = False

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As :attr:`Format.arrays`."""
        return {"video": ("uint8", self._shape)}

    @property
    def parameters(self) -> dict[str, int]:
        """As :attr:`Format.parameters`."""
        return {"num_frames": self.frames}

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.frames, 3, self.size, self.size)

    def read(self, value: Any) -> Arrays:
        """Decode a clip, or take an array of this shape.

        The clip is divided into as many parts of the same length as there are frames, and each gives the one in its
        middle. Animated GIF, WebP, PNG and AVIF are read by Pillow, other files by PyAV.
        """
        if isinstance(value, np.ndarray):
            return {"video": check_pixels(value, self._shape, "video")}
        content = check_content(value, "video")
        try:
            with Image.open(opened(content), formats=FILE_TYPES) as animation:
                check_size(*animation.size, "video")
                return {"video": np.stack([self._fitted(frame) for frame in _animated(animation, self.frames)])}
        except BadInput:
            raise
        except UnidentifiedImageError:
            return {"video": np.stack([self._fitted(frame) for frame in _filmed(content, self.frames)])}
        except Exception as error:  # damaged files make Pillow's parsers raise nearly any type
            raise BadInput(f"not a readable video ({type(error).__name__}: {reason(error)})") from error

    def _fitted(self, frame: Image.Image) -> NDArray[np.uint8]:
        return fitted(frame, self.size, crop=self.crop)


def middles(frames: int, total: int) -> list[int]:
    """The numbers of the frames in the middle of equal parts of a clip, rising.

    Args:
        frames: how many are wanted.
        total: how many the clip has.
    """
    return [(2 * part + 1) * total // (2 * frames) for part in range(frames)]


def _animated(animation: Any, frames: int) -> Iterator[Image.Image]:
    for number in middles(frames, getattr(animation, "n_frames", 1)):
        animation.seek(number)
        yield animation.copy()


def _filmed(content: Content, frames: int) -> Iterator[Image.Image]:
    """Frames of a video file: before each, the nearest key frame is looked up, so that long ones are not decoded."""
    try:
        import av
    except ImportError as error:
        raise UserError("video files need the package av; pip install 'multidistill[video]'") from error
    try:
        with av.open(opened(content)) as container:
            if not container.streams.video:
                raise BadInput("the file holds no pictures; it is no video")
            stream = container.streams.video[0]
            check_size(stream.width, stream.height, "video")
            length = stream.duration or 0
            start, last = stream.start_time or 0, None
            for time in middles(frames, length):
                container.seek(start + time, stream=stream)
                for frame in container.decode(stream):
                    last = frame.to_image()
                    if frame.pts is None or frame.pts + (frame.duration or 1) > start + time:
                        break
                if last is None:
                    raise BadInput("video without a frame that can be decoded")
                yield last
    except BadInput:
        raise
    except Exception as error:  # the library raises types of its own and the file system's
        raise BadInput(f"not a readable video ({type(error).__name__}: {reason(error)})") from error
