"""Speed, size and memory of the teacher cache from ten thousand to a million rows of ten float16 logits, and memory
of data of as many rows.

Prints what was measured against the limits, and exits with 1 where one is missed. Speed is in rows a CPU-second, so
that other work on the machine counts little. Memory is the peak of anonymous memory (``RssAnon``) of a fresh process,
everything included, sampled from outside: of filling and reading the cache, preparing a table, an epoch of the loader
and an epoch of training. About five minutes on one core, 0.5 GB of disk under the temporary folder.

    python -m benchmarks.cache_scale [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SIZES = (10_000, 100_000, 1_000_000)
LOGITS, REPETITIONS = 10, 9
MIN_RATE, MAX_ROW_BYTES, TOLERANCE = 200_000, 25, 0.1
KEY = {"teacher": "synthetic"}
SAMPLE_SECONDS = 0.003


@dataclass(frozen=True)
class Line:
    """One measurement: what, its value with the spread of repetitions, the limit in words, and whether it is kept."""

    name: str
    value: str
    limit: str = ""
    passed: bool | None = None


def ids_of(rows: int) -> Any:
    """Ids as a split has them, int64 [rows]: increasing, with gaps where other splits' rows are."""
    ids = np.arange(rows)
    ids += ids // 4
    return ids


def fill(folder: Path, rows: int) -> None:
    """Fill a cache of synthetic logits."""
    import torch

    from distill.cache import TeacherCache
    from distill.contracts import Outputs

    def produce(ids: Any, view: int) -> Outputs:
        values = torch.from_numpy((ids[:, None] * 7 + np.arange(LOGITS)) % 97)
        return Outputs({"category": values.float() / 13}, {}, {})

    options: dict[str, Any] = {"views": [0], "key": KEY, "dtype": "float16", "batch_size": 1024}
    TeacherCache.fill(folder, rows=ids_of(rows), produce=produce, **options)


def reader(folder: Path, rows: int, batch_size: int) -> Callable[[int], None]:
    """A function that reads so many rows of a cache in random order."""
    import torch

    from distill.cache import TeacherCache

    cache, random = TeacherCache.open(folder, KEY), np.random.default_rng(0)
    views = torch.zeros(batch_size, dtype=torch.int64)
    order = torch.from_numpy(random.permutation(ids_of(rows)))

    def read(count: int) -> None:
        for start in range(0, count - batch_size + 1, batch_size):
            cache.lookup(order[start : start + batch_size], views)

    return read


def write_table(folder: Path, rows: int) -> None:
    """Write a table of captions, each row with one of its own, and the tokenizer for them."""
    import pyarrow as pa
    import pyarrow.parquet as pa_parquet
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[UNK]", *(f"w{number}" for number in range(1000))]
    tokenizer = Tokenizer(models.WordLevel({word: code for code, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    splits = {rows - 2: "valid", rows - 1: "test"}
    schema = pa.schema({"id": pa.int64(), "split": pa.string(), "text": pa.string(), "kind": pa.string()})
    with pa_parquet.ParquetWriter(folder / "table.parquet", schema) as writer:
        for start in range(0, rows, 50_000):
            part = range(start, min(start + 50_000, rows))
            texts = [" ".join(f"w{row // 1000**place % 1000}" for place in (0, 1, 0, 1, 0, 1)) for row in part]
            columns = [list(part), [splits.get(row, "train") for row in part], texts, ["ab"[row % 2] for row in part]]
            writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))


def prepare_table(folder: Path) -> None:
    """Bring the table to prepared data."""
    from distill.data.prepare import prepare
    from distill.data_config import DataConfig

    source = {"type": "table", "path": str(folder / "table.parquet")}
    columns = {"modalities": {"text": "text"}, "targets": {"kind": "kind"}, "id": "id"}
    prepare(DataConfig.model_validate({"source": source, **columns}), folder / "data", folder)


def train_loader(folder: Path) -> Any:
    """The loader of the prepared data's training rows, in batches of 1024."""
    from distill.data.loader import InputSpec, Loader
    from distill.data.prepared import PreparedData
    from distill.data_config import AugmentConfig, TextAugment

    spec = InputSpec((), folder / "tokenizer.json", 16)
    options: dict[str, Any] = {"seed": 0, "augment": AugmentConfig(text=TextAugment(word_dropout=0.1)), "shuffle": True}
    return Loader(PreparedData.open(folder / "data"), "train", {"student": spec}, batch_size=1024, **options)


def epoch(folder: Path) -> None:
    """Read one epoch of the prepared data."""
    deque(train_loader(folder).epoch(0), maxlen=0)


def train(folder: Path) -> None:
    """Train a small student of texts on the labels for an epoch."""
    from distill import engine
    from distill.config import TermConfig, TrainConfig
    from distill.fusion import ConcatFusion
    from distill.losses.objective import Objective
    from distill.multimodal import MultimodalModel, evaluating
    from distill.tapped import Tapped
    from distill.tasks import LinearHead
    from students import StaticEmbeddings

    encoder = StaticEmbeddings(tokenizer_file=folder / "tokenizer.json", vocab_size=1001, dim=32)
    heads: Any = {"kind": LinearHead(32, 2)}
    model = MultimodalModel({"text": encoder}, ConcatFusion(["text"], 32), heads, {}, dim=32, embedding_dim=32)
    loader, tapped = train_loader(folder), Tapped(model, [])
    with evaluating(model):
        example = tapped(loader.at(0, 0)["student"])
    objective = Objective([TermConfig(loss="cross_entropy", task="kind")], example, None)
    config, place = TrainConfig(epochs=1, batch_size=1024), folder / "student"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    engine.fit(
        engine.Job(tapped, objective, loader, "student", config, place, 0, lambda model: {engine.Job.select: 0.0})
    )


WORK: dict[str, Callable[[Path, int], None]] = {
    "fill": fill,
    "read": lambda folder, rows: reader(folder, rows, 1024)(rows),
    "prepare": lambda folder, rows: prepare_table(folder),
    "epoch": lambda folder, rows: epoch(folder),
    "train": lambda folder, rows: train(folder),
}


def peak_bytes(what: str, folder: Path, rows: int) -> int:
    """The most anonymous memory that a fresh process holds while it does one of ``WORK``."""
    command = [sys.executable, "-m", "benchmarks.cache_scale", "--work", what, str(folder), str(rows)]
    process, peak = subprocess.Popen(command), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        with suppress(OSError, StopIteration, ValueError):  # it may end in between
            line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
            peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"measuring {what!r} of {rows} rows failed")
    return peak


