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
from distill.formats.image import FILE_TYPES, MAX_PIXELS, check_pixels, check_size, fitted

MAX_ANIMATED = 4 * MAX_PIXELS
"""Most pixels of all frames of an animated image, which have to be decoded one after the other."""
MAX_DECODED = 36_000
"""Most frames of a video file that are decoded: those wanted, and those before them from a key frame on."""
OPTIONS = {"format_whitelist": "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,flv,ogg,asf,ivf"}
"""Containers that are read: others begin with a network, or take any text for pictures."""


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

    def doubt(self, arrays: Arrays) -> str:
        """As :meth:`Format.doubt`: its frames are all the same."""
        frames = arrays["video"]
        return "standing still" if len(frames) > 1 and bool((frames == frames[:1]).all()) else ""

    def read(self, value: Any) -> Arrays:
        """Decode a clip, or take an array of this shape.

        The clip is divided into as many parts of the same length as there are frames, and each gives the one in its
        middle. Animated GIF, WebP, PNG and AVIF are read by Pillow, other files by PyAV.
        """
        if isinstance(value, np.ndarray):
            return {"video": check_pixels(value, self._shape, "video")}
        content = check_content(value, "video")
        try:
            with opened(content) as file, Image.open(file, formats=FILE_TYPES) as animation:
                check_size(*animation.size, "video")
                pixels = animation.width * animation.height * getattr(animation, "n_frames", 1)
                if pixels > MAX_ANIMATED:
                    raise BadInput(f"animation of {pixels} pixels is above the limit of {MAX_ANIMATED} pixels")
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
    """Frames of a video file: the packets say when each is shown, and what lies between key frames is decoded once."""
    try:
        import av
    except ImportError as error:
        raise UserError("video files need the package av; pip install 'multidistill[video]'") from error
    try:
        with opened(content) as file:
            with av.open(file, options=OPTIONS) as container:
                times, keys = _packet_times(container)
            file.seek(0)
            with av.open(file, options=OPTIONS) as container:
                targets = [times[number] for number in middles(frames, len(times))]
                yield from _shown(container, targets, keys)
    except BadInput:
        raise
    except Exception as error:  # the library raises types of its own and the file system's
        raise BadInput(f"not a readable video ({type(error).__name__}: {reason(error)})") from error


def _packet_times(container: Any) -> tuple[list[int], list[int]]:
    """When each frame is shown, in order; of those, when key frames are."""
    if not container.streams.video:
        raise BadInput("the file holds no pictures; it is no video")
    stream = container.streams.video[0]
    check_size(stream.width, stream.height, "video")
    times, keys = [], []
    for packet in container.demux(stream):
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None:
            times.append(time)
            keys += [time] if packet.is_keyframe else []
    if not times:
        raise BadInput("video without a frame")
    return sorted(times), sorted(keys)


def _shown(container: Any, targets: list[int], keys: list[int]) -> Iterator[Image.Image]:
    """The frames that are shown at rising times."""
    stream = container.streams.video[0]
    coming, last, decoded = container.decode(stream), None, 0
    for target in targets:
        key = max((time for time in keys if time <= target), default=None)
        if key is not None and key > (keys[0] if last is None else last.pts):
            container.seek(key, stream=stream)
            coming = container.decode(stream)
        while last is None or last.pts < target:
            frame = next(coming, None)
            if frame is None:
                break
            decoded += 1
            if decoded > MAX_DECODED:
                raise BadInput(f"video with more than {MAX_DECODED} frames to decode; cut it, or give it key frames")
            last = frame if frame.pts is not None else last
        if last is None:
            raise BadInput("video without a frame that can be decoded")
        yield last.to_image()
