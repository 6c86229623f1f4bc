"""From a source to prepared data: checked rows, images at working size, labels as integers, and a report.

Whatever a user can have wrong in the data stops here, with a sentence, before any model is built. Rows come a piece at
a time and go to disk, so that memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distill import runs
from distill.config import DataConfig
from distill.contracts import IGNORE, SPLITS, TRAIN, UserError
from distill.data.columns import Source
from distill.data.labelled import keep_labels
from distill.data.prepared import (
    IMAGE_FILE,
    LABELS_FILE,
    PRESENT,
    ROWS_FILE,
    TARGET,
    TEXT_FILE,
    PreparedData,
    any_label,
    record_type,
)
from distill.data.rows import EMPTY, NO_TARGET, Keys, Rows, number_classes, read_rows, row_keys, texts_of
from distill.data.scratch import chunks, dense_codes, first_rows, positions_where, scratch, take
from distill.data.sources import open_source
from distill.data.texts import TextWriter
from distill.preprocess import BadInput, decode_image

REPORT_FILE = "data_report.json"
NUM_EXAMPLES = 10
CHUNK = 256  # images in flight, so that memory does not grow with the data
WARNINGS = {
    "duplicate_images_across_splits": "images occur in more than one split, byte by byte",
    "groups_across_splits": "groups have rows in more than one split",
}

log = logging.getLogger(__name__)


def source_fingerprint(config: DataConfig, base: Path) -> str:
    """Return a hash of what the rows come from: of the bytes of tables and images, of the state of larger stores.

    Raises:
        UserError: the source cannot be opened.
    """
    return runs.fingerprint(open_source(config.source, base).identity(config.modalities.get("image")))


def prepare(
    config: DataConfig, folder: Path, base: Path, progress: Callable[[int, int], None] | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Read, check and write the data of a recipe.

    A row is bad, and left out, if the source cannot read it, if its image cannot be decoded, if all its modalities are
    missing, or if it is one of valid or test and has no target of any task. A row that lacks some targets or some
    modalities is kept, and so is a training row without any target.

    Args:
        config: the recipe's ``data``.
        folder: where the files are written; made if absent.
        base: folder that relative paths of the recipe start from.
        progress: called with (images done, images in all) while images are decoded.
        seed: of the choice of the rows that keep their labels, where the recipe hides some.

    Returns:
        Row counts a split, of all rows and of those with a label; how many labels were hidden; number of classes a
        task, and how many rows were bad or suspicious.

    Raises:
        UserError: a column is missing or of a wrong type, an id is used twice, a split is unknown or empty, a class
            was never seen in training, more than ``max_bad_fraction`` of the rows cannot be used, or ``labelled``
            leaves too few labels.
    """
    source = open_source(config.source, base, folder)
    disk = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    rows = read_rows(config, source, disk)
    number_classes(rows)  # complaints should not wait until all images are decoded
    keep_labels(rows, config.labelled, seed)
    folder.mkdir(parents=True, exist_ok=True)
    digests = None
    if "image" in config.modalities:
        if config.decode_once:
            runs.check_disk(folder, len(source) * 3 * config.working_size**2)
        digests = _check_images(config, source, rows, folder / IMAGE_FILE, progress)
    report: dict[str, Any] = {"source": Path(source.name).name, "bad_rows": _describe_bad(config, source, rows)}
    runs.write_json(folder / REPORT_FILE, report)
    _check_bad(config, source, report["bad_rows"], folder / REPORT_FILE)
    classes, labels = number_classes(rows)
    kept = positions_where(rows.bad.flags, disk, flag=False)
    groups = None if rows.groups is None else take(rows.groups, kept, disk)
    numbers = _write_texts(folder / TEXT_FILE, config, source, kept, take(rows.texts, kept, disk), disk)
    labelled = keep_labels(rows, config.labelled, seed)
    images = None if digests is None else take(digests, kept, disk)
    hidden = _write_rows(folder / ROWS_FILE, rows, kept, numbers, (groups, images), classes, labelled)
    runs.write_json(folder / LABELS_FILE, labels)
    data = PreparedData.open(folder)
    report |= {**_describe(data), "hidden_labels": hidden}
    report["duplicate_images_across_splits"] = _across_splits(data, images)
    report["groups_across_splits"] = _across_splits(data, groups)
    runs.write_json(folder / REPORT_FILE, report)
    return _summarize(report)


