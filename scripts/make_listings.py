"""Listings as a market would have them, one in ten of them false, as a Parquet table: a record check with a rare class.

A listing is a drawing of the emoji sample (image), one of the emoji's names (text), and a record: the number of code
points and of words, the drawing's share of ink, the mean red, green and blue of the ink, the vendor that drew it and
the category that is claimed. There are two listings of each drawing. In one of ten listings the drawing, the name or
the claimed category is that of an emoji of another category, from the same split (a drawing by the same vendor, so
that neither gives it away); numbers describe what is shown. ``verdict`` is "honest" or "fraud", and ``swapped`` says
what was exchanged. What is exchanged follows from the row's id alone. Splits and families are the drawing's row's own.

    python scripts/make_listings.py listings.parquet
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from emoji_table import Row, chance, chosen, ink_of, pixels_of, read_sample, write_rows

LISTINGS = 2
FRAUDS = 0.1
PARTS = ("drawing", "name", "category")


def measured(image: bytes) -> dict[str, float]:
    """A drawing's share of ink and the mean of its channels there, all in [0, 1]; of a blank one, of its background."""
    pixels = pixels_of(image)
    ink = ink_of(pixels)
    red, green, blue = (pixels[ink] if ink.any() else pixels.reshape(-1, 3)).mean(0) / 255
    return {"ink": float(ink.mean()), "red": float(red), "green": float(green), "blue": float(blue)}


def listing(row: Row, number: int, others: Sequence[Row]) -> Row:
    """A listing of a drawing.

    Args:
        row: the drawing's row of the sample.
        number: of the listing.
        others: rows of the same split and vendor, of which at least one has another category.
    """
    key = (row["id"], number)
    swapped = chosen(PARTS, *key, "part") if chance(*key, "fraud") < FRAUDS else ""
    other, tries = row, 0
    while swapped and other["category"] == row["category"]:
        other, tries = chosen(others, *key, tries), tries + 1
    shown, named, claimed = (other if swapped == part else row for part in PARTS)
    name = chosen(named["text"].split(", "), *key, "name")
    return {
        "id": LISTINGS * row["id"] + number,
        "image": shown["image"],
        "name": name,
        "code_points": len(row["emoji"]),
        "words": len(name.split()),
        **measured(shown["image"]),
        "vendor": row["style"],
        "claimed": claimed["category"],
        "verdict": "fraud" if swapped else "honest",
        "swapped": swapped,
        **{column: row[column] for column in ("emoji", "category", "family", "split")},
    }


def listings(rows: Iterable[Row]) -> list[Row]:
    """Two listings a drawing, in the order of the rows."""
    rows, near = list(rows), defaultdict(list)
    for row in rows:
        near[row["split"], row["style"]].append(row)
    return [listing(row, number, near[row["split"], row["style"]]) for row in rows for number in range(LISTINGS)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="the Parquet file to write")
    out = parser.parse_args(arguments).out
    rows = listings(read_sample())
    write_rows(rows, out)
    counts = Counter(row["swapped"] or "nothing" for row in rows)
    print(f"{out}: {len(rows)} listings; swapped: " + ", ".join(f"{n} {part}" for part, n in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
