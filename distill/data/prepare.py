"""From a source to prepared data: checked rows, images at working size, labels as integers, and a report.

The folder holds ``image.npy`` (uint8 [N, 3, S, S]), ``rows.parquet``, ``labels.json`` and ``data_report.json``.
Whatever a user can have wrong in the data stops here, with a sentence, before any model is built.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

from distill import runs
from distill.config import DataConfig
from distill.contracts import IGNORE, SPLITS, TRAIN, UserError
from distill.data.rows import Rows, encode_targets, read_rows
from distill.data.sources import Source, open_source
from distill.data.texts import Texts
from distill.preprocess import BadInput, decode_image

IMAGE_FILE, ROWS_FILE, LABELS_FILE, REPORT_FILE = "image.npy", "rows.parquet", "labels.json", "data_report.json"
NUM_LISTED = 1000  # bad rows listed in the report; all are counted
NUM_EXAMPLES = 10
CHUNK = 256  # images in flight, so that memory does not grow with the data
NO_TARGET, EMPTY = "no target", "every modality is missing"
WARNINGS = {
    "duplicate_images_across_splits": "images occur in more than one split, byte by byte",
    "groups_across_splits": "groups have rows in more than one split",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Prepared data, opened; row ``i`` is the same row in every attribute.

    Attributes:
        folder: where it lies.
        ids: int64 [N], unique.
        split: str [N], train / valid / test.
        groups: int64 [N], dense codes; rows of one group stay together in bootstrap intervals.
        texts: N strings, empty where absent.
        images: uint8 [N, 3, S, S], memory-mapped; zeros where absent; None without an image modality.
        present: modality -> bool [N].
        targets: task -> int64 [N], IGNORE where missing.
        labels: task -> class names, in order of label.
    """

    folder: Path
    ids: NDArray[np.int64]
    split: NDArray[np.str_]
    groups: NDArray[np.int64]
    texts: Texts | list[str]
    images: NDArray[np.uint8] | None
    present: dict[str, NDArray[np.bool_]]
    targets: dict[str, NDArray[np.int64]]
    labels: dict[str, list[str]]

    @classmethod
    def open(cls, folder: str | Path) -> PreparedData:
        """Open a folder that :func:`prepare` wrote."""
        folder = Path(folder)
        table = pa_parquet.read_table(folder / ROWS_FILE)
        columns = {name: table.column(name) for name in table.column_names}
        image_file = folder / IMAGE_FILE
        return cls(
            folder=folder,
            ids=columns["id"].to_numpy(),
            split=_fixed_width(columns["split"]),
            groups=columns["group"].to_numpy(),
            texts=Texts(columns["text"]),
            images=runs.read_array(image_file, mmap_mode="r") if image_file.is_file() else None,
            present=_with_prefix(columns, "present."),
            targets=_with_prefix(columns, "target."),
            labels=runs.read_json(folder / LABELS_FILE),
        )

    def __len__(self) -> int:
        """Return the number of rows of all splits."""
        return len(self.ids)

    def rows(self, split: str) -> NDArray[np.int64]:
        """Return the positions of a split's rows, in order of id."""
        positions = np.flatnonzero(self.split == split)
        return positions[np.argsort(self.ids[positions], kind="stable")]


def _fixed_width(column: pa.ChunkedArray) -> NDArray[np.str_]:
    """Return a column of few distinct strings as an array, without a Python string a row."""
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    return np.array(encoded.dictionary.to_pylist(), dtype=np.str_)[encoded.indices.to_numpy()]


def _with_prefix(columns: dict[str, pa.ChunkedArray], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): c.to_numpy() for name, c in columns.items() if name.startswith(prefix)}


def source_fingerprint(config: DataConfig, base: Path) -> str:
    """Return a hash of the bytes of every file that the rows come from (tables and images), by relative name.

    Raises:
        UserError: the source cannot be opened.
    """
    files = open_source(config.source, base).files(config.modalities.get("image"))
    hashes = {name: runs.sha256_file(path) if path.is_file() else None for name, path in files.items()}
    return runs.fingerprint(hashes)


