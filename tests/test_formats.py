"""How files of every modality become arrays: what is read, what is brought to one shape, what is refused and why."""

import contextlib
import io
import json
import math
import sys
import time
from datetime import datetime
from decimal import Decimal

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from media import clip, film, sound, tone
from PIL import Image

from distill.contracts import INPUTS, UserError
from distill.data_config import DataConfig
from distill.formats import FORMATS, MODALITIES, BadInput, formats_of, from_json, to_json, video
from distill.formats.audio import AudioFormat
from distill.formats.image import ImageFormat
from distill.formats.series import SeriesFormat
from distill.formats.tabular import TabularFormat, number_of, text_of
from distill.formats.video import VideoFormat, middles

AUDIO = AudioFormat(8000, 0.5)
SERIES = SeriesFormat(channels=2, steps=6)
VIDEO = VideoFormat(8, 4)
TABULAR = TabularFormat(("age", "pay"), ("kind",), 4, (40.0, 10.0), (10.0, 5.0), (("b", "3"),))
ALL = {"image": ImageFormat(8), "audio": AUDIO, "video": VIDEO, "series": SERIES, "tabular": TABULAR}


def loudest(samples, rate):
    """The frequency with the most power, hertz."""
    return np.abs(np.fft.rfft(samples.astype(float))).argmax() * rate / len(samples)


def test_every_format_has_the_inputs_of_the_contract():
    names = {name for item in ALL.values() for name in item.arrays}
    assert names == {name for name in INPUTS if not name.startswith("text")} and set(ALL) == set(FORMATS)
    assert set(MODALITIES) == {*ALL, "text"}
    for modality, item in ALL.items():
        for name, (dtype, _) in item.arrays.items():
            assert name.split("_")[0] == modality and INPUTS[name].startswith(f"{dtype} [")


def test_formats_survive_json():
    assert from_json(json.loads(json.dumps(to_json(ALL)))) == ALL


def test_a_recipe_says_the_formats():
    config = DataConfig.model_validate(
        {
            "source": {"type": "table", "path": "t.csv"},
            "modalities": {"series": "s", "tabular": ["age", "kind"], "text": "t", "image": "i"},
            "working_size": 20,
            "series": {"channels": 3, "steps": 9},
            "tabular": {"categories": ["kind"], "max_categories": 7},
        }
    )
    assert formats_of(config) == {
        "series": SeriesFormat(3, 9),
        "tabular": TabularFormat(("age",), ("kind",), 8),
        "image": ImageFormat(20),
    }
    assert formats_of(config)["tabular"].parameters == {"num_numbers": 1, "num_codes": 1, "code_size": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {"audio": ["a", "b"]}}, "modalities.audio is a list"),
        ({"modalities": {"tabular": ["a", "a"]}}, "names a column twice"),
        ({"tabular": {"categories": ["kind"]}}, "tabular.categories names 'kind'"),
    ],
)
def test_columns_are_checked(changes, message):
    values = {"source": {"type": "table", "path": "t.csv"}, "modalities": {"tabular": "age"}}
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(values | changes)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_sounds_of_many_kinds(kind):
    arrays = AUDIO.read(sound(tone(440, 0.6, 16000, channels=2), 16000, kind))
    assert arrays["audio"].dtype == np.int16 and arrays["audio"].shape == (4000,) and arrays["audio_length"] == 4000
    assert abs(loudest(arrays["audio"], 8000) - 440) < 5
    middle = arrays["audio"][500:-500] / 32767
    assert abs(np.sqrt((middle**2).mean()) - 0.5 / np.sqrt(2)) < 0.02


@settings(max_examples=25, deadline=None)
@given(rate=st.integers(4000, 48000), seconds=st.floats(0.05, 1.0), channels=st.integers(1, 3))
def test_sounds_of_any_rate_keep_their_pitch_and_length(rate, seconds, channels):
    arrays = AUDIO.read(sound(tone(500, seconds, rate, channels=channels), rate))
    expected = min(0.5, seconds) * 8000
    assert abs(int(arrays["audio_length"]) - expected) <= 3
    heard = arrays["audio"][: int(arrays["audio_length"])]
    assert abs(loudest(heard, 8000) - 500) <= 8000 / len(heard) + 1
    assert not arrays["audio"][int(arrays["audio_length"]) :].any()


def test_channels_are_averaged():
    left = np.concatenate([tone(500, 0.5, 8000), -tone(500, 0.5, 8000)], axis=1)
    assert np.abs(AUDIO.read(sound(left, 8000))["audio"]).max() <= 1


