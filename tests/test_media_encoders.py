"""Small encoders of sound, series, tables and video: shapes, ends of rows, export, int8, pruning, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.builders import build_part
from distill.checkpoint import load_weights, save_weights
from distill.config import Part, PruneConfig, QuantizeConfig
from distill.contracts import Batch, UserError
from distill.export.onnx import export_onnx, graph_inputs, graph_outputs
from distill.fusion import ConcatFusion, SelfAttentionFusion
from distill.multimodal import Encoder, MultimodalModel, encode_present
from distill.predict import open_session
from distill.prune import prune
from distill.quantization.static import quantize_static
from distill.tasks import LinearHead
from students import ENCODERS
from students.spectrogram import LogMel, mel_filters

RATE, SAMPLES, STEPS, CHANNELS, NUMBERS, CODES, CODE_SIZE, FRAMES = 8000, 2000, 40, 3, 4, 3, 7, 4
GIVEN = {
    "audio_convnet": {"sample_rate": RATE, "num_samples": SAMPLES},
    "series_convnet": {"channels": CHANNELS, "num_steps": STEPS},
    "series_recurrent": {"channels": CHANNELS},
    "series_transformer": {"channels": CHANNELS, "num_steps": STEPS},
    "tabular_mlp": {"num_numbers": NUMBERS, "num_codes": CODES, "code_size": CODE_SIZE},
    "frame_convnet": {"num_frames": FRAMES},
    "audio_patches": {"sample_rate": RATE, "num_samples": SAMPLES},
    "series_patches": {"channels": CHANNELS, "num_steps": STEPS},
    "tabular_tokens": {"num_numbers": NUMBERS, "num_codes": CODES, "code_size": CODE_SIZE},
}
STAGES = {"widths": [16, 32], "blocks": [0, 1]}


class Case(NamedTuple):
    """An encoder with its parameters, the number of its tokens, and the channels that half of pruning leaves of all."""

    modality: str
    type: str
    params: dict[str, Any]
    tokens: int
    channels: tuple[int, int] | None
    fusion: Any = ConcatFusion


CASES = {
    "audio_convnet": Case("audio", "audio_convnet", STAGES, 7, (80, 40)),
    "fine_audio": Case("audio", "audio_convnet", {**STAGES, "halve_time": 1}, 13, (80, 40)),
    "series_convnet": Case("series", "series_convnet", STAGES, 10, (80, 40)),
    "gru": Case("series", "series_recurrent", {"dim": 32}, STEPS, None),
    "lstm": Case(
        "series", "series_recurrent", {"dim": 32, "layers": 2, "cell": "lstm", "pooling": "mean"}, STEPS, None
    ),
    "series_transformer": Case("series", "series_transformer", {"dim": 32, "patch": 6}, 7, (160, 80)),
    "tabular_mlp": Case("tabular", "tabular_mlp", {"dim": 32}, 1, (160, 80)),
    "columns": Case(
        "tabular", "tabular_mlp", {"dim": 32, "tokens": "columns"}, NUMBERS + CODES, (128, 64), SelfAttentionFusion
    ),
    "audio_patches": Case("audio", "audio_patches", {"dim": 32, "bands": 40}, 4, (32, 16)),
    "series_patches": Case("series", "series_patches", {"dim": 32, "patch": 6}, 7, (32, 16), SelfAttentionFusion),
    "tabular_tokens": Case("tabular", "tabular_tokens", {"dim": 32}, NUMBERS + CODES, None, SelfAttentionFusion),
    "video_gru": Case("video", "frame_convnet", STAGES, FRAMES, (16, 8)),
    "video_attention": Case("video", "frame_convnet", STAGES | {"pooling": "attention"}, FRAMES, (80, 40)),
    "video_mean": Case("video", "frame_convnet", STAGES | {"pooling": "mean"}, FRAMES, (80, 40)),
}
LINEAR = {"audio_patches", "series_patches", "tabular_tokens"}  # of whose mean a linear head makes little
SEQUENCES = [name for name, case in CASES.items() if case.modality in ("audio", "series")]


def built(name: str, **changes: Any) -> Encoder:
    case = CASES[name]
    torch.manual_seed(0)
    return build_part(ENCODERS, Part(type=case.type, **case.params), "encoder", **GIVEN[case.type] | changes)


def inputs(modality: str, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows as INPUTS describes them; of several, the first has the length 0 and the second the whole."""
    chance = torch.Generator().manual_seed(seed)
    if modality == "tabular":
        numbers, flags = torch.randn(rows, NUMBERS, generator=chance), torch.rand(rows, NUMBERS, generator=chance) < 0.2
        codes = torch.randint(CODE_SIZE, (rows, CODES), generator=chance)
        return {"tabular": torch.cat([numbers * ~flags, flags, codes], 1)}
    if modality == "video":
        return {"video": torch.randint(256, (rows, FRAMES, 3, 16, 16), generator=chance).to(torch.uint8)}
    size = SAMPLES if modality == "audio" else STEPS
    lengths = torch.randint(size // 2, size + 1, (rows,), generator=chance)
    lengths[:2] = torch.tensor([0, size] if rows > 1 else [size])
    if modality == "audio":
        pitch = 200 + 3000 * torch.rand(rows, 1, generator=chance)
        values = 8000 * torch.sin(2 * torch.pi * pitch * torch.arange(size) / RATE)
        values = (values + 1000 * torch.randn(rows, size, generator=chance)).to(torch.int16)
    else:
        values = torch.randn(rows, size, CHANNELS, generator=chance)
    there = (torch.arange(size) < lengths[:, None]).view(rows, size, *[1] * (values.ndim - 2))
    return {modality: values * there, f"{modality}_length": lengths}


def batch(modality: str, rows: int, seed: int = 0) -> Batch:
    here = {modality: torch.ones(rows, dtype=torch.bool)}
    return Batch(torch.arange(rows), torch.full((rows,), -1), inputs(modality, rows, seed), here, {})


def made(name: str) -> MultimodalModel:
    """A model of one encoder, with statistics of BatchNorm."""
    case, encoder = CASES[name], built(name)
    fusion, head = case.fusion([case.modality], 32), LinearHead(32, 5)
    alone = {"kind": {case.modality: LinearHead(32, 5)}}
    model = MultimodalModel({case.modality: encoder}, fusion, {"kind": head}, alone, dim=32, embedding_dim=8)
    model.train()(batch(case.modality, 64))
    return model.eval()


def feeds(rows: Batch) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in graph_inputs(rows).items()}


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_ends_of_rows(name: str) -> None:
    case, encoder = CASES[name], built(name)
    assert {case.type for case in CASES.values()} == set(GIVEN)
    rows = inputs(case.modality, 5)
    for encoded in (encoder.train()(rows), encoder.eval()(rows)):
        assert encoded.tokens.shape == (5, case.tokens, 32) and encoded.pooled.shape == (5, 32)
        assert encoded.mask.shape == (5, case.tokens) and encoded.mask.dtype == torch.bool and encoder.out_dim == 32
        assert encoded.tokens.isfinite().all() and encoded.pooled.isfinite().all()
    for part in (*encoder.parameters(), *encoder.buffers()):
        assert part.isfinite().all()
    if name in SEQUENCES:
        size = rows[case.modality].shape[1]
        expected = (rows[f"{case.modality}_length"] / size * case.tokens).ceil()
        assert (encoded.mask.sum(1) - expected).abs().max() <= 1
        assert not encoded.mask[0].any() and encoded.mask[1].all() and not encoded.pooled[0].any()
        assert (encoded.mask.int().diff(dim=1) <= 0).all()
    else:
        assert encoded.mask.all()


