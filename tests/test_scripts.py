"""The scripts that make tables of the emoji sample: what each promises of its rows."""

import io
import os
from collections import Counter, defaultdict

import ask_emoji
import label_sentiment
import make_listings
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import speak_emoji
from animate_emoji import SIZE, THIRDS, animated, encoded, frames_of, points_of, some_words, thirds, trace_of
from animate_emoji import main as animate
from emoji_table import chance, chosen, ink_of, pixels_of, read_sample, write_rows
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from distill.formats.series import SeriesFormat
from distill.formats.video import VideoFormat

SQUARE = arrays(np.uint8, (8, 8, 3))


@pytest.fixture(scope="module")
def sample():
    return read_sample()


@pytest.fixture(scope="module")
def asked(sample):
    return ask_emoji.questions(sample[::5])


@pytest.fixture(scope="module")
def listed(sample):
    return make_listings.listings(sample[::5])


def in_one_split(rows):
    splits = defaultdict(set)
    for row in rows:
        splits["emoji", row["emoji"]].add(row["split"])
        splits["family", row["family"]].add(row["split"])
    return all(len(found) == 1 for found in splits.values()) and len({row["id"] for row in rows}) == len(rows)


def test_every_table_keeps_splits_and_gives_ids(sample, asked, listed):
    assert in_one_split(asked) and in_one_split(listed) and in_one_split(label_sentiment.labelled(sample))
    assert {row["split"] for row in asked} == {row["split"] for row in listed} == {"train", "valid", "test"}


@given(st.integers(), st.text(), st.integers(1, 9))
def test_a_choice_follows_from_its_key(number, word, most):
    assert 0 <= chance(number, word) < 1
    options = range(most)
    assert chosen(options, number, word) == chosen(options, number, word) in options


def test_chances_are_spread():
    found = np.array([chance("spread", number) for number in range(4000)])
    assert np.histogram(found, 4, (0, 1))[0] == pytest.approx([1000] * 4, rel=0.15)


def test_sentiments_are_of_subcategories_that_exist(sample):
    table = {row["subcategory"] for row in sample if row["category"] == "Smileys & Emotion"}
    assert set(label_sentiment.SENTIMENTS) | set(label_sentiment.MIXED) == table
    assert not set(label_sentiment.SENTIMENTS) & set(label_sentiment.MIXED)
    plain = {row["codepoints"]: label_sentiment.SENTIMENTS.get(row["subcategory"]) for row in sample}
    assert all(plain[points] not in (None, label) for points, label in label_sentiment.OTHERWISE.items())


def test_sentiments_of_known_emoji_and_which_rows_are_kept(sample):
    rows = label_sentiment.labelled(sample)
    said = {row["emoji"]: row["sentiment"] for row in rows}
    assert [said[emoji] for emoji in "😀🥰💔😢😐🤒"] == ["positive"] * 2 + ["negative"] * 2 + ["neutral", "negative"]
    assert None in said.values() and "🍕" not in said
    assert all(row["sentiment"] or row["split"] == "train" for row in rows)
    assert len({(row["split"], row["sentiment"]) for row in rows if row["sentiment"]}) == 9


def test_an_answer_is_true_of_the_drawing(sample, asked):
    drawings = {row["id"]: row for row in sample}
    for row in asked:
        form, about = row["kind"].split()
        drawing = drawings[row["id"] // ask_emoji.QUESTIONS]
        true = {**drawing, "colour": row["colour"]}[about]
        if form == "open":
            assert row["answer"] == true
        else:
            named = [words.format(true.lower().replace("-", " ")) for words in ask_emoji.CLOSED[about]]
            assert row["answer"] == ("yes" if row["question"] in named else "no")


def test_a_question_alone_is_a_poor_guide(asked):
    closed = [row for row in asked if row["kind"].startswith("closed")]
    answers = Counter(row["answer"] for row in closed)
    assert set(answers) == {"yes", "no"} and 0.45 < answers["yes"] / len(closed) < 0.55
    by_question = defaultdict(list)
    for row in closed:
        by_question[row["question"]].append(row["answer"] == "yes")
    often = [np.mean(said) for said in by_question.values() if len(said) >= 30]
    assert len(often) > 5 and min(often) > 0.25 and max(often) < 0.75
    assert ask_emoji.blind_accuracy(asked) < 0.45
    kinds = Counter(row["kind"] for row in asked)
    assert len(kinds) == 7 and max(kinds.values()) < 1.2 * min(kinds.values())


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((1.0, 0.8, 0.2), "yellow"),
        ((1.0, 0.5, 0.1), "orange"),
        ((0.9, 0.1, 0.1), "red"),
        ((0.5, 0.25, 0.1), "brown"),
        ((1.0, 0.7, 0.7), "pink"),
        ((1.0, 0.2, 0.7), "pink"),
        ((0.1, 0.7, 0.2), "green"),
        ((0.2, 0.5, 0.9), "blue"),
        ((0.5, 0.2, 0.8), "purple"),
        ((0.6, 0.6, 0.62), "grey"),
        ((0.1, 0.1, 0.15), "black"),
    ],
)
def test_names_of_colours(colour, name):
    assert ask_emoji.colour_name(*colour) == name
    solid = np.full((4, 4, 3), np.multiply(colour, 255), np.uint8)
    solid[0] = 255
    assert ask_emoji.main_colour(solid) == name


