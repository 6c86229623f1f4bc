"""Build the bundled emoji sample: one Parquet file per artwork style.

The script fetches pinned npm packages with ``npm pack``, checks each tarball
against the sha512 value written below, and turns the artwork of four emoji
sets into 64x64 RGB WebP images on white.  Every row pairs one such picture
with a text (CLDR short name and other short names), two label levels (category
and subcategory), a family and a frozen train/valid/test split.

Row identity: ``id = 8 * position + style``, with ``position`` the index of the
emoji among all base emoji sorted by code points, and ``style`` 0 Noto, 1
Twemoji, 2 Fluent, 3 OpenMoji.  The same packages therefore give the same ids.

Requirements: ``npm`` on the path, and the Python packages pyarrow, pillow and
resvg-py.  Two runs with the same versions of these give identical bytes; the
committed files were made with pyarrow 26.0.1, pillow 13.0.0, resvg-py 0.5.0.

    python scripts/build_emoji_sample.py --output distill/data/samples/emoji
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

IMAGE_SIZE = 64
RENDER_SIZE = 256  # SVG artwork is drawn at this size, then scaled down
WEBP_QUALITY = 90
IDS_PER_EMOJI = 8
SPLIT_SHARES = {"train": 0.75, "valid": 0.07, "test": 0.18}


@dataclass(frozen=True)
class Package:
    """A pinned npm package under a name of our own, and its tarball's sha512."""

    name: str
    source: str
    sha512: str


@dataclass(frozen=True)
class Style(Package):
    """One artwork set: the package with its pictures, their licence and the style's number."""

    index: int
    licence: str


@dataclass(frozen=True)
class Emoji:
    """One base emoji together with everything that is not a picture."""

    position: int
    points: tuple[int, ...]
    text: str
    codepoints: str
    image_file: str
    short_name: str
    sort_order: int
    category: str
    subcategory: str


STYLES = (
    Style("noto", "emoji-datasource-google@16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==", 0, "Apache-2.0"),
    Style("twemoji", "emoji-datasource-twitter@16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==", 1, "CC-BY-4.0"),
    Style("fluent", "@iconify-json/fluent-emoji-flat@1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==", 2, "MIT"),
    Style("openmoji", "openmoji@17.0.0",
        "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==", 3, "CC-BY-SA-4.0"),
)  # fmt: skip
NAMES = Package("names", "emojibase-data@17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==")  # fmt: skip
# Sets of short names, in the order in which they may add words to the CLDR name.
SHORT_NAMES = ("iamcal", "github", "emojibase", "joypixels", "cldr")

# The package has the flag of Saudi Arabia where Noto's flag of Sark should be.
WRONG_PICTURES = {("noto", "1F1E8-1F1F6")}

LABELS = ("category", "subcategory", "family", "split")
COLUMNS = ("id", "emoji", "codepoints", "style", "image", "text", *LABELS)
TYPES = {"id": pa.int64(), "image": pa.binary()}
SCHEMA = pa.schema([(name, TYPES.get(name, pa.string())) for name in COLUMNS])

