"""What audio towers read, made from a waveform with plain tensor operations, so that it lies inside an exported graph.

Each front end does what transformers' feature extractor of the same checkpoint does, with the parameters of its
``preprocessor_config.json``, and takes a waveform float32 [B, S] in [-1, 1] with zeros behind its end, and its lengths
int64 [B]. The Fourier transform of a frame is a product with a fixed basis, which runs as a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.contracts import UserError

AST_FRAME, AST_HOP, AST_FFT = 400, 160, 512  # Kaldi's 25 ms and 10 ms at 16 kHz, which its extractor fixes
AST_FLOOR = float(np.finfo(np.float32).eps)
CLAP_FLOOR = WHISPER_FLOOR = 1e-10


def fourier_basis(
    frame: int, fft: int, window: NDArray[np.float64], *, preemphasis: float = 0.0, remove_mean: bool = False
) -> NDArray[np.float64]:
    """Return the real and imaginary parts of a frame's Fourier transform as one matrix [2 (fft / 2 + 1), frame].

    Everything that is linear in the frame is a factor of it: taking off its mean, then x_n - a x_(n-1) (the first
    sample stands for the one before it), then the window.

    Args:
        frame: samples a frame.
        fft: length of the transform; frames are followed by zeros.
        window: [frame].
        preemphasis: a.
        remove_mean: take off the mean of each frame first.
    """
    angles = 2 * math.pi / fft * np.outer(np.arange(fft // 2 + 1), np.arange(frame))
    emphasis = np.eye(frame) - preemphasis * np.eye(frame, k=-1)
    emphasis[0, 0] -= preemphasis
    centre = np.eye(frame) - float(remove_mean) / frame
    return np.concatenate([np.cos(angles), -np.sin(angles)]) * window @ emphasis @ centre


class MelSpectrogram(nn.Module):
    """Energies of mel bands: [B, S] -> [B, bands, frames], a frame every ``hop`` samples, without padding.

    Args:
        basis: of :func:`fourier_basis`.
        filters: mel filter bank, [bins, bands].
        hop: samples between frames.
    """

    basis: Tensor
    filters: Tensor

    def __init__(self, basis: NDArray[np.float64], filters: NDArray[np.float64], hop: int) -> None:
        super().__init__()
        self.hop = hop
        self.register_buffer("basis", torch.from_numpy(basis).float()[:, None], persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters).float().T.contiguous(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the energies, in float32 under autocast too: half precision has no room for them."""
        kind = waveform.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            real, imaginary = F.conv1d(waveform[:, None], self.basis, stride=self.hop).chunk(2, dim=1)
            return self.filters @ (real.square() + imaginary.square())


class Normalized(nn.Module):
    """wav2vec 2.0's: each clip with mean 0 and variance 1 over its own samples, zeros behind: [B, S] -> [B, S].

    Args:
        extractor: transformers' feature extractor.
        num_samples: S.
    """

    def __init__(self, extractor: Any, num_samples: int) -> None:
        super().__init__()
        self.normalize = bool(extractor.do_normalize)

    def forward(self, waveform: Tensor, length: Tensor) -> Tensor:
        """Return what the tower reads."""
        if not self.normalize:
            return waveform
        there = (torch.arange(waveform.shape[1], device=waveform.device) < length[:, None]).to(waveform.dtype)
        count = length.clamp(min=1)[:, None]
        centred = (waveform - (waveform * there).sum(1, keepdim=True) / count) * there
        return centred / (centred.square().sum(1, keepdim=True) / count + 1e-7).sqrt()


