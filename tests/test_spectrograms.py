"""Spectrograms and waveforms in the graph are those of transformers' own feature extractors."""

import numpy as np
import torch
import transformers
from big_checkpoints import RATE
from hypothesis import given, settings
from hypothesis import strategies as st

from teachers.spectrograms import AstMel, ClapMel, Normalized, WhisperMel, fourier_basis, hann


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(400, 16000),
    amplitude=st.floats(0, 10000),
    frequency=st.floats(30, 7900),
    noise=st.floats(100, 5000),
    padding=st.sampled_from(["repeatpad", "repeat", "pad"]),
    truncation=st.sampled_from(["fusion", "rand_trunc"]),
    seed=st.integers(0, 99),
)
def test_front_ends_are_the_feature_extractors_of_transformers(
    length, amplitude, frequency, noise, padding, truncation, seed
):
    time = np.arange(length) / RATE
    wave = amplitude * np.sin(2 * np.pi * frequency * time) + np.random.default_rng(seed).normal(0, noise, length)
    samples = torch.from_numpy(np.clip(wave.round(), -32768, 32767) / 32768).float()
    whole = torch.nn.functional.pad(samples, (0, 16000 - length))[None]
    clap = {"max_length_s": 1, "sampling_rate": RATE, "frequency_min": 50, "frequency_max": 7000, "feature_size": 32}
    cases = [
        (Normalized, transformers.Wav2Vec2FeatureExtractor()),
        (WhisperMel, transformers.WhisperFeatureExtractor(chunk_length=2)),
        (AstMel, transformers.ASTFeatureExtractor(max_length=120, num_mel_bins=64)),
        (ClapMel, transformers.ClapFeatureExtractor(**clap, padding=padding, truncation=truncation)),
    ]
    for front_end, extractor in cases:
        expected = next(iter(extractor(samples.numpy(), sampling_rate=RATE, return_tensors="pt").values()))[0]
        found = front_end(extractor, 16000)(whole, torch.tensor([length]))[0]
        if front_end is Normalized:
            assert not found[length:].any()
            found = found[:length]
        if front_end is ClapMel:
            expected = expected[:1]
        assert (found - expected).abs().max() < 1e-3, front_end.__name__


def test_a_basis_is_the_fourier_transform_of_what_it_folds_in():
    frame = np.random.default_rng(0).normal(3, 1, 400)
    centred = frame - frame.mean()
    emphasised = centred - 0.97 * np.concatenate([centred[:1], centred[:-1]])
    window = hann(400, periodic=False)
    wanted = np.fft.rfft(emphasised * window, 512)
    found = fourier_basis(400, 512, window, preemphasis=0.97, remove_mean=True) @ frame
    np.testing.assert_allclose(found, np.concatenate([wanted.real, wanted.imag]), atol=1e-9)


def test_half_precision_leaves_spectrograms_alone():
    front_end = WhisperMel(transformers.WhisperFeatureExtractor(chunk_length=1), RATE)
    waveform = torch.randn(2, RATE, generator=torch.Generator().manual_seed(0)) / 10
    length = torch.tensor([RATE, RATE])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = front_end(waveform, length)
    assert half.dtype == torch.float32 and torch.equal(front_end(waveform, length), half)