JOINER, VARIATION_SELECTOR = 0x200D, 0xFE0F
# Parts of a joined sequence that only say which sex or which direction.
VARIANT_MARKS = frozenset({JOINER, VARIATION_SELECTOR, 0x2640, 0x2642, 0x27A1})
ADULT, CHILD, ELDER, HEART = 0x1F9D1, 0x1F9D2, 0x1F9D3, 0x2764
NEUTRAL_PERSON = {
    0x1F468: ADULT, 0x1F469: ADULT,  # man, woman
    0x1F466: CHILD, 0x1F467: CHILD,  # boy, girl
    0x1F474: ELDER, 0x1F475: ELDER,  # older man, older woman
}  # fmt: skip
# Emoji with code points of their own which are variants of one another.
SAME_FAMILY = (
    ((0x1F46A,), (ADULT, CHILD)),  # family
    ((0x1F491,), (ADULT, HEART, ADULT)),  # couple with heart
    ((0x1F48F,), (ADULT, HEART, 0x1F48B, ADULT)),  # kiss
    ((0x1F46B,), (0x1F46C,), (0x1F46D,), (ADULT, 0x1F91D, ADULT)),  # holding hands
    ((0x1F934,), (0x1F478,), (0x1FAC5,)),  # prince, princess, person with crown
    ((0x1F385,), (0x1F936,), (ADULT, 0x1F384)),  # Santa, Mrs. and Mx Claus
    ((0x1F57A,), (0x1F483,)),  # man and woman dancing
    ((0x1F930,), (0x1FAC3,), (0x1FAC4,)),  # pregnant woman, man, person
    ((0x1F931,), (ADULT, 0x1F37C)),  # feeding a baby
    ((0x1F446,), (0x1F447,), (0x1F448,), (0x1F449,)),  # backhand index, four ways
    ((0x1F91B,), (0x1F91C,)),  # fist to the left, to the right
    ((0x1FAF1,), (0x1FAF2,)),  # hand to the right, to the left
    ((0x1FAF7,), (0x1FAF8,)),  # pushing hand, left and right
)
# Territories that fly the flag of another (or one that looks the same at 64 pixels).
SAME_FLAG = ("AU HM", "BV NO SJ", "CP FR MF", "DG IO", "EA ES", "ID MC", "RO TD", "UM US")
FLAG_GROUPS = [[tuple(ord(c) + 0x1F1A5 for c in code) for code in codes.split()] for codes in SAME_FLAG]
FAMILY_HEAD = {key: group[0] for group in (*SAME_FAMILY, *FLAG_GROUPS) for key in group}

Artwork = Callable[[Emoji], Image.Image | None]
Names = dict[tuple[int, ...], list[str]]  # by code points without variation selectors


def parse_points(codepoints: str) -> tuple[int, ...]:
    """Turn ``"1F3F3-FE0F"`` into ``(0x1F3F3, 0xFE0F)``."""
    return tuple(int(part, 16) for part in codepoints.split("-"))


def plain(points: Iterable[int]) -> tuple[int, ...]:
    """Drop variation selectors, whose use differs between the packages."""
    return tuple(point for point in points if point != VARIATION_SELECTOR)