def prepare(
    config: DataConfig, folder: Path, base: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Read, check and write the data of a recipe.

    A row is bad, and left out, if its image cannot be decoded, if it has no target of any task, or if all its
    modalities are missing. A row that lacks some targets or some modalities is kept.

    Args:
        config: the recipe's ``data``.
        folder: where the files are written; made if absent.
        base: folder that relative paths of the recipe start from.
        progress: called with (images done, images in all) while images are decoded.

    Returns:
        Row counts a split, number of classes a task, and how many rows were bad or suspicious.

    Raises:
        UserError: a column is missing or of a wrong type, an id is used twice, a split is unknown or empty, a
            class was never seen in training, or more than ``max_bad_fraction`` of the rows cannot be used.
    """
    source = open_source(config.source, base)
    rows = read_rows(config, source)
    encode_targets(rows)  # its complaints should not wait until all images are decoded
    folder.mkdir(parents=True, exist_ok=True)
    bad = {row: NO_TARGET for row, given in enumerate(zip(*rows.targets.values(), strict=True)) if set(given) == {None}}
    digests: list[bytes | None] = [None] * len(rows.ids)
    if "image" in config.modalities:
        runs.check_disk(folder, len(rows.ids) * 3 * config.working_size**2)
        digests = _write_images(config, source, rows.present.get("text"), bad, folder / IMAGE_FILE, progress)
        rows.present["image"] = np.array([digest is not None for digest in digests], dtype=bool)
    else:
        bad |= {row: EMPTY for row in np.flatnonzero(~rows.present["text"]).tolist() if row not in bad}
    report: dict[str, Any] = {"source": Path(source.name).name, "bad_rows": _describe_bad(config, source, rows, bad)}
    runs.write_json(folder / REPORT_FILE, report)
    _check_bad(config, source, report["bad_rows"], folder / REPORT_FILE)
    kept = np.array([row for row in range(len(rows.ids)) if row not in bad], dtype=np.int64)
    rows = rows.take(kept)
    targets, labels = encode_targets(rows)
    groups = _dense_codes(rows.groups)
    _write_rows(folder / ROWS_FILE, rows, groups, targets)
    runs.write_json(folder / LABELS_FILE, labels)
    report |= _describe(rows, targets, labels)
    report["duplicate_images_across_splits"] = _across_splits(rows, [digests[row] for row in kept])
    report["groups_across_splits"] = _across_splits(rows, rows.groups)
    runs.write_json(folder / REPORT_FILE, report)
    return _summarize(report)


def _write_images(
    config: DataConfig,
    source: Source,
    has_other: NDArray[np.bool_] | None,
    bad: dict[int, str],
    path: Path,
    progress: Callable[[int, int], None] | None,
) -> list[bytes | None]:
    """Write the images of usable rows and add to ``bad``; return a hash of each image file, None where absent."""
    size, total = config.working_size, len(source)
    usable = [row for row in range(total) if row not in bad]
    digests: list[bytes | None] = [None] * total
    blank = np.zeros((3, size, size), dtype=np.uint8)
    with runs.atomic(path) as temporary, open(temporary, "wb") as file:
        header_bytes = _write_header(file, total, size)
        for done, (row, image) in enumerate(_decoded(source, config.modalities["image"], size, usable), start=1):
            if isinstance(image, str):
                bad[row] = image
            elif image is None and (has_other is None or not has_other[row]):
                bad[row] = EMPTY
            else:
                pixels, digests[row] = image or (blank, None)
                file.write(pixels.tobytes())
            if progress and (done % CHUNK == 0 or done == len(usable)):
                progress(done, len(usable))
        file.seek(0)
        assert _write_header(file, total - len(bad), size) == header_bytes
    return digests


def _write_header(file: BinaryIO, num_rows: int, size: int) -> int:
    """Write a ``.npy`` header; numpy leaves room in it for the first dimension, so its length is constant."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_rows, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _decoded(
    source: Source, column: str, size: int, rows: list[int]
) -> Iterator[tuple[int, tuple[NDArray[np.uint8], bytes] | str | None]]:
    """Yield (row, its pixels and the hash of its file | the reason why it is bad | None if absent), in order."""

    def read(row: int) -> bytes | Path | BadInput | None:
        try:
            return source.image(row, column)
        except BadInput as error:
            return error

    def decode(value: bytes | Path | BadInput | None) -> tuple[NDArray[np.uint8], bytes] | str | None:
        if value is None or isinstance(value, BadInput):
            return None if value is None else str(value)
        try:
            content = value.read_bytes() if isinstance(value, Path) else value
            return decode_image(content, size), hashlib.blake2b(content, digest_size=16).digest()
        except BadInput as error:
            return str(error)
        except OSError as error:
            return f"the file cannot be read: {error.strerror}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            yield from zip(chunk, pool.map(decode, [read(row) for row in chunk]), strict=True)


