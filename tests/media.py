"""Small files of every modality, made here: sounds, clips, series."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image


def tone(hertz: float, seconds: float, rate: int, *, channels: int = 1, loudness: float = 0.5) -> np.ndarray:
    """A sine, float32 [samples, channels]."""
    wave = loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def sound(samples: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """An audio file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def clip(greys: Sequence[int], size: tuple[int, int] = (8, 8), kind: str = "GIF") -> bytes:
    """An animation whose frames are of one grey each."""
    frames = [Image.new("L", size, grey).convert("RGB") for grey in greys]
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=100, **options)
    return buffer.getvalue()


def film(
    path: Path, greys: Sequence[int], size: int = 32, rate: int = 10, codec: str = "mpeg4", keys: int = 12
) -> Path:
    """A video file whose frames are of one grey each, with a key frame in so many."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = keys
        for grey in greys:
            pixels = np.full((size, size, 3), grey, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
