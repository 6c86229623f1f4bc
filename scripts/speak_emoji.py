"""The emoji sample with a third modality: the name of each emoji, spoken by espeak-ng, as a Parquet table.

Drawings of one emoji are spoken by other voices, faster or slower, higher or lower. The program has to be installed
(Debian: ``apt install espeak-ng``; it is free software under GPL-3.0, and the table is nobody's but yours).

    python scripts/speak_emoji.py spoken_emoji.parquet
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile
import soxr
from emoji_table import read_sample, write_rows

VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb-scotland+m4")
RATE = 8000
WORDS_A_MINUTE, PITCHES = (150, 200), (35, 65)


def voice_of(row: int) -> list[str]:
    """Options of espeak-ng that follow from a row's id alone."""
    chance = hashlib.blake2b(str(row).encode(), digest_size=3).digest()
    (slow, fast), (low, high) = WORDS_A_MINUTE, PITCHES
    speed, pitch = slow + chance[1] * (fast - slow) // 255, low + chance[2] * (high - low) // 255
    return ["-v", VOICES[chance[0] % len(VOICES)], "-s", str(speed), "-p", str(pitch)]


def spoken(row: int, name: str) -> bytes:
    """A name as a FLAC file of 8 kHz."""
    command = ["espeak-ng", *voice_of(row), "--stdout", name]
    wave = subprocess.run(command, check=True, capture_output=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, soxr.resample(samples, rate, RATE), RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="the Parquet file to write")
    out = parser.parse_args(arguments).out
    if shutil.which("espeak-ng") is None:
        print("espeak-ng is not installed; Debian: apt install espeak-ng", file=sys.stderr)
        return 2
    rows = read_sample()
    for row in rows:
        row["spoken"] = row["text"].split(",")[0]  # the first of its names
    with ThreadPoolExecutor() as pool:
        sounds = list(pool.map(lambda row: spoken(row["id"], row["spoken"]), rows))
    write_rows([{**row, "audio": sound} for row, sound in zip(rows, sounds, strict=True)], out)
    print(f"{out}: {len(sounds)} rows, {sum(map(len, sounds)) / 1e6:.0f} MB of sound")
    return 0


if __name__ == "__main__":
    sys.exit(main())
