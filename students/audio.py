"""A small residual ConvNet for sound: it reads waveforms, and computes their spectrogram itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill.dropout import Dropout
from distill.exchange import HIDDEN, HIDDEN_MASK, Hidden
from distill.fusion.base import masked_mean
from distill.multimodal import Encoded, Encoder
from students.masked import masked_stages, run_stages
from students.sizes import check_halvings, check_stages
from students.spectrogram import LogMel


class AudioConvNet(Encoder):
    """Log-mel spectrogram, and stages of 3x3 convolutions that halve frequency, and time; a token is a time.

    Padding behind a clip's end changes nothing. Tokens are the means of the last map over frequencies, and the pooled
    vector is the mean of the tokens that are there, zero in a clip without samples.

    Args:
        sample_rate: of the data, samples a second.
        num_samples: S of the data.
        widths: channels of each stage.
        blocks: residual blocks in each stage.
        window_ms: length of a frame, milliseconds.
        hop_ms: time from one frame to the next, milliseconds.
        n_mels: filters of the spectrogram.
        n_fft: points of the transform; those of the window where None.
        f_min: where the first filter begins, Hz.
        f_max: where the last one ends, Hz; half the sampling rate where None.
        halve_time: how many stages, from the first on, halve the time; all of them where None. Speech that is to be
            written down wants a token every 40 ms or so: ``hop_ms: 10`` and ``halve_time: 2``.
        dropout: probability of dropping a channel of the pooled vector in training.

    Attributes:
        keep_float: parts of it whose operators int8 graphs leave in float: a spectrogram covers more than 8 bits.

    Raises:
        ValueError: as :class:`~students.spectrogram.LogMel`, lists of stages that do not fit, too many stages, or fewer
            than ``halve_time``.
    """

    reads = "audio"
    keep_float = ("spectrogram",)

    def __init__(
        self,
        *,
        sample_rate: int,
        num_samples: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        n_mels: int = 40,
        n_fft: int | None = None,
        f_min: float = 20.0,
        f_max: float | None = None,
        halve_time: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages(widths, blocks)
        self.spectrogram = LogMel(
            sample_rate=sample_rate,
            window_ms=window_ms,
            hop_ms=hop_ms,
            n_mels=n_mels,
            n_fft=n_fft,
            f_min=f_min,
            f_max=f_max,
        )
        halvings = len(widths) if halve_time is None else halve_time
        if not 0 <= halvings <= len(widths):
            raise ValueError(f"halve_time is {halve_time}, expected 0 to {len(widths)}, the number of stages")
        check_halvings("the number of frames", self.spectrogram.num_frames(num_samples), halvings)
        self.stages = masked_stages(1, widths, blocks, (3, 3), halvings)
        self.dropout = Dropout(dropout)
        self.out_dim, self.stage_widths = widths[-1], tuple(widths)

    def begin(self, inputs: dict[str, Tensor]) -> Hidden:
        """As :meth:`Encoder.begin`: the spectrogram."""
        levels, mask = self.spectrogram(inputs["audio"], inputs["audio_length"])
        return Hidden(levels[:, None], mask)

    def advance(self, stage: int, hidden: Hidden) -> Hidden:
        """As :meth:`Encoder.advance`."""
        return Hidden(*run_stages(self.stages[stage : stage + 1], *hidden))

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``audio`` int16 [B, S] and ``audio_length`` int64 [B]; tokens [B, T, D], T = S/hop/2^halve_time."""
        if HIDDEN in inputs:
            features, mask = inputs[HIDDEN], inputs[HIDDEN_MASK]
        else:
            features, mask = run_stages(self.stages, *self.begin(inputs))
        tokens = features.mean(dim=2).transpose(1, 2)
        return Encoded(tokens, mask, self.dropout(masked_mean(tokens, mask)))
