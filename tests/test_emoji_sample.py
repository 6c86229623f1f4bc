"""The bundled emoji sample keeps its promises: size, schema, ids, splits, images, licences."""

import importlib.resources
import io
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

STYLES = ("noto", "twemoji", "fluent", "openmoji")
LICENCES = ("Apache-2.0", "CC-BY-4.0", "MIT", "CC-BY-SA-4.0")
STRINGS = ("emoji", "codepoints", "style", "text", "category", "subcategory", "family", "split")


@pytest.fixture(scope="module")
def folder():
    return Path(str(importlib.resources.files("distill.data.samples"))) / "emoji"


@pytest.fixture(scope="module")
def tables(folder):
    return {style: pq.read_table(folder / f"{style}.parquet") for style in STYLES}


@pytest.fixture(scope="module")
def rows(tables):
    return [row for table in tables.values() for row in table.drop_columns(["image"]).to_pylist()]


def test_files_are_small_and_no_others_lie_there(folder):
    files = sorted(folder.glob("*.parquet"))
    assert [file.stem for file in files] == sorted(STYLES)
    assert sum(file.stat().st_size for file in files) <= 10_000_000


def test_schema(tables):
    for style, table in tables.items():
        types = {field.name: field.type for field in table.schema}
        assert types.pop("id") == pa.int64()
        assert types.pop("image") == pa.binary()
        assert types == dict.fromkeys(STRINGS, pa.string())
        assert b"pandas" not in (table.schema.metadata or {})
        assert set(table["style"].to_pylist()) == {style}
        assert all(table[name].null_count == 0 for name in table.column_names)


def test_ids_are_unique_and_name_emoji_and_style(rows):
    assert len({row["id"] for row in rows}) == len(rows) > 7000
    by_position = defaultdict(set)
    for row in rows:
        assert row["id"] % 8 == STYLES.index(row["style"])
        by_position[row["id"] // 8].add(row["codepoints"])
    assert all(len(codepoints) == 1 for codepoints in by_position.values())
    ordered = [tuple(int(part, 16) for part in min(by_position[key]).split("-")) for key in sorted(by_position)]
    assert ordered == sorted(ordered)


def test_emoji_match_their_codepoints(rows):
    for row in rows:
        assert row["emoji"] == "".join(chr(int(part, 16)) for part in row["codepoints"].split("-"))
        assert row["text"] == row["text"].lower().strip() != ""


def test_text_is_the_cldr_short_name_and_other_short_names(rows):
    texts = {row["codepoints"]: row["text"] for row in rows}
    assert len(set(texts.values())) == len(texts)
    assert texts["1F17F-FE0F"] == "p button, parking"
    assert texts["1F44D"] == "thumbs up, +1, thumbsup, yes, thumbup"
    assert texts["1F1E8-1F1FC"] == "flag: curaçao, flag cw, curacao"
    assert texts["0023-FE0F-20E3"].startswith("keycap: #, hash")
    assert not any("_" in text for text in texts.values())


def test_no_family_and_no_emoji_is_in_two_splits(rows):
    for column in ("family", "emoji"):
        seen = defaultdict(set)
        for row in rows:
            seen[row[column]].add(row["split"])
        assert all(len(splits) == 1 for splits in seen.values())
    family_of = {row["codepoints"]: row["family"] for row in rows}
    assert family_of["1F468-200D-1F33E"] == family_of["1F469-200D-1F33E"] == family_of["1F9D1-200D-1F33E"]
    assert family_of["1F3C3"] == family_of["1F3C3-200D-2642-FE0F-200D-27A1-FE0F"]


def test_splits_have_their_share_and_all_classes_are_in_train(rows):
    emoji, classes = defaultdict(set), defaultdict(set)
    for row in rows:
        emoji[row["split"]].add(row["emoji"])
        classes[row["split"]].add((row["category"], row["subcategory"]))
    total = sum(map(len, emoji.values()))
    shares = {split: len(members) / total for split, members in emoji.items()}
    assert shares == pytest.approx({"train": 0.75, "valid": 0.07, "test": 0.18}, abs=0.015)
    assert classes["valid"] | classes["test"] <= classes["train"]
    assert len(classes["train"]) == 98
    assert len({category for category, _ in classes["train"]}) == 9
    assert "Component" not in {category for category, _ in classes["train"]}


@pytest.mark.parametrize("style", STYLES)
def test_images_decode_to_rgb_on_white(tables, style):
    bright_corners = 0
    images = tables[style]["image"].to_pylist()
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64))
            image.load()
            bright_corners += min(image.getpixel((0, 0))) > 240
    assert bright_corners > 0.9 * len(images)


def test_licence_file_names_every_style(folder, tables):
    text = (folder / "LICENSES.md").read_text(encoding="utf-8")
    for style, licence in zip(STYLES, LICENCES, strict=True):
        metadata = tables[style].schema.metadata
        assert metadata[b"license"].decode() == licence
        package, _, version = metadata[b"source"].decode().rpartition("@")
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{style}.parquet`"))
        assert f"| {licence} | `{package}` | {version} |" in line
    assert "| Unicode-3.0 | `emojibase-data` | 17.0.0 |" in text
    assert "UNICODE LICENSE V3" in text
    assert "Copyright (c) 2017-2019 Miles Johnson" in text
    assert "Copyright (c) Microsoft Corporation" in text
