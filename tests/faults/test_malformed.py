"""105 bad image files among 1,000: listed with path and reason, in little memory, and too many stop the run."""

from __future__ import annotations

import csv
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fork_server import ForkServer
from PIL import Image
from tiny_project import RECIPE

from distill.runs import read_json

pytestmark = [pytest.mark.fault, pytest.mark.slow]

TOTAL, EACH = 1000, 20
MOST_BYTES = 500_000_000
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
MAGIC = (b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"PK\x03\x04", b"\x1f\x8b\x08\x00", b"\x7fELF", b"\x80\x04\x95")
TEXTS = ("<html><body>404 Not Found</body></html>", "id,image\n1,a.png\n", '{"error": "gone"}', "<svg/>", "a red cat")


def picture(chance: random.Random, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def decodes(content: bytes) -> bool:
    """Whether Pillow alone reads it: damage that it does not see is not malformed."""
    try:
        Image.open(io.BytesIO(content)).load()
    except Exception:  # damaged files make its parsers raise nearly any type
        return False
    return True


def truncated(number: int, chance: random.Random) -> bytes:
    while True:
        whole = picture(chance, FORMATS[number % len(FORMATS)])
        content = whole[: int(len(whole) * chance.uniform(0.02, 0.7))]
        if not decodes(content):
            return content


def flipped_header(number: int, chance: random.Random) -> bytes:
    while True:
        content = bytearray(picture(chance, FORMATS[number % len(FORMATS)]))
        content[chance.randrange(30)] ^= 1 << chance.randrange(8)
        if not decodes(bytes(content)):
            return bytes(content)


def wrong_magic(number: int, chance: random.Random) -> bytes:
    return MAGIC[number % len(MAGIC)] + picture(chance)[8:]


def zeros(number: int, chance: random.Random) -> bytes:
    return bytes([0, 1, 8, 100, 4096][number % 5])


def text(number: int, chance: random.Random) -> bytes:
    return TEXTS[number % len(TEXTS)].encode(("utf-8", "utf-16")[number % 2]) * (number + 1)


MAKERS: tuple[Callable[[int, random.Random], bytes], ...] = (truncated, flipped_header, wrong_magic, zeros, text)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(16 * 49)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    content = picture(random.Random(0), "JPEG")
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", 65_000, 65_000) + content[place + 4 :]


def bombs() -> list[bytes]:
    """Files under a megabyte that ask for gigabytes: four by their size in pixels, one by a compressed comment."""
    bmp = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0)
    gif = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6)
    gif += b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x44\x01\x00;"
    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(600_000_000), 9))
    return [png(60_000, 60_000), huge_jpeg(), bmp, gif, png(16, 16, comment)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """1,000 rows, 105 of them bad, and name of each bad file -> its kind."""
    folder, chance = tmp_path_factory.mktemp("images"), random.Random(0)
    contents = [(maker.__name__, maker(number, chance)) for maker in MAKERS for number in range(EACH)]
    contents += [("bomb", content) for content in bombs()]
    assert all(len(content) < 1_000_000 for _, content in contents) and len(contents) == 105
    contents += [("good", picture(chance)) for _ in range(TOTAL - len(contents))]
    chance.shuffle(contents)
    kinds = {}
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "colour", "split"])
        for row, (kind, content) in enumerate(contents):
            (folder / f"{row:04d}.png").write_bytes(content)
            kinds[f"{row:04d}.png"] = kind
            split = {0: "valid", 1: "test"}.get(row % 10, "train")
            table.writerow([row, f"{row:04d}.png", ("red", "blue")[row // 10 % 2], split])
    return folder, {name: kind for name, kind in kinds.items() if kind != "good"}


CONFIG: dict[str, Any] = {
    "source": {"type": "table", "path": "rows.csv"},
    "modalities": {"image": "image"},
    "targets": {"colour": "colour"},
    "id": "id",
    "working_size": 32,
    "max_bad_fraction": 0.2,
}


def test_all_bad_images_are_listed_and_memory_stays_small(
    server: ForkServer, project: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, kinds = project
    arguments = {"config": CONFIG, "folder": str(tmp_path / "data"), "base": str(folder)}
    child = server.start("prepare_data", tmp_path / "out.txt", cwd=tmp_path, **arguments)
    assert child.wait() == 0, child.text()
    found = json.loads(child.text().splitlines()[-1])
    assert found["bad_rows"] == 105 and sum(found["rows"].values()) == TOTAL - 105
    report = read_json(tmp_path / "data/data_report.json")["bad_rows"]
    assert (report["count"], report["of"]) == (105, TOTAL)
    assert {Path(row["where"]).name for row in report["rows"]} == kinds.keys()
    assert all(row["reason"] and Path(row["where"]).parent == folder for row in report["rows"])
    reasons = {kinds[Path(row["where"]).name]: row["reason"] for row in report["rows"]}
    print(f"peak memory rose by {found['peak_rise_bytes'] / 1e6:.0f} MB; a reason of each kind: {reasons}")
    assert found["peak_rise_bytes"] < MOST_BYTES


def test_more_bad_images_than_allowed_stop_the_run_with_one_sentence(
    server: ForkServer, project: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = project
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("colour: colour, shape: shape", "colour: colour"))
    text = recipe.read_text().replace("image: image, text: caption", "image: image").replace("  group: family\n", "")
    recipe.write_text(text)
    arguments = ["cache", "recipe.yaml", f"output={tmp_path}"]
    arguments += ["teacher.encoders={image: {type: convnet, widths: [8, 16], blocks: [0, 1]}}"]
    arguments += ["student.encoders={image: {type: convnet, widths: [8, 8], blocks: [0, 1]}}", "student.inherit={}"]
    terms = "[{loss: cross_entropy, task: colour}]"
    arguments += [f"{part}={terms}" for part in ("teacher.objective", "student.baseline", "student.objective")]
    child = server.start("distill", tmp_path / "out.txt", cwd=folder, arguments=arguments)
    assert child.wait() == 2, child.text()
    errors = [line for line in child.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in child.text()
    assert "105 of 1000 rows cannot be used, more than data.max_bad_fraction 0.01 allows" in errors[0]