def _check_images(
    config: DataConfig, source: Source, rows: Rows, path: Path, progress: Callable[[int, int], None] | None
) -> Keys:
    """Decode the images of usable rows, mark those that are present or bad, and write them if the recipe says so.

    Returns:
        A hash of each image file, [N, 2]; of absent ones, of their row.
    """
    path.unlink(missing_ok=True)
    size, total = config.working_size, len(source)
    others = [values for modality, values in rows.present.items() if modality != "image"]
    digests = scratch(rows.folder, (total, 2), np.uint64)
    usable = (row for part in chunks(total) for row in (part.start + np.flatnonzero(~rows.bad.flags[part])).tolist())
    to_do = total - rows.bad.count()
    with _image_file(path, total, size) if config.decode_once else nullcontext(_unwritten) as write:
        for done, (row, image) in enumerate(_decoded(source, config, usable), start=1):
            if isinstance(image, str):
                rows.bad.add(row, image)
            elif image is None and not any(values[row] for values in others):
                rows.bad.add(row, EMPTY)
            else:
                pixels, digests[row] = image or (np.zeros((3, size, size), np.uint8), row_keys([row])[0])
                rows.present["image"][row] = image is not None
                write(pixels)
            if progress and (done % CHUNK == 0 or done == to_do):
                progress(done, to_do)
    return digests


def _unwritten(pixels: NDArray[np.uint8]) -> None:
    """Keep nothing of an image that will be decoded again when it is read."""


@contextmanager
def _image_file(path: Path, most: int, size: int) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """A function that appends an image to a ``.npy`` file, which will hold ``most`` of them or fewer."""
    written = 0

    def write(pixels: NDArray[np.uint8]) -> None:
        nonlocal written
        file.write(pixels.tobytes())
        written += 1

    with runs.atomic(path) as temporary, open(temporary, "wb") as file:
        header_bytes = _write_header(file, most, size)
        yield write
        file.seek(0)
        assert _write_header(file, written, size) == header_bytes


def _write_header(file: BinaryIO, num_rows: int, size: int) -> int:
    """Write a ``.npy`` header; numpy leaves room in it for the first dimension, so its length is constant."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_rows, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _decoded(
    source: Source, config: DataConfig, rows: Iterator[int]
) -> Iterator[tuple[int, tuple[NDArray[np.uint8], Keys] | str | None]]:
    """Yield (row, its pixels and the hash of its file | the reason why it is bad | None if absent), in order."""
    column, size, crop = config.modalities["image"], config.working_size, config.image_fit == "crop"

    def read(row: int) -> bytes | Path | BadInput | None:
        try:
            return source.image(row, column)
        except BadInput as error:
            return error

    def decode(value: bytes | Path | BadInput | None) -> tuple[NDArray[np.uint8], Keys] | str | None:
        if value is None or isinstance(value, BadInput):
            return None if value is None else str(value)
        try:
            if isinstance(value, Path) and value.exists() and not value.is_file():
                return "it is a folder, a device or a pipe; images are plain files"  # which may have no end
            content = value.read_bytes() if isinstance(value, Path) else value
            digest = hashlib.blake2b(content, digest_size=16).digest()
            return decode_image(content, size, crop=crop), np.frombuffer(digest, "<u8")
        except BadInput as error:
            return str(error)
        except OSError as error:
            return f"the file cannot be read: {error.strerror}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(rows, CHUNK)):
            yield from zip(chunk, pool.map(decode, [read(row) for row in chunk]), strict=True)


def _describe_bad(config: DataConfig, source: Source, rows: Rows) -> dict[str, Any]:
    column = config.modalities.get("image")

    def where(row: int, reason: str) -> str:
        return f"row {row}" if column is None or reason in (NO_TARGET, EMPTY) else source.where(row, column)

    listed = [
        {"id": int(rows.ids[row]), "where": where(row, reason), "reason": reason} for row, reason in rows.bad.listed
    ]
    return {
        "count": rows.bad.count(),
        "of": len(rows.ids),
        "max_fraction": config.max_bad_fraction,
        "rows": listed,
    }


def _check_bad(config: DataConfig, source: Source, bad: dict[str, Any], report_file: Path) -> None:
    if bad["count"] <= config.max_bad_fraction * bad["of"]:
        return
    first = bad["rows"][0]
    listed = "all are" if len(bad["rows"]) == bad["count"] else f"the first {len(bad['rows'])} are"
    raise UserError(
        f"{source.name}: {bad['count']} of {bad['of']} rows cannot be used, more than data.max_bad_fraction "
        f"{config.max_bad_fraction:g} allows; the first is id {first['id']} ({first['where']}): {first['reason']}; "
        f"{listed} listed in {report_file}: mend them or raise the limit"
    )


def _write_texts(
    path: Path, config: DataConfig, source: Source, kept: NDArray[np.int64], keys: Keys, disk: Path
) -> NDArray[np.int64]:
    """Write the distinct texts of the kept rows and return the number of each row's, int64 [kept]."""
    numbers, _ = dense_codes(keys, disk)
    with runs.atomic(path) as temporary, TextWriter(temporary) as writer:
        for start, texts in texts_of(config, source):
            first, last = np.searchsorted(kept, [start, start + len(texts)])
            for row, number in zip(kept[first:last].tolist(), numbers[first:last].tolist(), strict=True):
                if number == writer.count:  # numbers are in order of first appearance
                    writer.add(texts[row - start])
    return numbers


