"""Augmentation of sounds, clips, series and records: a function of (seed, id, view), and no more than it says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.contracts import CLEAN_VIEW
from distill.data.augment import augment
from distill.data_config import AugmentConfig

B, S, T, C = 6, 4000, 40, 3
LENGTHS = torch.tensor([S, S // 2, 100, 1, 0, S])
STEPS = torch.tensor([T, T // 2, 3, 1, 0, T])
STRONG = AugmentConfig.model_validate(
    {
        "audio": {"shift": 0.3, "gain": 6, "noise": 0.5, "time_mask": 0.3, "band_mask": 0.3},
        "series": {"jitter": 0.1, "scale": 0.2, "window": 0.5},
        "tabular": {"drop": 0.5},
        "video": {"flip": 0.5, "shift": 2, "brightness": 0.3},
    }
)
CHANGES = [
    ("audio", {"shift": 0.3}),
    ("audio", {"gain": 6.0}),
    ("audio", {"noise": 0.5}),
    ("audio", {"time_mask": 0.5}),
    ("audio", {"band_mask": 0.5}),
    ("series", {"jitter": 0.1}),
    ("series", {"scale": 0.2}),
    ("series", {"window": 0.5}),
    ("tabular", {"drop": 0.5}),
    ("video", {"flip": 0.5}),
]


def make(modality):
    random = np.random.default_rng(3)
    if modality == "audio":
        waves = (5000 * random.standard_normal((B, S))).astype(np.int16) * (np.arange(S) < LENGTHS.numpy()[:, None])
        return {"audio": torch.from_numpy(waves.astype(np.int16)), "audio_length": LENGTHS}
    if modality == "series":
        there = np.arange(T) < STEPS.numpy()[:, None]
        values = random.standard_normal((B, T, C)).astype(np.float32) * there[:, :, None]
        return {"series": torch.from_numpy(values.astype(np.float32)), "series_length": STEPS}
    if modality == "tabular":
        return {"tabular": torch.tensor([[1.5, -2.0, 0, 0, 3, 1]] * B)}
    return {"video": torch.from_numpy(random.integers(0, 256, (B, 4, 3, 8, 8), dtype=np.uint8))}


def run(modality, config=STRONG, ids=None, views=None, seed=0, rows=slice(None)):
    inputs = {name: value[rows] for name, value in make(modality).items()}
    ids = torch.arange(B)[rows] if ids is None else ids
    views = torch.ones(len(ids), dtype=torch.int64) if views is None else views
    return augment(modality, inputs, ids, views, seed, config, numbers=2)


def one(modality, changes):
    return AugmentConfig.model_validate({modality: changes})


@pytest.mark.parametrize("modality", ["audio", "series", "tabular", "video"])
def test_a_row_changes_alike_in_every_batch(modality):
    whole = run(modality)
    for row in range(B):
        alone = run(modality, rows=slice(row, row + 1))
        assert all(torch.equal(alone[name][0], whole[name][row]) for name in whole)
    other_view, other_seed = run(modality, views=torch.full((B,), 2)), run(modality, seed=1)
    assert not torch.equal(whole[modality], other_view[modality])
    assert not torch.equal(whole[modality], other_seed[modality])


@pytest.mark.parametrize("modality", ["audio", "series", "tabular", "video"])
def test_clean_rows_stay(modality):
    views = torch.tensor([CLEAN_VIEW, 1] * (B // 2))
    found, before = run(modality, views=views), make(modality)
    clean = views == CLEAN_VIEW
    assert all(torch.equal(found[name][clean], before[name][clean]) for name in before)
    assert not torch.equal(found[modality][~clean], before[modality][~clean])


@pytest.mark.parametrize(("modality", "changes"), CHANGES)
def test_each_change_changes_and_keeps_types_and_ends(modality, changes):
    before, found = make(modality), run(modality, one(modality, changes))
    assert {n: (v.dtype, v.shape) for n, v in found.items()} == {n: (v.dtype, v.shape) for n, v in before.items()}
    assert not torch.equal(found[modality], before[modality])
    if length := {"audio": "audio_length", "series": "series_length"}.get(modality):
        behind = torch.arange(found[modality].shape[1]) >= found[length][:, None]
        assert not found[modality][behind].any()
        assert (found[length][LENGTHS > 0] >= 1).all() and found[length][4] == 0


def test_nothing_asked_for_is_nothing_done():
    for modality in ("audio", "series", "tabular", "video"):
        before = make(modality)
        found = augment(modality, before, torch.arange(B), torch.ones(B, dtype=torch.int64), 0, AugmentConfig())
        assert all(found[name] is before[name] for name in before)


def test_sounds_move_and_nothing_else():
    before, found = make("audio"), run("audio", one("audio", {"shift": 0.3}))
    for row in range(B):
        length, own = int(before["audio_length"][row]), int(found["audio_length"][row])
        if own > length:  # later
            late = own - length
            assert torch.equal(found["audio"][row, late:own], before["audio"][row, : own - late])
            assert not found["audio"][row, :late].any()
        elif own < length:  # earlier, or cut at the end
            early = torch.equal(found["audio"][row, :own], before["audio"][row, length - own : length])
            assert early or own == S


def test_noise_is_white_and_as_loud_as_asked():
    random = torch.arange(200)
    inputs = {"audio": torch.full((200, S), 1000, dtype=torch.int16), "audio_length": torch.full((200,), S)}
    found = augment("audio", inputs, random, torch.ones(200, dtype=torch.int64), 0, one("audio", {"noise": 0.5}))
    noise = found["audio"].double() - 1000
    share = noise.std(1) / 1000
    assert share.max() < 0.5 and abs(share.mean() - 0.25) < 0.03
    assert noise.mean(1).abs().max() < 30
    spectrum = torch.fft.rfft(noise).abs().pow(2).mean(0)[1:-1]
    low, high = spectrum[: len(spectrum) // 2].mean(), spectrum[len(spectrum) // 2 :].mean()
    assert 0.9 < low / high < 1.1


def test_a_band_vanishes_for_every_model_alike():
    found, before = run("audio", one("audio", {"band_mask": 0.5})), make("audio")
    spectra = [torch.fft.rfft(part["audio"][0].double()).abs() for part in (found, before)]
    gone = (spectra[0] < 0.05 * spectra[1]).nonzero().flatten()
    stretches = (gone.diff() > 1).nonzero()
    kept = torch.ones(len(spectra[0]), dtype=torch.bool)
    kept[gone] = False
    assert len(gone) > 20 and not len(stretches)
    assert torch.allclose(spectra[0][kept], spectra[1][kept], rtol=0.05, atol=500)


def test_windows_are_parts_of_the_series():
    values = torch.arange(T, dtype=torch.float32).repeat(B, C, 1).transpose(1, 2).contiguous()
    inputs = {"series": values, "series_length": torch.full((B,), T)}
    config = one("series", {"window": 0.5})
    found = augment("series", inputs, torch.arange(B), torch.ones(B, dtype=torch.int64), 0, config)["series"][..., 0]
    steps = found.diff(dim=1)
    assert (steps > 0.49).all() and (steps <= 1.0001).all() and (found >= 0).all() and (found <= T - 1).all()
    assert torch.allclose(steps.max(1).values, steps.min(1).values, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(drop=st.floats(0.1, 0.9), seed=st.integers(0, 5))
def test_dropped_columns_are_missing_ones(drop, seed):
    rows = 400
    inputs = {"tabular": torch.tensor([[1.5, -2.0, 0, 0, 3, 1]] * rows)}
    views = torch.ones(rows, dtype=torch.int64)
    config = one("tabular", {"drop": drop})
    found = augment("tabular", inputs, torch.arange(rows), views, seed, config, numbers=2)["tabular"]
    assert torch.equal(found[:, :2] == 0, found[:, 2:4] == 1)
    lost = torch.cat([found[:, 2:4], (found[:, 4:] == 0).float()], dim=1).mean(0)
    assert (lost - drop).abs().max() < 0.13


def test_all_frames_of_a_clip_change_alike():
    frame = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (B, 1, 3, 8, 8), dtype=np.uint8))
    inputs = {"video": frame.repeat(1, 5, 1, 1, 1)}
    changes = {"rotate": 20, "randaugment": {}, "saturation": 0.5, "hue": 0.2, "erase": 0.5}
    config = one("video", {"flip": 0.5, "shift": 3, "brightness": 0.4, "crop": 0.5} | changes)
    found = augment("video", inputs, torch.arange(B), torch.ones(B, dtype=torch.int64), 0, config)["video"]
    assert (found == found[:, :1]).all() and not torch.equal(found, inputs["video"])


def test_a_sound_keeps_at_least_a_sample():
    inputs = {"audio": torch.full((50, 10), 9, dtype=torch.int16), "audio_length": torch.ones(50, dtype=torch.int64)}
    views = torch.arange(50)
    found = augment("audio", inputs, torch.zeros_like(views), views, 0, one("audio", {"shift": 0.9}))
    assert (found["audio_length"] >= 1).all() and (found["audio"] != 0).any(1).all()
