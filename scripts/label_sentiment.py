"""The emoji sample's faces and hearts with a sentiment: negative, neutral or positive, as a Parquet table.

The label is that of the emoji's subcategory in Unicode's table, ``SENTIMENTS``, but for the few emoji of ``OTHERWISE``.
Subcategories that hold moods of all kinds (``MIXED``: cats that smile and cats that weep) have no label: their training
rows are kept, and the student learns from them what the teacher says; those of valid and test are left out, as all
other subcategories are.

    python scripts/label_sentiment.py sentiment.parquet
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from emoji_table import Row, read_sample, write_rows

SENTIMENTS = {
    "face-smiling": "positive",
    "face-affection": "positive",
    "face-tongue": "positive",
    "face-hat": "positive",
    "heart": "positive",
    "face-neutral-skeptical": "neutral",
    "face-sleepy": "neutral",
    "face-concerned": "negative",
    "face-negative": "negative",
    "face-unwell": "negative",
}
OTHERWISE = {
    "1F494": "negative",  # broken heart
    "1F614": "negative",  # pensive face
    "1F612": "negative",  # unamused face
}
MIXED = ("cat-face", "emotion", "face-costume", "face-glasses", "face-hand", "monkey-face")


def sentiment(row: Row) -> str | None:
    """What an emoji says; None where its subcategory does not tell."""
    return OTHERWISE.get(row["codepoints"], SENTIMENTS.get(row["subcategory"]))


def labelled(rows: Iterable[Row]) -> list[Row]:
    """The rows that are kept, with their ``sentiment``."""
    found = [{**row, "sentiment": sentiment(row)} for row in rows]
    return [row for row in found if row["sentiment"] or (row["subcategory"] in MIXED and row["split"] == "train")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="the Parquet file to write")
    out = parser.parse_args(arguments).out
    rows = labelled(read_sample())
    write_rows(rows, out)
    counts = Counter(row["sentiment"] or "no label" for row in rows)
    print(f"{out}: {len(rows)} rows, " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
