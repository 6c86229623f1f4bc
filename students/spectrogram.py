"""Log-mel spectrograms inside the graph: what training computes is what every runtime computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.masked import within
from students.sizes import check_sizes

FULL_SCALE = 2**15
FLOOR = 1e-8
"""Power below which all is silence: 80 dB below a sine at full scale."""


class LogMel(nn.Module):
    """Waveform to log-mel spectrogram: short-time Fourier transform, power, mel filters, logarithm.

    Frame t reads the samples from t * hop on, under a periodic Hann window of N samples:
    ``X[k] = 2 / sqrt(n_fft sum_n w[n]^2) * sum_n w[n] x[n] exp(-2 pi i k n / n_fft)``, so that the powers ``|X[k]|^2``
    of a sine at full scale add up to 1. Filters are triangles of height 1 whose corners lie evenly on HTK's mel scale
    (see :func:`mel_filters`). The result is ``1 + log10(max(mel, 1e-8)) / 4``: 1 at full scale, -1 at 80 dB below and
    in silence.

    The transform is one strided convolution with a fixed basis. Basis and filters follow from the arguments, so files
    of weights do not hold them; exported graphs do: 8 N bytes for each frequency that a filter reads, 0.6 MB at 16 kHz
    with the defaults, half of it with half the ``f_max``, a quarter at half the sampling rate. They belong to no layer
    that pruning could cut, and compute in float32 also under autocast.

    Args:
        sample_rate: samples a second.
        window_ms: length of a frame, milliseconds.
        hop_ms: time from one frame to the next, milliseconds; no longer than the window.
        n_mels: M, the number of filters.
        n_fft: points of the transform, at least the window's samples; as many where None.
        f_min: where the first filter begins, Hz.
        f_max: where the last one ends, Hz; half the sampling rate where None.

    Raises:
        ValueError: a size that is not positive or does not fit the others, or a filter so narrow that it reads no
            frequency of the transform.
    """

    basis: Tensor
    filters: Tensor

    def __init__(
        self,
        *,
        sample_rate: int,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        n_mels: int = 40,
        n_fft: int | None = None,
        f_min: float = 20.0,
        f_max: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(sample_rate=sample_rate, n_mels=n_mels)
        window, self.hop = (round(sample_rate * ms / 1000) for ms in (window_ms, hop_ms))
        points, highest = window if n_fft is None else n_fft, sample_rate / 2 if f_max is None else f_max
        if not 1 <= self.hop <= window or window < 2:
            raise ValueError(
                f"hop_ms is {hop_ms} and window_ms {window_ms}, at {sample_rate} Hz {self.hop} and {window} samples; "
                "the window has at least 2, the hop at least 1 and no more than the window"
            )
        if points < window:
            raise ValueError(f"n_fft is {points}, expected at least the {window} samples of the window")
        if not 0 <= f_min < highest <= sample_rate / 2:
            raise ValueError(
                f"f_min is {f_min} and f_max {highest}; expected 0 <= f_min < f_max <= {sample_rate / 2}, half the "
                "sampling rate"
            )
        filters = mel_filters(n_mels, points, sample_rate, f_min, highest)
        empty = (filters.sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"n_mels is {n_mels}, and {len(empty)} of these filters lie between two frequencies of a transform of "
                f"{points} points; give fewer, a larger n_fft or another f_min"
            )
        read = filters.any(0)
        self.register_buffer("basis", _fourier_basis(window, points, read)[:, None].float(), persistent=False)
        self.register_buffer("filters", filters[:, read].float(), persistent=False)

    def num_frames(self, num_samples: int) -> int:
        """Frames of so many samples: the last one begins before their end."""
        return -(-num_samples // self.hop)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Transform a batch.

        Args:
            waveform: int16 [B, S]; what lies behind a row's end is not read.
            lengths: int64 [B], samples that are there.

        Returns:
            float32 [B, M, T], zero in frames that begin behind the end, and the mask bool [B, T] of the others; T is
            S / hop, rounded up.
        """
        device = waveform.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._transform(waveform, lengths)
        return self._transform(waveform, lengths)

    def _transform(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        samples = waveform.shape[1]
        frames = self.num_frames(samples)
        x = torch.where(within(lengths, samples), waveform.float() / FULL_SCALE, 0.0)
        x = F.pad(x, (0, (frames - 1) * self.hop + self.basis.shape[2] - samples))
        real, imaginary = F.conv1d(x[:, None], self.basis, stride=self.hop).chunk(2, dim=1)
        mel = self.filters @ (real.square() + imaginary.square())
        level = 1 + mel.clamp(min=FLOOR).log10() / 4
        mask = torch.arange(frames, device=lengths.device) * self.hop < lengths[:, None]
        return torch.where(mask[:, None], level, 0.0), mask


def mel_filters(n_mels: int, n_fft: int, sample_rate: int, f_min: float, f_max: float) -> Tensor:
    """Triangular filters between n_mels + 2 corners, evenly spaced on ``mel(f) = 2595 log10(1 + f / 700)``.

    The scale is O'Shaughnessy's (Speech Communication, 1987), which HTK uses; a triangle has the height 1 at its middle
    corner, and slopes are straight in Hz.

    Returns:
        float64 [n_mels, n_fft // 2 + 1], a weight for each frequency ``k * sample_rate / n_fft``.
    """
    ends = 2595 * (1 + torch.tensor([f_min, f_max], dtype=torch.float64) / 700).log10()
    mels = torch.linspace(float(ends[0]), float(ends[1]), n_mels + 2, dtype=torch.float64)
    corners = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0)


def _fourier_basis(window: int, points: int, read: Tensor) -> Tensor:
    """Real parts of the frequencies that bool [n_fft // 2 + 1] names, then imaginary ones: [2 K, window]."""
    samples = torch.arange(window, dtype=torch.float64)
    hann = 0.5 - 0.5 * (2 * torch.pi * samples / window).cos()
    angle = 2 * torch.pi / points * read.nonzero() * samples
    return torch.cat([angle.cos(), -angle.sin()]) * hann * (2 / (points * hann.square().sum()).sqrt())
