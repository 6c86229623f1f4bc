"""Where the files of tar shards lie: found once by reading the headers, kept as a memory-mapped Arrow file."""

from __future__ import annotations

import json
import logging
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill import runs
from distill.config import one_line
from distill.contracts import UserError
from distill.data.columns import PIECE
from distill.data.remote import Place

INDEX_FILE = "index.arrow"
TEXT, LABEL, JSON = "text", "label", "json"
MEDIA = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("wav", "flac", "ogg", "mp3"),
    "video": ("mp4", "webm", "mkv", "avi", "mov", "gif"),
    "series": ("npy",),
}
"""Column -> extensions of its files."""
EXTENSIONS = {extension: kind for kind, extensions in MEDIA.items() for extension in extensions}
EXTENSIONS |= {"txt": TEXT, "cls": LABEL, "json": JSON}
KINDS = (*MEDIA, TEXT, LABEL, JSON)
PLACES = [(f"{kind}_{what}", pa.int64()) for kind in KINDS for what in ("offset", "size")]
SCHEMA = pa.schema([("key", pa.string()), ("shard", pa.int32()), ("bad", pa.string()), *PLACES])
SHARDS = b"shards"  # key of the schema's metadata: name, size and time of each

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A tar file, and the split of all its samples; empty where they say it themselves."""

    place: Place
    split: str


@dataclass
class _Sample:
    key: str
    shard: int
    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # kind -> offset and size
    bad: str | None = None

    def row(self) -> dict[str, Any]:
        places = {
            f"{kind}_{what}": at[n] for kind, at in self.files.items() for n, what in enumerate(("offset", "size"))
        }
        return {"key": self.key, "shard": self.shard, "bad": self.bad, **places}


def open_index(shards: list[Shard], file: Path | None) -> pa.Table:
    """Return the index of shards, one row a sample; read it from the file, or make it.

    Args:
        shards: in order.
        file: where it is kept; None: in memory.

    Raises:
        UserError: a shard is no tar file, ends too early, or is not what it was when its index was made.
    """
    states = [[shard.place.name, *shard.place.state()] for shard in shards]
    if file is None:
        sink = pa.BufferOutputStream()
        _write(sink, shards, states)
        return pa.ipc.open_file(sink.getvalue()).read_all()
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with runs.atomic(file) as temporary, pa.OSFile(str(temporary), "wb") as sink:
            _write(sink, shards, states)
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        known = json.loads(table.schema.metadata[SHARDS])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not an index of shards ({error}); delete its folder to make it again") from error
    for shard, state, then in zip(shards, states, known, strict=False):
        if state != then:
            raise UserError(f"shard {shard.place} changed since it was indexed; run again with --force=data")
    if len(known) != len(shards):
        raise UserError(f"{file}: there were {len(known)} shards, now {len(shards)}; run again with --force=data")
    return table


def _write(sink: Any, shards: list[Shard], states: list[list[Any]]) -> None:
    schema = SCHEMA.with_metadata({SHARDS: json.dumps(states).encode()})
    with pa.ipc.new_file(sink, schema) as writer:
        rows: list[dict[str, Any]] = []
        for sample in (sample for number, shard in enumerate(shards) for sample in _samples(number, shard.place)):
            rows.append(sample.row())
            if len(rows) == PIECE:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows = []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))


def _samples(number: int, place: Place) -> Iterator[_Sample]:
    """The samples of a shard, in order; one that cannot be used has the reason."""
    sample: _Sample | None = None
    seen: set[str] = set()
    other: Counter[str] = Counter()
    for member in _members(place):
        parent, base = posixpath.split(member.name)
        name, _, extension = base.partition(".")
        kind = EXTENSIONS.get(extension.lower())
        if member.isdir() or not name or kind is None:
            other[extension] += not member.isdir()
            continue
        key = posixpath.join(parent, name).encode("utf-8", "backslashreplace").decode()  # names may be in any encoding
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = _Sample(key, number, bad=f"key {key!r} comes again in {place.name}" if key in seen else None)
            seen.add(key)
        refused = _refused(member)
        if kind in sample.files:
            refused = f"it has two files of its {kind}"
        if refused:
            sample.bad = sample.bad or refused
        else:
            sample.files[kind] = (member.offset_data, member.size)
    if sample is not None:
        yield sample
    if other:
        log.info("%s: left out files that are not known: %s", place, dict(other))


def _refused(member: tarfile.TarInfo) -> str | None:
    """Why a member's bytes are not read."""
    if member.issparse() or not member.isfile():
        return f"{member.name!r} is a link, a device or sparse; shards hold plain files"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"{member.name!r} is not a relative name"
    return None


def _members(place: Place) -> Iterator[tarfile.TarInfo]:
    """The members of a shard. The library takes a damaged header for the end, so what follows the last is looked at."""
    if place.is_dir():
        raise UserError(f"shard {place} is a folder; data.source needs .tar files")
    with place.open() as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                end = -1
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                    if tar.offset <= end:
                        raise tarfile.ReadError("a file of negative size")
                    end = tar.offset
                    yield member
                end = tar.offset
        except (tarfile.TarError, EOFError, ValueError, OSError, RecursionError) as error:
            raise UserError(
                f"shard {place} is damaged or no uncompressed tar: {one_line(error)}; copy it again"
            ) from error
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
        if rest.strip(b"\0") or 0 < len(rest) < tarfile.BLOCKSIZE:
            raise UserError(f"shard {place} is damaged at byte {end}; copy it again")