def test_samples_are_taken_as_they_are(tmp_path):
    samples = np.arange(-5, 5, dtype=np.int16)
    arrays = AUDIO.read(samples)
    assert arrays["audio"][:10].tolist() == samples.tolist() and arrays["audio_length"] == 10
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="PCM_16")
    again = AUDIO.read(tmp_path / "a.wav")["audio"]
    assert np.abs(again[:10].astype(int) - samples).max() <= 1
    with pytest.raises(BadInput, match="float64"):
        AUDIO.read(np.zeros(3))


def test_of_hours_only_the_first_seconds_are_read(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 2000, 1, subtype="PCM_U8") as file:
        for _ in range(3 * 60):
            file.write(tone(300, 60, 2000))
    asked = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **k: asked.append(n) or read(self, n, **k))
    assert AUDIO.read(path)["audio_length"] == 4000
    assert asked == [1200]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"RIFF nothing", "not readable audio"),
        (sound(tone(440, 0.5, 8000), 8000)[:30], "not readable audio|length 0"),
        (sound(np.zeros((0, 1), np.float32), 8000), "length 0"),
        (sound(np.full((100, 1), np.nan, np.float32), 8000, subtype="FLOAT"), "no finite numbers"),
        (np.zeros(0, np.int16), "length 0"),
        ("gone.wav", "no such audio file"),
        (7, "audio is a int"),
    ],
)
def test_bad_sounds(value, message):
    with pytest.raises(BadInput, match=message):
        AUDIO.read(value)


def test_a_sampling_rate_that_nobody_has_is_damage():
    content = bytearray(sound(tone(440, 0.5, 8000), 8000))
    content[24:28] = (10).to_bytes(4, "little")
    with pytest.raises(BadInput, match="claims 10 samples a second"):
        AUDIO.read(bytes(content))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read_and_nothing_else(data):
    kind = data.draw(st.sampled_from(["audio", "video", "series"]))
    content = {
        "audio": sound(tone(440, 0.05, 8000), 8000, data.draw(st.sampled_from(["WAV", "FLAC", "OGG"]))),
        "video": clip([0, 100, 200]),
        "series": b"1,2\n3,4\n",
    }[kind]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        arrays = ALL[kind].read(bytes(damaged[: data.draw(st.integers(0, len(content)))]))
    except BadInput as error:
        assert "\n" not in str(error) and " object at 0x" not in str(error)
    else:
        assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == ALL[kind].arrays


def test_missing_packages_are_named(monkeypatch):
    content = sound(tone(440, 0.1, 8000), 8000)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match=r"pip install 'multidistill\[audio\]'") as caught:
        AUDIO.read(content)
    assert not isinstance(caught.value, BadInput)  # the row is not to blame
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'multidistill\[video\]'"):
        VIDEO.read(b"\0\0\0\x18ftypmp42")