def read_json(file: Path) -> Any:
    """Read a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def fetch(package: Package, downloads: Path, unpacked: Path) -> Path:
    """Download (or reuse), verify and unpack a package; return its root folder."""
    folder = downloads / package.name
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("*.tgz")):
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package.source]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (tarball,) = folder.glob("*.tgz")
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise SystemExit(f"{package.source}: the tarball's sha512 is not the pinned one")
    with tarfile.open(tarball) as archive:
        archive.extractall(unpacked / package.name, filter="data")
    return unpacked / package.name / "package"


def readable(name: str) -> str:
    """Lower-case a name and turn the hyphens and underscores inside it into spaces."""
    return " ".join(re.sub(r"(?<=\w)[-_](?=\w)", " ", name.lower()).split())


def describe(names: Iterable[str]) -> str:
    """Join the names, leaving out those that add no word."""
    phrases: list[str] = []
    seen: set[str] = set()
    for phrase in map(readable, names):
        words = set(re.findall(r"[^\s,:]+", phrase))
        if words - seen:
            phrases.append(phrase)
            seen |= words
    return ", ".join(phrases)


def load_names(root: Path) -> Names:
    """Read the names of each emoji: the CLDR short name, then the other short names."""
    names = {plain(parse_points(entry["hexcode"])): [entry["label"]] for entry in read_json(root / "en" / "data.json")}
    for preset in SHORT_NAMES:
        for codepoints, value in read_json(root / "en" / "shortcodes" / f"{preset}.json").items():
            known = names.get(plain(parse_points(codepoints)), [])  # no entry: a skin tone variant
            known.extend([value] if isinstance(value, str) else value)
    return names


def load_emoji(root: Path, names: Names) -> list[Emoji]:
    """Read the base emoji (no skin tones, no components) in code point order."""
    kept = [entry for entry in read_json(root / "emoji.json") if entry["category"] != "Component"]
    kept.sort(key=lambda entry: parse_points(entry["unified"]))
    details = itemgetter("unified", "image", "short_name", "sort_order", "category", "subcategory")
    emoji = []
    for position, entry in enumerate(kept):
        points = parse_points(entry["unified"])
        if not names.get(plain(points)):
            raise SystemExit(f"{entry['unified']}: there is no CLDR short name")
        emoji.append(Emoji(position, points, describe(names[plain(points)]), *details(entry)))
    return emoji


def family_key(points: tuple[int, ...]) -> tuple[int, ...]:
    """Reduce a sequence to what all its sex, person and direction variants share."""
    if JOINER in points:
        points = (points[0], *(point for point in points[1:] if point not in VARIANT_MARKS))
    key = tuple(NEUTRAL_PERSON.get(point, point) for point in plain(points))
    if len(key) > 1 and set(key) <= {ADULT, CHILD}:
        key = (ADULT, CHILD)
    return FAMILY_HEAD.get(key, key)


def group_families(emoji: list[Emoji]) -> dict[str, list[Emoji]]:
    """Group the emoji, naming each family by the short name of its plainest member."""
    groups: dict[tuple[int, ...], list[Emoji]] = defaultdict(list)
    for item in emoji:
        groups[family_key(item.points)].append(item)
    named = {}
    for members in groups.values():
        plainest = min(members, key=lambda item: (len(item.points), item.sort_order))
        named[readable(plainest.short_name)] = members
    if len(named) != len(groups):
        raise SystemExit("two families have the same name")
    return named


def assign_splits(families: dict[str, list[Emoji]]) -> dict[str, str]:
    """Give each family a split, per subcategory and in an order drawn by hash.

    A family goes where most room is left.  The first one of a subcategory is
    always training data, and so is one too large for the room of the others.
    What a subcategory leaves over is carried on to the next.
    """
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, members in families.items():
        labels = Counter((item.category, item.subcategory) for item in members)
        strata[min(labels, key=lambda label: (-labels[label], label))].append(name)
    result, room = {}, dict.fromkeys(SPLIT_SHARES, 0.0)
    for label in sorted(strata):
        names = sorted(strata[label], key=lambda name: hashlib.sha256(name.encode()).digest())
        total = sum(len(families[name]) for name in names)
        for split, share in SPLIT_SHARES.items():
            room[split] += share * total
        for rank, name in enumerate(names):
            size = len(families[name])
            split = max(SPLIT_SHARES, key=lambda candidate: room[candidate])
            if rank == 0 or size > 2 * room[split]:
                split = "train"
            result[name] = split
            room[split] -= size
    return result


def draw_svg(source: str) -> Image.Image:
    """Rasterise SVG source with a transparent background."""
    data = resvg_py.svg_to_bytes(svg_string=source, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data)))


def encode(picture: Image.Image) -> bytes:
    """Place a picture on white, centred in a square, and encode it as WebP."""
    picture = picture.convert("RGBA")
    side = max(picture.size)
    corner = ((side - picture.width) // 2, (side - picture.height) // 2)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, corner)
    flat = canvas.convert("RGB")
    if side != IMAGE_SIZE:
        flat = flat.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    flat.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def sheet_artwork(root: Path, vendor: str) -> Artwork:
    """Pictures of an emoji-datasource package (64 px PNG files)."""
    own = {entry["unified"] for entry in read_json(root / "emoji.json") if entry[f"has_img_{vendor}"]}

    def find(emoji: Emoji) -> Image.Image | None:
        if emoji.codepoints not in own:
            return None
        return Image.open(root / "img" / vendor / "64" / emoji.image_file)

    return find


def iconify_artwork(root: Path) -> Artwork:
    """Pictures of an Iconify icon set (SVG bodies in one JSON file)."""
    icons = read_json(root / "icons.json")
    by_points = {plain(parse_points(key)): name for key, name in read_json(root / "chars.json").items()}

    def find(emoji: Emoji) -> Image.Image | None:
        name = by_points.get(plain(emoji.points))
        icon = icons["icons"].get(name)
        if icon is None:
            return None
        width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        return draw_svg(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>')

    return find


def folder_artwork(folder: Path) -> Artwork:
    """Pictures of a folder with one SVG file per emoji, named by code points."""
    files = {plain(parse_points(file.stem)): file for file in folder.glob("[0-9A-F]*.svg")}

    def find(emoji: Emoji) -> Image.Image | None:
        file = files.get(plain(emoji.points))
        return draw_svg(file.read_text(encoding="utf-8")) if file else None

    return find


def open_artwork(style: Style, root: Path) -> Artwork:
    """Choose the reader which fits the layout of a style's package."""
    if style.name == "fluent":
        return iconify_artwork(root)
    if style.name == "openmoji":
        return folder_artwork(root / "color" / "svg")
    return sheet_artwork(root, {"noto": "google", "twemoji": "twitter"}[style.name])