def _describe_bad(config: DataConfig, source: Source, rows: Rows, bad: dict[int, str]) -> dict[str, Any]:
    column = config.modalities.get("image")

    def where(row: int) -> str:
        if column is None or bad[row] in (NO_TARGET, EMPTY):
            return f"row {row}"
        try:
            value = source.image(row, column)
        except BadInput:
            value = None
        return str(value) if isinstance(value, Path) else f"column {column!r}, row {row}"

    listed = [{"id": rows.ids[row], "where": where(row), "reason": bad[row]} for row in sorted(bad)[:NUM_LISTED]]
    return {"count": len(bad), "of": len(rows.ids), "max_fraction": config.max_bad_fraction, "rows": listed}


def _check_bad(config: DataConfig, source: Source, bad: dict[str, Any], report_file: Path) -> None:
    if bad["count"] <= config.max_bad_fraction * bad["of"]:
        return
    first = bad["rows"][0]
    raise UserError(
        f"{source.name}: {bad['count']} of {bad['of']} rows cannot be used, more than data.max_bad_fraction "
        f"{config.max_bad_fraction:g} allows; the first is id {first['id']} ({first['where']}): {first['reason']}; "
        f"all are listed in {report_file}: mend them or raise the limit"
    )


def _dense_codes(values: list[Any]) -> NDArray[np.int64]:
    """Number the distinct values in order of first appearance; each None is a group of its own."""
    codes: dict[Any, int] = {}
    keys = [(row, None) if value is None else value for row, value in enumerate(values)]
    return np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.int64)


def _write_rows(path: Path, rows: Rows, groups: NDArray[np.int64], targets: dict[str, NDArray[np.int64]]) -> None:
    columns: dict[str, Any] = {
        "id": np.array(rows.ids, dtype=np.int64),
        "split": pa.array(rows.split, pa.string()),
        "group": groups,
        "text": pa.array(rows.texts, pa.string()),
    }
    columns |= {f"present.{modality}": values for modality, values in rows.present.items()}
    columns |= {f"target.{task}": values for task, values in targets.items()}
    with runs.atomic(path) as temporary:
        pa_parquet.write_table(pa.table(columns), temporary)


def _describe(rows: Rows, targets: dict[str, NDArray[np.int64]], labels: dict[str, list[str]]) -> dict[str, Any]:
    split = np.array(rows.split)
    return {
        "rows": {name: int((split == name).sum()) for name in SPLITS},
        "present": {
            modality: {name: int(values[split == name].sum()) for name in SPLITS}
            for modality, values in rows.present.items()
        },
        "missing_targets": {task: int((values == IGNORE).sum()) for task, values in targets.items()},
        "classes": {
            task: {
                name: {label: int((values[split == name] == code).sum()) for code, label in enumerate(labels[task])}
                for name in SPLITS
            }
            for task, values in targets.items()
        },
    }


def _across_splits(rows: Rows, keys: Sequence[Any]) -> dict[str, Any]:
    """Count the keys (not None) that occur in more than one split, with the first row of each as examples."""
    seen: dict[Any, dict[str, int]] = defaultdict(dict)
    for row, key in enumerate(keys):
        if key is not None:
            seen[key].setdefault(rows.split[row], rows.ids[row])
    shared = [first_ids for first_ids in seen.values() if len(first_ids) > 1]
    return {"count": len(shared), "examples": shared[:NUM_EXAMPLES]}


def _summarize(report: dict[str, Any]) -> dict[str, Any]:
    counts = {name: report[name]["count"] for name in ("bad_rows", *WARNINGS)}
    for name, meaning in WARNINGS.items():
        if counts[name]:
            log.warning("%d %s; examples are in %s", counts[name], meaning, REPORT_FILE)
    num_classes = {task: len(splits[TRAIN]) for task, splits in report["classes"].items()}
    return {"rows": report["rows"], "num_classes": num_classes, "modalities": sorted(report["present"]), **counts}