def test_frames_are_the_middles_of_equal_parts():
    assert middles(4, 4) == [0, 1, 2, 3] and middles(2, 8) == [2, 6] and middles(4, 2) == [0, 0, 1, 1]
    assert middles(3, 1) == [0, 0, 0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations(kind):
    found = VIDEO.read(clip([0, 40, 80, 120, 160, 200, 240, 255], kind=kind))["video"]
    assert found.shape == (4, 3, 8, 8) and found.dtype == np.uint8
    assert np.abs(found.mean((1, 2, 3)) - [40, 120, 200, 255]).max() < 2


@pytest.mark.parametrize("keys", [1, 5, 100])
@pytest.mark.parametrize(
    ("end", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4"), ("ts", "mpeg2video")]
)
def test_films(tmp_path, end, codec, keys):
    path = film(tmp_path / f"a.{end}", [*range(0, 240, 12)], codec=codec, keys=keys, rate=25)
    found = VIDEO.read(path)["video"].mean((1, 2, 3))
    assert np.abs(found - [24, 84, 144, 204]).max() <= 14
    assert np.array_equal(VIDEO.read(path.read_bytes())["video"], VIDEO.read(str(path))["video"])


def test_long_films_are_decoded_once_and_no_more_than_they_must(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", [100] * 300, keys=300)
    monkeypatch.setattr(video, "MAX_DECODED", 300)
    VideoFormat(8, 16).read(path)  # one key frame: all are decoded, but once
    monkeypatch.setattr(video, "MAX_DECODED", 200)
    with pytest.raises(BadInput, match="more than 200 frames to decode"):
        VideoFormat(8, 16).read(path)
    short = film(tmp_path / "b.mp4", [100] * 300, keys=5)
    monkeypatch.setattr(video, "MAX_DECODED", 16)
    VideoFormat(8, 4).read(short)


def test_what_begins_with_a_network_or_is_text_is_no_film(tmp_path):
    sdp = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    (tmp_path / "a.nfo").write_bytes(b"hello world " * 50)
    for value in (sdp, tmp_path / "a.nfo", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"):
        began = time.perf_counter()
        with pytest.raises(BadInput, match="not a readable video"):
            VIDEO.read(value)
        assert time.perf_counter() - began < 10  # an RTP demuxer waits for 20 seconds


def test_a_bomb_of_an_animation_is_refused(monkeypatch):
    monkeypatch.setattr(video, "MAX_ANIMATED", 150)
    with pytest.raises(BadInput, match="animation of 192 pixels is above the limit of 150"):
        VIDEO.read(clip([1, 2, 3]))


def test_a_picture_is_a_clip_that_stands_still():
    found = VIDEO.read(clip([7]))["video"]
    assert (found == found[0]).all() and VIDEO.read(found)["video"] is found


@pytest.mark.parametrize(
    ("value", "message"),
    [(b"no film", "not a readable video"), ("gone.mp4", "no such video file"), (np.zeros((4, 3, 8, 8)), "float64")],
)
def test_bad_clips(value, message):
    with pytest.raises(BadInput, match=message):
        VIDEO.read(value)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(sound(tone(440, 0.1, 8000), 8000, "OGG"))
    with pytest.raises(BadInput, match="holds no pictures"):
        VIDEO.read(path)


@pytest.mark.parametrize("how", ["list", "array", "npy", "csv", "headed csv", "path"])
def test_series_come_in_many_ways(how, tmp_path):
    numbers = np.array([[1.0, 2.5], [-3.0, 4.0], [5.5, 1e-3]])
    buffer = io.BytesIO()
    np.save(buffer, numbers)
    (tmp_path / "a.csv").write_text("1,2.5\n-3,4\n5.5,0.001\n")
    value = {
        "list": numbers.tolist(),
        "array": numbers.astype(np.float32),
        "npy": buffer.getvalue(),
        "csv": b"1,2.5\n-3,4\n\n5.5,1e-3\n",
        "headed csv": b"left;right\n1;2.5\n-3;4\n5.5;0.001\n",
        "path": tmp_path / "a.csv",
    }[how]
    arrays = SERIES.read(value)
    assert arrays["series_length"] == 3 and np.allclose(arrays["series"][:3], numbers)
    assert not arrays["series"][3:].any() and arrays["series"].dtype == np.float32


def test_one_channel_needs_no_inner_lists_and_long_series_are_cut():
    arrays = SeriesFormat(1, 4).read(list(range(9)))
    assert arrays["series"][:, 0].tolist() == [0, 1, 2, 3] and arrays["series_length"] == 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1.0, float("nan")]], "nan at step 0, channel 1"),
        ([[1.0, None]], "nan at step 0, channel 1"),
        ([[1.0, 2.0], [np.inf, 0.0]], "inf at step 1, channel 0"),
        ([1.0, 2.0], r"shape \[2, 1\]; expected \[steps, 2\]"),
        (np.zeros((0, 2)), "length 0"),
        ([["a", "b"]], "not a series of numbers"),
        ([[1, 2], [3]], "not a series of numbers"),
        (b"1,2\n3,x\n", "not a series of numbers"),
        (b"1,2\n3\n", "its lines differ"),
        (b"\x93NUMPY nothing", "not a series of numbers"),
        (b"", r"shape \[0"),
        ("gone.csv", "no such series file"),
    ],
)
def test_bad_series(value, message):
    with pytest.raises(BadInput, match=message):
        SERIES.read(value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_arrays_are_bad_input(data):
    buffer = io.BytesIO()
    np.save(buffer, np.ones((3, 2)))
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadInput):
        SERIES.read(bytes(damaged))


