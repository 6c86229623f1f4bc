"""Tar shards in the layout of webdataset: files ``KEY.EXT``, those of one key in a row being one sample.

They are read in place: an index says where each file's bytes lie.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill.config import nearest
from distill.contracts import SPLITS, UserError
from distill.data.columns import PIECE, Cell, Piece, check_columns
from distill.data.remote import Place
from distill.data.tar_index import INDEX_FILE, JSON, LABEL, MEDIA, TEXT, Shard, open_index
from distill.formats.base import BadInput

SHOWN_FIELDS = 100  # samples whose .json says which fields there are


class TarShardSource:
    """Tar shards, by a glob (``shards/*.tar``) or a brace pattern (``shards/{000..099}.tar``), local or a URL.

    Columns: ``image`` (.jpg, .jpeg, .png, .webp), ``audio`` (.wav, .flac, .ogg, .mp3), ``video`` (.mp4, .webm, .mkv,
    .avi, .mov, .gif), ``series`` (.npy), ``text`` (.txt), ``label`` (.cls), the fields of ``.json``, ``key``, ``shard``
    and, where patterns are given a split, ``split``; otherwise a field has to say it. Other files are left out. Nothing
    is extracted to disk.
    """

    def __init__(
        self,
        path: str | None = None,
        train: str | None = None,
        valid: str | None = None,
        test: str | None = None,
        *,
        base: Path,
        folder: Path | None = None,
    ) -> None:
        """Find the shards.

        Args:
            path: pattern of the shards of all splits, relative to ``base``, in place of one a split.
            train: pattern of the training shards.
            valid: pattern of the validation shards.
            test: pattern of the test shards.
            base: folder that relative paths start from.
            folder: where the index is kept; in memory where absent.

        Raises:
            UserError: no pattern or both kinds are given, one matches nothing, or two match the same shard.
        """
        by_split = {name: pattern for name, pattern in zip(SPLITS, (train, valid, test), strict=True) if pattern}
        if bool(path) == bool(by_split):
            raise UserError("data.source: tar_shards needs either path or patterns for train, valid and test")
        patterns = {"": path} if path else by_split
        self.name = str(Place(next(iter(patterns.values())) or "", base))
        self._shards = [
            Shard(place, split) for split, pattern in patterns.items() for place in _matching(pattern or "", base)
        ]
        names = [str(shard.place) for shard in self._shards]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise UserError(f"data.source: shard {twice[0]} is matched twice; give each split shards of its own")
        self._file = None if folder is None else folder / INDEX_FILE
        self._opened: tuple[pa.Table, list[str]] | None = None

    def _index(self) -> tuple[pa.Table, list[str]]:
        """The index and the fields of .json; made when first needed."""
        if self._opened is None:
            table = open_index(self._shards, self._file)
            fields: dict[str, None] = {}
            rows = (
                row
                for batch in table.to_batches()
                for row in batch.filter(pc.field("json_offset").is_valid()).to_pylist()
            )
            for sample in islice(rows, SHOWN_FIELDS):
                fields |= dict.fromkeys(_fields(self._bytes(sample, JSON) or b"") or {})
            self._opened = table, list(fields)
        return self._opened

    @property
    def columns(self) -> list[str]:
        """Names of the columns; a field of .json gives way to a column of its name."""
        own = ["key", "shard", *MEDIA, TEXT, LABEL, *(["split"] if self._shards[0].split else [])]
        return [*own, *(name for name in self._index()[1] if name not in own)]

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._index()[0].num_rows

    def read(self, columns: Sequence[str]) -> Iterator[Piece]:
        """Yield the rows in order; UserError if there is no such column, or a field changes its type."""
        check_columns(self, columns)
        fields = [name for name in columns if name in self._index()[1]]
        for batch in self._index()[0].to_batches(max_chunksize=PIECE):
            bad = {row: why for row, why in enumerate(batch.column("bad").to_pylist()) if why}
            found: dict[str, list[Any]] = {name: [] for name in columns}
            for row, sample in enumerate(batch.to_pylist()):
                values: dict[str, Any] = {}
                if row not in bad:
                    try:
                        values = self._values(sample, columns, fields)
                    except BadInput as error:
                        bad[row] = str(error)
                for name in columns:
                    found[name].append(values.get(name))
            yield Piece(pa.table({name: self._array(name, values) for name, values in found.items()}), bad)

    def media(self, row: int, column: str) -> Cell:
        """Return a file's bytes, None where missing; BadInput where the shard is shorter than its index says."""
        if column not in MEDIA:
            raise BadInput(f"column {column!r} holds no files; {nearest(column, MEDIA)}")
        return self._content(self._index()[0], row, column)

    def where(self, row: int, column: str) -> str:
        """Return a sample's shard and key."""
        table = self._index()[0]
        return f"{self._shards[table.column('shard')[row].as_py()].place}: {table.column('key')[row].as_py()}"

    def identity(self, media: Sequence[str]) -> dict[str, str | None]:
        """Return the shards' splits, sizes and times, by position and name: folders may hold shards of one name."""
        return {
            f"{number} {shard.place.name}": " ".join(map(str, (shard.split, *shard.place.state())))
            for number, shard in enumerate(self._shards)
        }

    def _content(self, table: pa.Table, row: int, kind: str) -> bytes | None:
        names = ("shard", f"{kind}_offset", f"{kind}_size")
        return self._bytes({name: table.column(name)[row].as_py() for name in names}, kind)

    def _bytes(self, sample: dict[str, Any], kind: str) -> bytes | None:
        """The bytes of one of a sample's files; None where it has none."""
        offset, size = sample[f"{kind}_offset"], sample[f"{kind}_size"]
        if offset is None:
            return None
        shard = self._shards[sample["shard"]]
        try:
            content = shard.place.read(offset, offset + size)
        except OSError as error:
            raise UserError(f"shard {shard.place} cannot be read any more: {error.strerror}; bring it back") from error
        if len(content) != size:
            raise BadInput(f"{shard.place} ends within a file; copy the shard again")
        return content

    def _values(self, sample: dict[str, Any], columns: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
        shard = self._shards[sample["shard"]]
        values: dict[str, Any] = {"key": sample["key"], "shard": shard.place.name}
        values |= {"split": shard.split} if shard.split else {}
        for name in {TEXT, LABEL}.intersection(columns):
            values[name] = _decoded(self._bytes(sample, name), name)
        if fields and (content := self._bytes(sample, JSON)) is not None:
            found = _fields(content)
            if found is None:
                raise BadInput("its .json is not a mapping of fields, or not Unicode")
            values = {name: found.get(name) for name in fields} | values
        return values

    def _array(self, name: str, values: list[Any]) -> pa.Array:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(f"{self.name}: field {name!r} of .json has values of several types; give it one") from error


def _decoded(content: bytes | None, name: str) -> str | None:
    try:
        text = None if content is None else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"its {name} is not UTF-8") from error
    return text.strip() or None if text is not None and name == LABEL else text


def _fields(content: bytes) -> dict[str, Any] | None:
    """The fields of a .json file; None where it is something else."""
    try:
        found = json.loads(content)
        if b"\\u" in content:
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is an error here
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _matching(pattern: str, base: Path) -> list[Place]:
    """The shards of a pattern, in order of name.

    Raises:
        UserError: one of a brace pattern is missing, a range runs backwards, or a glob matches nothing.
    """
    found = []
    for name in expand_braces(pattern):
        place = Place(name, base)
        matches = place.matches() if re.search(r"[*?\[]", name) else [place] if place.is_file() else []
        if not matches:
            raise UserError(f"no shard {place}; data.source needs a glob or a brace pattern of .tar files that exist")
        found += matches
    if not found:
        raise UserError(f"{pattern!r} names no shard, as its range runs backwards; write the smaller number first")
    return found


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with ``{000..012}`` and ``{a,b}`` stands for, in order."""
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    return ["".join(chosen) for chosen in product(*map(_alternatives, pieces))]


def _alternatives(piece: str) -> list[str]:
    if not piece.startswith("{"):
        return [piece]
    bounds = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
    if not bounds:
        return piece[1:-1].split(",")
    first, last = bounds.groups()
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