@given(SQUARE)
def test_the_main_colour_does_not_know_where_pixels_are(pixels):
    name = ask_emoji.main_colour(pixels)
    assert ask_emoji.main_colour(pixels[:, ::-1]) == name
    assert ask_emoji.main_colour(np.pad(pixels, ((2, 3), (1, 0), (0, 0)), constant_values=255)) == name


def test_one_in_ten_listings_is_false_in_one_part(sample, listed):
    counts = Counter(row["swapped"] for row in listed)
    assert 0.08 < 1 - counts[""] / len(listed) < 0.12
    assert min(counts[part] for part in make_listings.PARTS) > 0.02 * len(listed)
    drawings = {row["id"]: row for row in sample}
    for row in listed:
        drawing = drawings[row["id"] // make_listings.LISTINGS]
        differs = {
            "drawing": row["image"] != drawing["image"],
            "name": row["name"] not in drawing["text"].split(", "),
            "category": row["claimed"] != drawing["category"],
        }
        assert [part for part, found in differs.items() if found] == ([row["swapped"]] if row["swapped"] else [])
        assert row["verdict"] == ("fraud" if row["swapped"] else "honest")


def test_what_is_swapped_in_is_of_the_same_split(sample, listed):
    owners = defaultdict(set)
    for row in sample:
        owners[row["image"]].add((row["split"], row["style"]))
        for name in row["text"].split(", "):
            owners[name].add(row["split"])
    assert all((row["split"], row["vendor"]) in owners[row["image"]] for row in listed)
    assert all(row["split"] in owners[row["name"]] for row in listed)


def test_a_record_describes_what_is_shown(listed):
    for row in listed[:300]:
        assert row["words"] == len(row["name"].split()) and row["code_points"] == len(row["emoji"])
        pixels = pixels_of(row["image"])
        assert row["ink"] == pytest.approx(1 - (pixels >= 240).all(-1).mean())
        assert row["red"] == pytest.approx(pixels[(pixels < 240).any(-1)][:, 0].mean() / 255)


def moving(count, step=4, side=SIZE):
    """Frames in which a red square of 16 pixels moves to the right."""
    frames = np.full((count, side, side, 3), 255, np.uint8)
    for number in range(count):
        frames[number, 8:24, step * number : step * number + 16] = (220, 30, 30)
    return frames


def test_a_trace_says_where_how_large_and_how_much_changes():
    trace = trace_of(moving(5))
    assert np.diff(trace[:, 0]) == pytest.approx([4 / SIZE] * 4)
    assert trace[0] == pytest.approx([8 / SIZE, 16 / SIZE, 16 * 16 / SIZE**2, 0])
    assert trace[:, 1:3] == pytest.approx(np.tile(trace[0, 1:3], (5, 1)))
    assert (trace[1:, 3] > 0).all() and not trace_of(moving(3, step=0))[:, 3].any()


@given(arrays(np.uint8, (3, 6, 5, 3)))
def test_a_trace_is_finite_and_a_mirrored_one_is_mirrored(frames):
    trace, mirrored = trace_of(frames), trace_of(frames[:, :, ::-1])
    assert trace.shape == (3, 4) and (trace >= 0).all() and (trace <= 1).all()
    assert mirrored[:, 0] == pytest.approx(1 - trace[:, 0], abs=1e-6)
    assert mirrored[:, 1:] == pytest.approx(trace[:, 1:], abs=1e-6)


@given(st.lists(st.text("abc", min_size=1), min_size=1), st.integers())
def test_some_words_stay_in_their_order(words, key):
    kept, left = some_words(" ".join(words), key).split(), iter(words)
    assert kept and all(word in left for word in kept)


def test_names_of_files():
    assert points_of("1f9a0") == (0x1F9A0,)
    assert points_of("0023-FE0F-20E3") == points_of("23-20e3") == (0x23, 0x20E3)
    assert points_of("readme") is None


def test_an_animation_gives_three_rows_that_training_can_read(sample, tmp_path):
    rows = {row["codepoints"]: row for row in sample if row["style"] == "noto"}
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in/deep/1f600.webp").write_bytes(encoded(moving(12)))
    (tmp_path / "in/1f44d.webp").write_bytes(encoded(moving(9, step=2)))
    (tmp_path / "in/1f44d-1f3fb.webp").write_bytes(encoded(moving(9)))  # a skin tone
    (tmp_path / "in/1f355.webp").write_bytes(encoded(moving(1)))  # stands still
    (tmp_path / "in/package.json").write_text("{}")
    found = animated(tmp_path / "in", sample)
    assert [row["codepoints"] for row in found] == ["1F44D"] * THIRDS + ["1F600"] * THIRDS
    assert len({row["id"] for row in found}) == 2 * THIRDS
    for row in found:
        known = rows[row["codepoints"]]
        assert all(row[name] == known[name] for name in ("category", "family", "split"))
        assert set(row["text"].split()) <= set(known["text"].split(",")[0].split())
    late = found[-1]
    assert len(late["trace"]) == 4 and late["trace"][0][0] == pytest.approx((4 * 8 + 8) / SIZE, abs=0.02)
    video = VideoFormat(size=48, frames=8).read(late["video"])["video"]
    assert video.shape == (8, 3, 48, 48) and not (video[0] == video[-1]).all()
    assert SeriesFormat(channels=4, steps=24).read(late["trace"])["series_length"] == 4
    assert ink_of(pixels_of(late["image"])).any()
    write_rows(found, tmp_path / "rows.parquet")


def test_transparent_frames_lie_on_white(tmp_path):
    frames = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)), Image.new("RGBA", (32, 32), (200, 0, 0, 255))]
    frames[0].save(tmp_path / "1f600.png", save_all=True, append_images=frames[1:], duration=100)
    clear, solid = frames_of(tmp_path / "1f600.png")
    assert (clear == 255).all() and (solid == (200, 0, 0)).all()