def build_table(style: Style, find: Artwork, emoji: list[Emoji], groups: dict[int, tuple[str, str]]) -> pa.Table:
    """Collect the rows of one style in the order of their ids; ``groups`` has each position's family and split."""
    rows = []
    for item in emoji:
        picture = find(item)
        if picture is None or (style.name, item.codepoints) in WRONG_PICTURES:
            continue
        characters = "".join(map(chr, item.points))
        identity = (IDS_PER_EMOJI * item.position + style.index, characters, item.codepoints, style.name)
        labels = (item.category, item.subcategory, *groups[item.position])
        rows.append(dict(zip(COLUMNS, (*identity, encode(picture), item.text, *labels), strict=True)))
    metadata = {"license": style.licence, "source": style.source}
    return pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table, compressing all columns except the encoded images."""
    levels = {name: 19 for name in SCHEMA.names if name != "image"}
    codecs = {"image": "none", **dict.fromkeys(levels, "zstd")}
    options = {"use_dictionary": ["style", *LABELS], "write_statistics": ["id"]}
    pq.write_table(table, path, compression=codecs, compression_level=levels, **options)


def print_summary(tables: dict[str, pa.Table], output: Path) -> None:
    """Print rows and bytes per style, then emoji, families and classes per split."""
    sizes = {name: (output / f"{name}.parquet").stat().st_size for name in tables}
    print(f"{'style':<10}{'rows':>7}{'bytes':>11}")
    for name, table in tables.items():
        print(f"{name:<10}{table.num_rows:>7}{sizes[name]:>11}")
    rows = [row for table in tables.values() for row in table.drop(["image"]).to_pylist()]
    print(f"{'all':<10}{len(rows):>7}{sum(sizes.values()):>11}\n")
    columns = ("emoji", "family", "category", "subcategory")
    print(f"{'split':<10}{'rows':>7}" + "".join(f"{column:>13}" for column in columns))
    for split in (*SPLIT_SHARES, "all"):
        part = [row for row in rows if split in (row["split"], "all")]
        counts = [len({row[column] for row in part}) for column in columns]
        print(f"{split:<10}{len(part):>7}" + "".join(f"{count:>13}" for count in counts))


def build(output: Path, downloads: Path, unpacked: Path) -> None:
    """Fetch the packages, write all files to ``output`` and print the summary."""
    roots = {style.name: fetch(style, downloads, unpacked) for style in STYLES}
    emoji = load_emoji(roots["noto"], load_names(fetch(NAMES, downloads, unpacked)))
    families = group_families(emoji)
    splits = assign_splits(families)
    groups = {item.position: (name, splits[name]) for name, members in families.items() for item in members}
    output.mkdir(parents=True, exist_ok=True)
    tables = {}
    for style in STYLES:
        find = open_artwork(style, roots[style.name])
        tables[style.name] = build_table(style, find, emoji, groups)
        write_table(tables[style.name], output / f"{style.name}.parquet")
    print_summary(tables, output)


def main() -> None:
    """Read the command line and build the sample."""
    default = Path(__file__).resolve().parents[1] / "distill" / "data" / "samples" / "emoji"
    parser = argparse.ArgumentParser(description="Build the bundled emoji sample data set.")
    parser.add_argument("--output", type=Path, default=default, help="folder for the files")
    parser.add_argument("--downloads", type=Path, help="keep and reuse the tarballs here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        downloads = arguments.downloads or Path(scratch) / "downloads"
        build(arguments.output, downloads, Path(scratch) / "unpacked")


if __name__ == "__main__":
    main()