@pytest.mark.parametrize("name", SEQUENCES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_lies_behind_the_end_changes_nothing(name: str, data: st.DataObject) -> None:
    """Neither what it is, nor how much of it there is, nor the other rows."""
    modality, encoder = CASES[name].modality, _settled(name)
    size = SAMPLES if modality == "audio" else STEPS
    length = data.draw(st.integers(1, size))
    shorter = data.draw(st.integers(length, size))
    row = inputs(modality, 1, seed=length)[modality][:, :size]
    garbage = torch.full_like(row, 20_000 if modality == "audio" else torch.nan)
    garbage[:, :length] = row[:, :length]
    alone = row[:, :shorter].clone()
    alone[:, length:] = 0
    with torch.no_grad():
        ends = torch.tensor([length, size])
        first = encoder({modality: torch.cat([garbage, row]), f"{modality}_length": ends})
        second = encoder({modality: alone, f"{modality}_length": ends[:1]})
    count = int(second.mask.sum())
    assert int(first.mask[0].sum()) == count >= 1
    torch.testing.assert_close(first.pooled[:1], second.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.tokens[:1, :count], second.tokens[:, :count], rtol=1e-4, atol=1e-5)


_ENCODERS: dict[str, Encoder] = {}


def _settled(name: str) -> Encoder:
    """An encoder with statistics and shifts in its BatchNorms that are not the initial ones, for many examples."""
    if name not in _ENCODERS:
        encoder = built(name)
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
        _ENCODERS[name] = encoder.eval()
    return _ENCODERS[name]


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_step_before_the_end_counts(name: str) -> None:
    modality, encoder = CASES[name].modality, _settled(name)
    rows = inputs(modality, 1)
    size = rows[modality].shape[1]
    half = rows | {f"{modality}_length": torch.tensor([size // 2])}
    changed = rows[modality].clone()
    changed[:, size // 2 - 1] += 3000 if modality == "audio" else 3
    with torch.no_grad():
        plain, other = encoder(half).pooled, encoder(half | {modality: changed}).pooled
    assert not torch.allclose(plain, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_rows_without_the_modality_are_zero(name: str) -> None:
    modality, encoder = CASES[name].modality, built(name).eval()
    rows = batch(modality, 4)
    rows.present[modality][:] = torch.tensor([True, False, True, False])
    with torch.no_grad():
        encoded = encode_present(encoder, modality, rows)
        whole = encoder(rows.inputs)
    torch.testing.assert_close(encoded.pooled[::2], whole.pooled[::2])
    assert not encoded.pooled[1::2].any() and not encoded.mask[1::2].any()
    rows.present[modality][:] = False
    assert not encode_present(encoder.train(), modality, rows).pooled.any()


@pytest.mark.parametrize("name", CASES)
def test_weights_come_back_from_a_file(name: str, tmp_path: Path) -> None:
    model = made(name)
    save_weights(model, tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    other = made(name)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    load_weights(other, tmp_path / "weights.safetensors")
    rows = batch(CASES[name].modality, 4)
    with torch.no_grad():
        assert torch.equal(model(rows).logits["kind"], other(rows).logits["kind"])
    assert not [key for key in model.state_dict() if "spectrogram" in key or "starts" in key]


@pytest.mark.parametrize("name", CASES)
def test_the_graph_agrees_in_float_and_int8(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, trace = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: attempts.append(k.get("strict")) or trace(*a, **k))
    modality, model = CASES[name].modality, made(name)
    info = export_onnx(model, batch(modality, 3), tmp_path / "float.onnx")
    assert attempts == [False] and info["inputs"][modality]["shape"][0] == "batch"
    session = open_session(tmp_path / "float.onnx")
    for count in (1, 5):
        rows = batch(modality, count, seed=count)
        with torch.no_grad():
            expected = graph_outputs(model(rows))
        for key, found in zip(expected, session.run(list(expected), feeds(rows)), strict=True):
            np.testing.assert_allclose(found, expected[key].numpy(), rtol=0, atol=1e-4)

    kept = [f"encoders.{modality}.{part}" for part in getattr(model.encoders[modality], "keep_float", ())]
    calibration = [feeds(batch(modality, 16, seed)) for seed in range(4)]
    config = QuantizeConfig(keep_float=kept)
    counts = quantize_static(tmp_path / "float.onnx", tmp_path / "int8.onnx", calibration, config)
    rows = feeds(batch(modality, 32, seed=9))
    exact = session.run(["kind"], rows)[0]
    found = open_session(tmp_path / "int8.onnx").run(["kind"], rows)[0]
    cosine = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.98
    front_end = {"Conv": 1, "MatMul": 1} if modality == "audio" else {}
    assert {key: count for key, count in counts["kept_float"].items() if key == "Conv" or front_end} == front_end
    convolutions = 1 if name == "audio_patches" else 4 if "widths" in CASES[name].params else 0
    assert counts["quantized"].get("Conv", 0) == convolutions


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_channels_go(name: str) -> None:
    case, model = CASES[name], made(name)
    config = PruneConfig(ratio=0.5, modules=[f"encoders.{case.modality}"])
    if case.channels is None:
        with pytest.raises(UserError, match="no channels can be pruned there"):
            prune(model, batch(case.modality, 4), config)
        return
    small, plan = prune(model, batch(case.modality, 4), config)
    assert tuple(plan.report["channels"]) == case.channels
    assert plan.report["parameters"][1] < plan.report["parameters"][0]
    rows = batch(case.modality, 3)
    rows.present[case.modality][0] = False
    encoded = encode_present(small.encoders[case.modality], case.modality, rows)
    assert encoded.tokens.shape[2] == encoded.pooled.shape[1] == small.encoders[case.modality].out_dim
    assert small(rows).logits["kind"].isfinite().all()


def toy(name: str, rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs with two classes: high or low, rising or falling, equal or opposite signs, growing or fading light."""
    modality, chance = CASES[name].modality, torch.Generator().manual_seed(5)
    values, label = inputs(modality, rows, seed=5), torch.randint(2, (rows,), generator=chance)
    if modality == "audio":
        time = torch.arange(SAMPLES) / RATE
        values["audio"] = (8000 * torch.sin(2 * torch.pi * (500 + 500 * label[:, None]) * time)).to(torch.int16)
    if modality == "series":
        values["series"][..., 0] += (2 * label[:, None] - 1) * torch.linspace(-1, 1, STEPS)
        values["series_length"][:] = STEPS
    if modality == "tabular":
        codes = values["tabular"][:, 2 * NUMBERS]
        label = ((values["tabular"][:, 0] > 0) ^ (codes > CODE_SIZE // 2)).long()
    if modality == "video":
        light = torch.linspace(0, 1, FRAMES) if CASES[name].params.get("pooling") != "mean" else torch.ones(FRAMES)
        shown = torch.where(label[:, None] == 1, light, 1 - light)[..., None, None, None]
        values["video"] = (values["video"] * shown).to(torch.uint8)
    return values, label


@pytest.mark.parametrize("name", [name for name in CASES if name not in LINEAR])
def test_a_toy_task_is_learned(name: str) -> None:
    encoder = built(name).train()
    model, head = encoder, nn.Linear(32, 2)
    values, label = toy(name, 48)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=5e-3)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(head(model(values).pooled), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def log_mel(row: np.ndarray, *, window: int, hop: int, points: int, filters: np.ndarray) -> np.ndarray:
    """The spectrogram of one row, frame by frame, with numpy's transform in float64."""
    hann = np.hanning(window + 1)[:-1]
    padded = np.concatenate([row / 2**15, np.zeros(window)])
    frames = [padded[start : start + window] * hann for start in range(0, len(row), hop)]
    power = 4 * np.abs(np.fft.rfft(frames, points)) ** 2 / points / np.square(hann).sum()
    return 1 + np.log10(np.maximum(power @ filters.T, 1e-8)).T / 4


def triangles(n_mels: int, points: int, rate: int, low: float, high: float) -> np.ndarray:
    def to_mel(hertz: float) -> float:
        return 1127.0 * np.log(1 + hertz / 700)  # HTK's formula with the natural logarithm

    corners = 700 * (np.exp(np.linspace(to_mel(low), to_mel(high), n_mels + 2) / 1127.0) - 1)
    axis = np.arange(points // 2 + 1) * rate / points
    return np.stack([np.interp(axis, corners[i : i + 3], [0, 1, 0], 0, 0) for i in range(n_mels)])


@pytest.mark.parametrize(
    ("rate", "options"),
    [
        (8000, {}),
        (16000, {"n_mels": 64, "n_fft": 1024, "f_min": 50.0, "f_max": 4000.0}),
        (11025, {"window_ms": 31.0, "hop_ms": 7.5}),
    ],
)
def test_a_spectrogram_is_what_numpy_computes(rate: int, options: dict[str, Any]) -> None:
    layer = LogMel(sample_rate=rate, **options)
    chance = np.random.default_rng(0)
    sound = chance.normal(0, 3000, (3, rate // 4)).clip(-32768, 32767)
    sound[1] = 30000 * np.sin(2 * np.pi * 440 * np.arange(rate // 4) / rate)
    sound[2] = 0
    sound = sound.astype(np.int16)
    lengths = np.array([rate // 4, rate // 5, rate // 4])
    found, mask = layer(torch.tensor(sound), torch.tensor(lengths))
    window, hop = (round(rate * options.get(key, ms) / 1000) for key, ms in (("window_ms", 25), ("hop_ms", 10)))
    points, count = options.get("n_fft", window), options.get("n_mels", 40)
    filters = triangles(count, points, rate, options.get("f_min", 20.0), options.get("f_max", rate / 2))
    for row, length in enumerate(lengths):
        expected = log_mel(sound[row, :length], window=window, hop=hop, points=points, filters=filters)
        frames = int(mask[row].sum())
        assert frames == expected.shape[1] and mask[row, :frames].all()
        np.testing.assert_allclose(found[row, :, :frames], expected, rtol=0, atol=1e-3)
        assert not found[row, :, frames:].any()
    assert (found[2] == -1).all()  # silence lies at the floor


@pytest.mark.parametrize("band", [1, 7, 20, 38])
def test_a_sine_is_loudest_in_its_band(band: int) -> None:
    layer = LogMel(sample_rate=16000, n_fft=2048)
    corners = np.linspace(*(2595 * np.log10(1 + np.array([20.0, 8000.0]) / 700)), 42)
    pitch = 700 * (10 ** (corners[band + 1] / 2595) - 1)
    sound = (32767 * np.sin(2 * np.pi * pitch * np.arange(8000) / 16000)).astype(np.int16)[None]
    level = layer(torch.tensor(sound), torch.tensor([8000]))[0][0, :, :40].mean(1)
    assert level.argmax() == band and 0.8 < level[band] < 1.01


def test_a_spectrogram_is_exact_under_autocast() -> None:
    layer, rows = LogMel(sample_rate=RATE), inputs("audio", 2)
    plain = layer(*rows.values())[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(*rows.values())[0], plain)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.sampled_from([8000, 16000, 44100]), st.floats(0, 300), st.floats(0.3, 1.0))
def test_filters_add_up_to_one_between_the_first_and_the_last(count: int, rate: int, low: float, part: float) -> None:
    """Neighbours overlap: what one loses in Hz the next one gains."""
    high = rate / 2 * part
    filters = mel_filters(count, 1024, rate, low, high)
    mels = torch.linspace(*(float(2595 * np.log10(1 + edge / 700)) for edge in (low, high)), count + 2)
    first, last = (700 * (10 ** (float(mels[place]) / 2595) - 1) for place in (1, -2))
    axis = torch.arange(513) * rate / 1024
    inside = (axis >= first + 1e-2) & (axis <= last - 1e-2)
    torch.testing.assert_close(filters.sum(0)[inside], torch.ones(int(inside.sum()), dtype=torch.float64))
    assert (filters >= 0).all() and (filters <= 1).all()


def test_codes_of_different_columns_have_rows_of_their_own() -> None:
    encoder = built("tabular_mlp")
    codes = torch.tensor([[0.0, 0.0, 0.0], [6.0, 6.0, 6.0], [7.0, -1.0, 3.0]])
    found, table = encoder.codes(codes), encoder.codes.table.weight
    assert len(table) == CODES * CODE_SIZE
    for row, places in enumerate([[0, 7, 14], [6, 13, 20], [0, 7, 17]]):  # what no code is counts as unknown
        assert torch.equal(found[row], table[places])


def test_each_token_of_a_table_is_of_its_column() -> None:
    encoder = built("columns").eval()
    rows = inputs("tabular", 1)["tabular"]
    with torch.no_grad():
        plain = encoder({"tabular": rows}).tokens
        for column in range(2 * NUMBERS + CODES):
            other = rows.clone()
            other[:, column] = (other[:, column] + 1) % CODE_SIZE
            changed = (encoder({"tabular": other}).tokens != plain).any(2)[0].nonzero().flatten().tolist()
            assert changed == [column % NUMBERS if column < 2 * NUMBERS else column - NUMBERS]


@pytest.mark.parametrize("sizes", [(3, 0, 0), (0, 2, 5)])
@pytest.mark.parametrize("tokens", ["pooled", "columns"])
def test_tables_of_one_kind_of_column(sizes: tuple[int, int, int], tokens: str) -> None:
    names = ("num_numbers", "num_codes", "code_size")
    encoder = build_part(
        ENCODERS, Part(type="tabular_mlp", dim=8, tokens=tokens), "e", **dict(zip(names, sizes, strict=True))
    )
    encoded = encoder({"tabular": torch.ones(2, 2 * sizes[0] + sizes[1])})
    assert encoded.tokens.shape == (2, sizes[0] + sizes[1] if tokens == "columns" else 1, 8)


@pytest.mark.parametrize(("name", "matters"), [("video_gru", True), ("video_attention", True), ("video_mean", False)])
def test_the_order_of_frames_matters_where_it_should(name: str, matters: bool) -> None:
    encoder, video = built(name).eval(), inputs("video", 2)["video"]
    with torch.no_grad():
        one, other = encoder({"video": video}), encoder({"video": video.flip(1)})
    assert torch.allclose(one.pooled, other.pooled, atol=1e-6) != matters
    for frame in range(FRAMES):
        changed = video.clone()
        changed[:, frame] = 255 - changed[:, frame]
        with torch.no_grad():
            assert not torch.allclose(encoder({"video": changed}).pooled, one.pooled, atol=1e-6)
    if name != "video_gru":
        torch.testing.assert_close(one.tokens, other.tokens.flip(1))


def test_frames_are_images() -> None:
    """Weights of a ConvNet may begin those of a FrameConvNet."""
    image = build_part(ENCODERS, Part(type="convnet", **STAGES), "encoder").eval()
    encoder = built("video_mean").eval()
    encoder.load_state_dict(image.state_dict())
    video = inputs("video", 2)["video"]
    torch.testing.assert_close(encoder({"video": video}).tokens[:, 1], image({"image": video[:, 1]}).pooled)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("audio_convnet", {"widths": [8] * 5, "blocks": [0] * 5}, "the number of frames is 25, and 5 stages"),
        ("audio_convnet", {"widths": [], "blocks": []}, "give one stage or more"),
        ("audio_convnet", {"halve_time": 3}, "halve_time is 3, expected 0 to 2, the number of stages"),
        ("audio_convnet", {"halve_time": -1}, "halve_time is -1, expected 0 to 2, the number of stages"),
        ("audio_convnet", {"hop_ms": 30.0}, "hop_ms is 30.0 and window_ms 25.0, at 8000 Hz 240 and 200 samples"),
        ("audio_convnet", {"window_ms": 0.1}, "hop_ms is 10.0 and window_ms 0.1"),
        ("audio_convnet", {"n_fft": 128}, "n_fft is 128, expected at least the 200 samples"),
        ("audio_convnet", {"f_max": 5000.0}, "f_min is 20.0 and f_max 5000.0; expected 0 <= f_min < f_max <= 4000.0"),
        ("audio_convnet", {"n_mels": 0}, "n_mels is 0, expected at least 1"),
        ("audio_convnet", {"n_mels": 150}, r"n_mels is 150, and \d+ of these filters lie between two frequencies"),
        ("series_convnet", {"kernel": 4}, "kernel is 4, expected an odd number"),
        ("series_convnet", {"widths": [8, 0], "blocks": [0, 0]}, r"widths is \[8, 0\]"),
        ("series_convnet", {"widths": [8], "blocks": [-1]}, r"blocks is \[-1\]"),
        ("series_convnet", {"widths": [8] * 6, "blocks": [0] * 6}, "the number of steps is 40, and 6 stages"),
        ("gru", {"dim": 0}, "dim is 0, expected at least 1"),
        ("gru", {"layers": 0}, "layers is 0, expected at least 1"),
        ("gru", {"cell": "rnn"}, "gru"),
        ("gru", {"pooling": "max"}, "last"),
        ("series_transformer", {"heads": 5}, "heads 5 does not divide dim 32"),
        ("series_transformer", {"patch": 0}, "patch is 0, expected at least 1"),
        ("tabular_mlp", {"depth": 0}, "depth is 0, expected at least 1"),
        ("tabular_mlp", {"hidden": 0}, "hidden is 0, expected at least 1"),
        ("tabular_mlp", {"code_dim": 0}, "code_dim is 0, expected at least 1"),
        ("tabular_mlp", {"code_size": 0}, "code_size is 0, expected at least 1"),
        ("tabular_mlp", {"num_numbers": 0, "num_codes": 0}, "a table has at least one column"),
        ("tabular_mlp", {"tokens": "rows"}, "pooled"),
        ("video_mean", {"num_frames": 0}, "num_frames is 0, expected at least 1"),
        ("video_mean", {"widths": [8, 8], "blocks": [0]}, "widths has 2 stages and blocks has 1"),
        ("video_mean", {"pooling": "max"}, "gru"),
        ("video_mean", {"dropout": 1.5}, "1.5"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(name: str, changes: dict[str, Any], message: str) -> None:
    case = CASES[name]
    given = GIVEN[case.type]
    params = case.params | {key: value for key, value in changes.items() if key not in given}
    data = given | {key: value for key, value in changes.items() if key in given}
    with pytest.raises(UserError, match=message) as caught:
        build_part(ENCODERS, Part(type=case.type, **params), "student.encoders.x", **data)
    assert str(caught.value).startswith("student.encoders.x")