def test_a_folder_without_animations_is_told(tmp_path, capsys):
    assert animate([str(tmp_path), str(tmp_path / "out.parquet")]) == 2
    assert "no animation" in capsys.readouterr().err and not (tmp_path / "out.parquet").exists()


def test_thirds_share_no_frame(sample):
    rows = list(thirds(moving(13, step=3), sample[0]))
    assert sum(len(row["trace"]) for row in rows) == 13


def test_spoken_names_are_written_beside_the_rows(sample, tmp_path, monkeypatch, capsys):
    waves = io.BytesIO()
    soundfile.write(waves, np.sin(np.arange(2205) / 9).astype(np.float32), 22050, format="WAV", subtype="PCM_16")
    (tmp_path / "name.wav").write_bytes(waves.getvalue())
    speaker = tmp_path / "espeak-ng"  # says the same whatever it is told
    speaker.write_text(f'#!/bin/sh\nexec cat "{tmp_path / "name.wav"}"\n', encoding="utf-8")
    speaker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(speak_emoji, "read_sample", lambda: [dict(row) for row in sample[:6]])
    out = tmp_path / "spoken.parquet"
    assert speak_emoji.main([str(out)]) == 0
    assert f"{out}: 6 rows, " in capsys.readouterr().out
    rows = pq.read_table(out).to_pylist()
    assert [row["spoken"] for row in rows] == [row["text"].split(",")[0] for row in sample[:6]]
    samples, rate = soundfile.read(io.BytesIO(rows[0]["audio"]))
    assert rate == 8000 and len(samples) == 800