class WhisperMel(nn.Module):
    """Whisper's: log-mel of the clip in a window of 30 s (``chunk_length``), [B, S] -> [B, bands, frames].

    log10 of the energies, no lower than the clip's highest less 8, then (x + 4) / 4 (Radford et al. 2022, arXiv
    2212.04356).

    Args:
        extractor: transformers' feature extractor.
        num_samples: S.

    Raises:
        UserError: clips are longer than the window.
    """

    def __init__(self, extractor: Any, num_samples: int) -> None:
        super().__init__()
        self.fft, self.window = int(extractor.n_fft), int(extractor.n_samples)
        refuse_longer(num_samples, self.window)
        basis = fourier_basis(self.fft, self.fft, hann(self.fft, periodic=True))
        self.mel = MelSpectrogram(basis, extractor.mel_filters, int(extractor.hop_length))

    def forward(self, waveform: Tensor, length: Tensor) -> Tensor:
        """Return what the tower reads."""
        whole = F.pad(waveform, (0, self.window - waveform.shape[1]))
        energies = self.mel(F.pad(whole, (self.fft // 2, self.fft // 2), mode="reflect"))[..., :-1]
        log = energies.clamp(min=WHISPER_FLOOR).log10()
        return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8) + 4) / 4


class AstMel(nn.Module):
    """The Audio Spectrogram Transformer's: Kaldi's log-mel, [B, S] -> [B, max_length, bands].

    Frames of 25 ms every 10 ms that lie in the clip; the others are zeros before all is normalised (Gong et al. 2021,
    arXiv 2104.01778).

    Args:
        extractor: transformers' feature extractor.
        num_samples: S.

    Raises:
        UserError: clips are longer than its frames.
    """

    def __init__(self, extractor: Any, num_samples: int) -> None:
        super().__init__()
        from transformers.audio_utils import mel_filter_bank

        self.max_length, rate = int(extractor.max_length), int(extractor.sampling_rate)
        self.window = AST_FRAME + AST_HOP * (self.max_length - 1)
        refuse_longer(num_samples, self.window + AST_HOP - 1)
        self.mean, self.scale = float(extractor.mean), 2 * float(extractor.std)
        self.normalize = bool(extractor.do_normalize)
        filters = mel_filter_bank(
            num_frequency_bins=AST_FFT // 2 + 1,
            num_mel_filters=int(extractor.num_mel_bins),
            min_frequency=20,
            max_frequency=rate // 2,
            sampling_rate=rate,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
        window = hann(AST_FRAME, periodic=False)
        basis = fourier_basis(AST_FRAME, AST_FFT, window, preemphasis=0.97, remove_mean=True)
        self.mel = MelSpectrogram(basis, filters, AST_HOP)

    def forward(self, waveform: Tensor, length: Tensor) -> Tensor:
        """Return what the tower reads."""
        whole = F.pad(waveform, (0, max(0, self.window - waveform.shape[1])))[:, : self.window]
        log = self.mel(whole).clamp(min=AST_FLOOR).log().transpose(1, 2)
        frames = torch.arange(self.max_length, device=waveform.device)
        log = log * (frames < self.num_frames(length[:, None]))[..., None]
        return (log - self.mean) / self.scale if self.normalize else log

    def num_frames(self, length: Tensor) -> Tensor:
        """Frames that lie in clips of a length."""
        return (length - AST_FRAME) // AST_HOP + 1


class ClapMel(nn.Module):
    """CLAP's: log-mel in decibels of the clip in a window of 10 s (``max_length_s``), [B, S] -> [B, 1, frames, bands].

    A shorter clip is repeated as its extractor's ``padding`` says (Wu et al. 2022, arXiv 2211.06687). Clips that are
    longer than the window, of which the extractor takes random parts, are refused.

    Args:
        extractor: transformers' feature extractor.
        num_samples: S.

    Raises:
        UserError: clips are longer than the window, or the extractor pads in another way.
    """

    def __init__(self, extractor: Any, num_samples: int) -> None:
        super().__init__()
        self.fft, self.window = int(extractor.fft_window_size), int(extractor.nb_max_samples)
        refuse_longer(num_samples, self.window)
        if extractor.padding not in ("repeatpad", "repeat", "pad"):
            raise UserError(f"padding is {extractor.padding!r}; CLAP knows repeatpad, repeat and pad")
        self.padding: Literal["repeatpad", "repeat", "pad"] = extractor.padding
        fused = extractor.truncation == "fusion"
        filters = extractor.mel_filters if fused else extractor.mel_filters_slaney
        basis = fourier_basis(self.fft, self.fft, hann(self.fft, periodic=True))
        self.mel = MelSpectrogram(basis, filters, int(extractor.hop_length))

    def forward(self, waveform: Tensor, length: Tensor) -> Tensor:
        """Return what the tower reads."""
        whole = self._filled(waveform, length)
        energies = self.mel(F.pad(whole, (self.fft // 2, self.fft // 2), mode="reflect"))
        return 10 * energies.clamp(min=CLAP_FLOOR).log10().transpose(1, 2)[:, None]

    def _filled(self, waveform: Tensor, length: Tensor) -> Tensor:
        """The clip in its window: [B, S] -> [B, window]."""
        if self.padding == "pad":
            return F.pad(waveform, (0, self.window - waveform.shape[1]))
        count = length.clamp(min=1)[:, None]
        position = torch.arange(self.window, device=waveform.device)[None]
        repeated = waveform.gather(1, position % count)
        if self.padding == "repeat":
            return repeated
        return repeated * (position - position % count + count <= self.window)  # whole repetitions


def hann(length: int, *, periodic: bool) -> NDArray[np.float64]:
    """Return the Hann window, [length]: one period of a raised cosine, or with both ends zero."""
    return 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(length) / (length if periodic else length - 1))


def refuse_longer(num_samples: int, window: int) -> None:
    """Refuse clips that are longer than what a tower reads at once."""
    if num_samples > window:
        raise UserError(f"clips have {num_samples} samples, and this tower reads {window} at most; cut them shorter")


def convolved(length: Any, kernels: Sequence[int], strides: Sequence[int]) -> Any:
    """Positions behind a stack of convolutions without padding, of a number or a tensor of samples."""
    for kernel, stride in zip(kernels, strides, strict=True):
        length = (length - kernel) // stride + 1
    return length