@pytest.mark.parametrize("array", [np.ones((2, 2), complex), np.array(["1"]), np.array(["2024-01-01"], "M8[D]")])
def test_arrays_of_anything_but_numbers_are_refused(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    for value in (array, buffer.getvalue()):
        with pytest.raises(BadInput, match="not a series of numbers"):
            SERIES.read(value)


def test_a_header_that_promises_more_than_the_file_holds():
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with pytest.raises(BadInput, match=r"series of shape \[1000000000000\] in a file of"):
        SERIES.read(buffer.getvalue())


def test_of_a_long_table_only_the_first_lines_are_parsed():
    assert SERIES.read(b"1,2\n" * 6 + b"never read\n")["series_length"] == 6


def test_numbers_beyond_32_bits_are_refused():
    for value in ([[1e300, 1]], [[1, 10**400]]):
        with pytest.raises(BadInput):
            SERIES.read(value)
    for value in (1e39, "1e300", 10**400):
        with pytest.raises(BadInput, match="beyond 32 bits"):
            TABULAR.read({"age": value})


def test_the_name_of_a_file_says_nothing(tmp_path):
    content = sound(tone(440, 0.3, 8000), 8000)
    for name in ("a.raw", "a.mp3", "a"):
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(AUDIO.read(tmp_path / name)["audio"], AUDIO.read(content)["audio"])


def test_names_that_no_file_can_have():
    for item in ALL.values():
        if not isinstance(item, TabularFormat):
            with pytest.raises(BadInput):
                item.read("x" * 5000)


def test_pickled_arrays_are_never_loaded():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match="not a series of numbers"):
        SERIES.read(buffer.getvalue())


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_series_are_standardised_by_the_rows_they_were_fitted_on(data):
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    lengths = random.integers(0, 7, 12)
    lengths[0] = 6
    values = random.normal(3, 2, (12, 6, 2)).astype(np.float32) * (np.arange(6) < lengths[:, None])[:, :, None]
    cut = data.draw(st.integers(1, 11))
    fitted = SERIES.fit([(values[:cut], lengths[:cut]), (values[cut:], lengths[cut:])])
    there = np.concatenate([row[:length] for row, length in zip(values, lengths, strict=True)]).astype(float)
    assert np.allclose(fitted.mean, there.mean(0)) and np.allclose(fitted.std, there.std(0))
    standard = fitted.standardise(values, lengths)
    assert np.allclose(standard[0], fitted.read(values[0])["series"], atol=1e-6)
    assert not standard[lengths == 0].any()


def test_small_units_are_no_constant():
    values = np.random.default_rng(0).normal(0, 1e-7, (4, 6, 2)).astype(np.float32)
    fitted = SERIES.fit([(values, np.full(4, 6))])
    assert 0.5 < fitted.standardise(values, np.full(4, 6)).std() < 1.5


def test_a_constant_channel_stays_finite():
    fitted = SERIES.fit([(np.full((3, 6, 2), 1e6, np.float32), np.full(3, 6))])
    assert np.abs(fitted.read(np.full((6, 2), 1e6))["series"]).max() == 0


def test_records():
    row = {"age": 60, "pay": None, "kind": 3.0, "other": "x"}
    assert TABULAR.read(row)["tabular"].tolist() == [2, 0, 0, 1, 2]
    assert TABULAR.read({"age": "30", "pay": " ", "kind": "never seen"})["tabular"].tolist() == [-1, 0, 0, 1, 0]
    assert TABULAR.read({"age": float("nan"), "pay": 15, "kind": "b"})["tabular"].tolist() == [0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"age": "old"}, "column 'age' holds 'old', which is no number"),
        ({"pay": "inf"}, "column 'pay' holds inf, which is beyond 32 bits"),
        ([1, 2], "the record is a list"),
    ],
)
def test_bad_records(value, message):
    with pytest.raises(BadInput, match=message):
        TABULAR.read(value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((7, 7.0, "007", "7", "7.0", np.int8(7), np.float32(7)), "7"),
        ((0.1, np.float32(0.1), "0.10", Decimal("0.1")), "0.1"),
        ((True, "True", "true", np.bool_(True)), "true"),
        ((datetime(2024, 1, 2), "2024-01-02", "2024-01-02 00:00:00", "2024-01-02T00:00:00"), "2024-01-02"),
        ((datetime(2024, 1, 2, 3), "2024-01-02T03:00:00"), "2024-01-02 03:00:00"),
        (("red ", "red", b"red"), "red"),
        ((None, "", " ", math.nan, np.float32("nan"), "nan"), ""),
    ],
)
def test_a_category_is_the_same_however_it_is_written(values, text):
    assert {text_of(value) for value in values} == {text} and text_of(text) == text


@pytest.mark.parametrize("word", ["", " ", "NA", "nan", "NULL", "n/a", None])
def test_words_for_missing_numbers(word):
    assert math.isnan(number_of(word, "age"))
    assert number_of("true", "age") == number_of(True, "age") == 1


def test_an_image_of_one_pixel_is_an_image():
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), (9, 8, 7)).save(buffer, "PNG")
    assert ImageFormat(8).read(buffer.getvalue())["image"][:, 0, 0].tolist() == [9, 8, 7]
