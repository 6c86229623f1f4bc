"""Sounds: one channel at one sampling rate, cut or padded to one length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.contracts import UserError
from distill.formats.base import Arrays, BadInput, Format, check_content, opened, reason

RATES = (1_000, 768_000)
"""Sampling rates that are believed, hertz; a file that says another one is damaged."""
MAX_CHANNELS = 64
FULL_SCALE = 32767
SILENCE = 33  # 60 dB below
MARGIN = 0.1  # seconds that are read behind the end, which the resampling filter needs there


@dataclass(frozen=True)
class AudioFormat(Format):
    """Sounds of one rate and length; what follows the first ``seconds`` is never read.

    Attributes:
        sample_rate: hertz.
        seconds: length.
    """

    sample_rate: int
    seconds: float

    @property
    def num_samples(self) -> int:
        """S, samples of a row."""
        return round(self.sample_rate * self.seconds)

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As :attr:`Format.arrays`."""
        return {"audio": ("int16", (self.num_samples,)), "audio_length": ("int64", ())}

    @property
    def parameters(self) -> dict[str, int]:
        """As :attr:`Format.parameters`."""
        return {"sample_rate": self.sample_rate, "num_samples": self.num_samples}

    def doubt(self, arrays: Arrays) -> str:
        """As :meth:`Format.doubt`: nothing in it is as loud as 60 dB below the loudest that a file can hold."""
        return "silent" if int(np.abs(arrays["audio"].astype(np.int32)).max()) < SILENCE else ""

    def read(self, value: Any) -> Arrays:
        """Decode an audio file (WAV, FLAC, OGG, MP3 and what else libsndfile reads), or take int16 samples.

        Channels are averaged, and another sampling rate is converted. Samples in an array, int16 [any number], have
        this rate already.
        """
        if isinstance(value, np.ndarray):
            if value.ndim != 1 or value.dtype != np.int16:
                raise BadInput(f"audio array is {value.dtype} {value.shape}; expected int16 samples of one channel")
            samples = value
        else:
            samples = to_int16(self._decoded(check_content(value, "audio")))
        if not len(samples):
            raise BadInput("audio of length 0; it holds no sample")
        length = min(len(samples), self.num_samples)
        whole = np.zeros(self.num_samples, np.int16)
        whole[:length] = samples[:length]
        return {"audio": whole, "audio_length": np.array(length, np.int64)}

    def _decoded(self, content: Any) -> NDArray[np.float32]:
        soundfile = _needed("soundfile")
        try:
            with opened(content) as source, soundfile.SoundFile(source) as file:
                rate, channels = int(file.samplerate), int(file.channels)
                if not RATES[0] <= rate <= RATES[1] or channels > MAX_CHANNELS:
                    raise BadInput(f"audio claims {rate} samples a second in {channels} channels; it is damaged")
                frames = math.ceil((self.seconds + MARGIN) * rate)
                samples = file.read(frames, dtype="float32", always_2d=True).mean(axis=1)
        except BadInput:
            raise
        except Exception as error:  # the library raises types of its own and the file system's
            raise BadInput(f"not readable audio ({type(error).__name__}: {reason(error)})") from error
        if not np.isfinite(samples).all():
            raise BadInput("audio holds samples that are no finite numbers")
        if rate == self.sample_rate or not len(samples):
            return np.asarray(samples, np.float32)
        found = np.asarray(_needed("soxr").resample(samples, rate, self.sample_rate), np.float32)
        if not len(found):
            raise BadInput(f"audio of {len(samples)} samples at {rate} Hz is shorter than one at {self.sample_rate} Hz")
        return found


def to_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples in -1 to 1 as integers; louder ones are clipped."""
    return np.rint(np.clip(samples, -1, 1) * FULL_SCALE).astype(np.int16)


def _needed(package: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise UserError(f"audio files need the package {package}; pip install 'multidistill[audio]'") from error