def _write_rows(
    path: Path,
    rows: Rows,
    kept: NDArray[np.int64],
    texts: NDArray[np.int64],
    keys: tuple[Keys | None, Keys | None],
    classes: dict[str, NDArray[np.int64]],
    labelled: NDArray[np.bool_],
) -> int:
    """Write a record for each of the kept rows; return how many training rows have labels that are not written.

    ``keys`` are those of groups and of images; rows without are all different.
    """
    kind = record_type(rows.present, rows.labels)
    codes = [None if found is None else dense_codes(found, rows.folder)[0] for found in keys]
    hidden = 0
    with runs.room_for(path, len(kept) * kind.itemsize), runs.atomic(path) as temporary, open(temporary, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (len(kept),)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in chunks(len(kept)):
            at = kept[part]
            records = np.zeros(len(at), kind)
            records["id"], records["source_row"], records["text"] = rows.ids[at], at, texts[part]
            records["split"] = np.array(SPLITS)[rows.split[at]]
            for name, own in zip(("group", "image"), codes, strict=True):
                records[name] = np.arange(part.start, part.stop) if own is None else own[part]
            for modality, values in rows.present.items():
                records[PRESENT + modality] = values[at]
            for task, labels in rows.labels.items():
                records[TARGET + task] = classes[task][labels.codes[at]]  # MISSING is -1: the last entry
            hide = (rows.split[at] == SPLITS.index(TRAIN)) & ~labelled[at]
            hidden += int((hide & any_label((records[TARGET + task] for task in rows.labels), len(at))).sum())
            for task in rows.labels:
                records[TARGET + task][hide] = IGNORE
            file.write(records.tobytes())
    return hidden


def _describe(data: PreparedData) -> dict[str, Any]:
    rows, labelled = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    present = {modality: dict.fromkeys(SPLITS, 0) for modality in data.present}
    counts = {(task, split): np.zeros(len(names), np.int64) for task, names in data.labels.items() for split in SPLITS}
    missing = dict.fromkeys(data.targets, 0)
    for part in chunks(len(data)):
        for split in SPLITS:
            here = data.split[part] == split
            count = int(here.sum())
            rows[split] += count
            labelled[split] += int(any_label((values[part][here] for values in data.targets.values()), count).sum())
            for modality, there in data.present.items():
                present[modality][split] += int(there[part][here].sum())
            for task, values in data.targets.items():
                given = values[part][here]
                missing[task] += int((given == IGNORE).sum())
                counts[task, split] += np.bincount(given[given != IGNORE], minlength=len(data.labels[task]))
    classes = {
        task: {split: dict(zip(names, counts[task, split].tolist(), strict=True)) for split in SPLITS}
        for task, names in data.labels.items()
    }
    return {"rows": rows, "labelled": labelled, "present": present, "missing_targets": missing, "classes": classes}


def _across_splits(data: PreparedData, keys: Keys | None) -> dict[str, Any]:
    """Count the keys that occur in more than one split, with the first row of each as examples."""
    if keys is None:
        return {"count": 0, "examples": []}
    first = first_rows(keys, data.folder)
    shared: NDArray[np.bool_] = scratch(data.folder, len(data), np.bool_)
    for part in chunks(len(data)):
        shared[first[part][data.split[part] != data.split[first[part]]]] = True
    leaders = positions_where(shared, data.folder)
    examples: dict[int, dict[str, int]] = {row: {} for row in leaders[:NUM_EXAMPLES].tolist()}
    for part in chunks(len(data)):
        for row in (part.start + np.flatnonzero(np.isin(first[part], list(examples)))).tolist():
            examples[int(first[row])].setdefault(str(data.split[row]), int(data.ids[row]))
    return {"count": len(leaders), "examples": list(examples.values())}


def _summarize(report: dict[str, Any]) -> dict[str, Any]:
    counts = {name: report[name]["count"] for name in ("bad_rows", *WARNINGS)}
    for name, meaning in WARNINGS.items():
        if counts[name]:
            log.warning("%d %s; examples are in %s", counts[name], meaning, REPORT_FILE)
    if unlabelled := report["rows"][TRAIN] - report["labelled"][TRAIN] - report["hidden_labels"]:
        log.warning("%d training rows have no label: only terms that read a teacher learn from them", unlabelled)
    num_classes = {task: len(splits[TRAIN]) for task, splits in report["classes"].items()}
    named = {name: report[name] for name in ("rows", "labelled", "hidden_labels")}
    return {**named, "num_classes": num_classes, "modalities": sorted(report["present"]), **counts}