def memory(folder: Path) -> list[Line]:
    """Peak memory of the cache, the data and training at every size, which must not grow."""
    found: dict[str, list[int]] = {}
    for rows in SIZES:
        write_table(folder / f"data-{rows}", rows)
        for what in WORK:
            where = folder / f"{'cache' if what in ('fill', 'read') else 'data'}-{rows}"
            found.setdefault(what, []).append(peak_bytes(what, where, rows))
    names = {
        "fill": "filling the cache",
        "read": "reading the cache, an epoch",
        "prepare": "preparing a table of texts",
        "epoch": "an epoch of the loader, a text of its own for each row",
        "train": "an epoch of training on it",
    }
    lines = []
    for what, peaks in found.items():
        growth = max(peaks) / min(peaks) - 1
        value = f"{' / '.join(f'{peak / 1e6:.0f}' for peak in peaks)} MB ({growth:+.1%})"
        lines.append(Line(f"memory, {names[what]}", value, f"within {TOLERANCE:.0%}", growth <= TOLERANCE))
    return lines


def sizes(folder: Path) -> list[Line]:
    """Bytes a row of everything in the cache's folder, its manifest too."""
    found = [sum(path.stat().st_size for path in (folder / f"cache-{n}").iterdir()) / n for n in SIZES]
    value = " / ".join(f"{each:.2f}" for each in found)
    return [Line("bytes a row on disk", value, f"at most {MAX_ROW_BYTES}", max(found) <= MAX_ROW_BYTES)]


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU time of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def rates(folder: Path) -> list[Line]:
    """Rows a CPU-second of reading the largest cache at random."""
    lines, count = [], 200_000
    for batch_size in (128, 1024):
        read = reader(folder / f"cache-{SIZES[-1]}", SIZES[-1], batch_size)
        read(SIZES[-1])  # every shard is verified when it is first read
        found = [count / cpu_seconds(lambda read=read: read(count)) for _ in range(REPETITIONS)]
        value = f"{median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})"
        passed = median(found) >= MIN_RATE
        lines.append(Line(f"rows a CPU-second, batch {batch_size}", value, f"at least {MIN_RATE:,}", passed))
    return lines


def doubling(folder: Path) -> list[Line]:
    """CPU time of twice the rows: the median of repetitions in turns, as a machine's pace changes while it measures."""
    small, large = 200_000, 400_000
    readers = {}
    for rows in (small, large):
        fill(folder / f"twice-{rows}", rows)
        readers[rows] = reader(folder / f"twice-{rows}", rows, 1024)
        readers[rows](rows)
    work: dict[str, Callable[[int, int], None]] = {
        "filling": lambda rows, turn: fill(folder / f"twice-{rows}-{turn}", rows),
        "reading": lambda rows, turn: readers[rows](rows),
    }
    lines = []
    for what, do in work.items():
        ratios = []
        for turn in range(REPETITIONS):
            once, twice = (cpu_seconds(lambda n=rows, do=do, turn=turn: do(n, turn)) for rows in (small, large))
            ratios.append(twice / once)
        value = f"{median(ratios):.2f} times the CPU time ({min(ratios):.2f} to {max(ratios):.2f})"
        limit = 2 * (1 + TOLERANCE)
        lines.append(Line(f"{what}, twice the rows", value, f"at most {limit:.1f}", median(ratios) <= limit))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; exit with 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)  # what a watched process does
    options = parser.parse_args(arguments)
    if options.work:
        what, folder, rows = options.work
        WORK[what](Path(folder), int(rows))
        return
    with tempfile.TemporaryDirectory(prefix="cache-scale-") as name:
        lines = [line for measure in (memory, sizes, rates, doubling) for line in measure(Path(name))]
    if options.json:
        print(json.dumps([asdict(line) for line in lines], indent=2))
    else:
        print(f"rows: {' / '.join(f'{rows:,}' for rows in SIZES)}; {LOGITS} float16 logits, one view")
        for line in lines:
            verdict = "" if line.passed is None else "  passed" if line.passed else "  FAILED"
            print(f"{line.name:<62} {line.value:<40} {line.limit:<18}{verdict}")
    if any(line.passed is False for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
