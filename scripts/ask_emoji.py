"""Questions about the emoji sample's drawings and their answers, as a Parquet table: image + question -> answer.

Each drawing is asked twice: for its category, its style or its main colour, or whether it has a given one
(subcategories too). Words, kind and answer follow from the row's id. Half of the yes-or-no questions name the truth;
the others name what is true of another drawing of the split. So a value is named about as often where "no" is right as
where "yes" is, and a question alone is a poor guide, which is measured and printed. Splits and families are the
emoji's.

    python scripts/ask_emoji.py emoji_questions.parquet
"""

from __future__ import annotations

import argparse
import colorsys
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from emoji_table import Row, chance, chosen, ink_of, pixels_of, read_sample, write_rows
from numpy.typing import NDArray

OPEN = {
    "category": ("what kind of thing is this?", "which group does it belong to?", "where would you sort this picture?"),
    "style": ("who drew this?", "which set is the drawing from?", "whose style is it?"),
    "colour": ("what colour is most of it?", "which colour does it have most of?", "what is its main colour?"),
}
CLOSED = {
    "category": ("is this one of {}?", "does it belong to {}?", "would you sort it under {}?"),
    "subcategory": ("does it show {}?", "is {} what you see?", "is this {}?"),
    "style": ("was it drawn by {}?", "is it from the set {}?", "is this the style of {}?"),
    "colour": ("is it mostly {}?", "is {} its main colour?", "is most of it {}?"),
}
KINDS = tuple((form, about) for form, words in (("open", OPEN), ("closed", CLOSED)) for about in words)
QUESTIONS = 2
"""How often a drawing is asked, about another kind of question each time."""
BINS = 8
"""Values of a channel that count as one, when a drawing's colours are counted."""
HUES = {15: "red", 42: "orange", 70: "yellow", 165: "green", 255: "blue", 295: "purple", 345: "pink"}
"""Hue in degrees -> the name of colours below it, in rising order; above the last one they are red again."""


def colour_name(red: float, green: float, blue: float) -> str:
    """The name of a colour of channels in [0, 1].

    Dark ones (value below 0.25) are black, dull ones (saturation below 0.2) grey. Others are named by ``HUES``, but red
    and orange are brown where they are dark (value below 0.65), and red is pink where it is pale (saturation below
    0.55).
    """
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if value < 0.25:
        return "black"
    if saturation < 0.2:
        return "grey"
    name = next((name for end, name in HUES.items() if 360 * hue < end), "red")
    if name in ("red", "orange") and value < 0.65:
        return "brown"
    return "pink" if name == "red" and saturation < 0.55 else name


@cache
def bin_names() -> tuple[str, ...]:
    """The name of the middle of each bin of colours, the bin of blue running fastest."""
    return tuple(colour_name(*(np.array(bin) + 0.5) / BINS) for bin in np.ndindex((BINS,) * 3))


def main_colour(pixels: NDArray[np.uint8]) -> str:
    """The colour of most pixels [H, W, 3] that are no background; "white" where there are none."""
    binned = pixels[ink_of(pixels)] // (256 // BINS)
    counts = np.bincount(np.ravel_multi_index(binned.T, (BINS,) * 3), minlength=BINS**3)
    names: Counter[str] = Counter()
    for name, count in zip(bin_names(), counts.tolist(), strict=True):
        names[name] += count
    return max(sorted(names), key=names.__getitem__) if len(binned) else "white"


def asked(row: Row, number: int, others: Sequence[Row]) -> tuple[str, str, str]:
    """The question of a number about a drawing: its kind, its words and the answer.

    Args:
        row: the drawing, with its ``colour``.
        number: 0 for its first question.
        others: drawings of the same split, whose values false questions name.
    """
    key = (row["id"], number)
    form, about = sorted(KINDS, key=lambda kind: chance(row["id"], kind))[number]
    if form == "open":
        return f"open {about}", chosen(OPEN[about], *key, "words"), row[about]
    true = chance(*key, "true") < 0.5
    named, tries = row[about], 0
    while not true and named == row[about]:
        named, tries = chosen(others, *key, tries)[about], tries + 1
    words = chosen(CLOSED[about], *key, "words").format(named.lower().replace("-", " "))
    return f"closed {about}", words, "yes" if true else "no"


def questions(rows: Iterable[Row]) -> list[Row]:
    """Two questions a drawing, in the order of the rows."""
    coloured = [{**row, "colour": main_colour(pixels_of(row["image"]))} for row in rows]
    by_split = defaultdict(list)
    for row in coloured:
        by_split[row["split"]].append(row)
    kept = ("image", "emoji", "style", "colour", "family", "split")
    found = []
    for row in coloured:
        for number in range(QUESTIONS):
            kind, words, answer = asked(row, number, by_split[row["split"]])
            own = {"id": QUESTIONS * row["id"] + number, "kind": kind, "question": words, "answer": answer}
            found.append(own | {name: row[name] for name in kept})
    return found


def blind_accuracy(rows: Sequence[Row]) -> float:
    """The share of test rows whose answer is the most frequent one of the same question in the training rows."""
    seen, overall = defaultdict(Counter), Counter()
    for row in rows:
        if row["split"] == "train":
            seen[row["question"]][row["answer"]] += 1
            overall[row["answer"]] += 1
    tested = [row for row in rows if row["split"] == "test"]
    guesses = [seen.get(row["question"], overall).most_common(1)[0][0] for row in tested]
    return sum(guess == row["answer"] for guess, row in zip(guesses, tested, strict=True)) / len(tested)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="the Parquet file to write")
    out = parser.parse_args(arguments).out
    rows = questions(read_sample())
    write_rows(rows, out)
    answers = len({row["answer"] for row in rows})
    blind = f"the question alone answers {blind_accuracy(rows):.1%} of the test rows"
    print(f"{out}: {len(rows)} questions, {answers} answers; {blind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
