"""From a source to prepared data: checked rows, media as arrays, labels as integers, and a report.

Whatever a user can have wrong in the data stops here, with a sentence, before any model is built. Rows come a piece at
a time and go to disk, so that memory does not grow with their number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill import runs
from distill.contracts import SPLITS, TRAIN, UserError
from distill.data.columns import Source
from distill.data.labelled import keep_labels
from distill.data.media import Medium, array_file, write_media
from distill.data.prepared import (
    CODE,
    FORMATS_FILE,
    LABELS_FILE,
    PRESENT,
    ROWS_FILE,
    TARGET,
    TEXT_FILE,
    PreparedData,
    any_target,
    record_type,
)
from distill.data.rows import Keys, Rows, read_rows, settle_tasks, texts_of
from distill.data.scratch import chunks, dense_codes, first_rows, positions_where, scratch, take
from distill.data.sources import open_source
from distill.data.texts import TextWriter
from distill.data.vocabulary import learn_vocabulary
from distill.data_config import DataConfig
from distill.formats import MEDIA, TABULAR, Format, formats_of, to_json
from distill.formats.series import SeriesFormat
from distill.preprocess import TOKENIZER_FILE
from distill.targets import REGRESSION, Task, known, missing_like, tasks_to_json

REPORT_FILE = "data_report.json"
NUM_EXAMPLES = 10
MANY = 0.01  # share of rows that look wrong above which a warning says so
SERIES = 1024  # at a time, so that memory does not grow with the data
PLURALS = {"image": "images", "audio": "sounds", "video": "clips", "series": "series"}
WARNINGS = {
    **{f"duplicate_{many}_across_splits": f"{many} are in several splits, byte by byte" for many in PLURALS.values()},
    "groups_across_splits": "groups have rows in more than one split",
}

log = logging.getLogger(__name__)


def source_fingerprint(config: DataConfig, base: Path) -> str:
    """Return a hash of what the rows come from: of the bytes of tables and media, of the state of larger stores.

    Raises:
        UserError: the source cannot be opened.
    """
    media = [column for modality in MEDIA for column in config.columns(modality)]
    return runs.fingerprint(open_source(config.source, base).identity(media))


def prepare(
    config: DataConfig,
    folder: Path,
    base: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    seed: int = 0,
    words: int | None = None,
) -> dict[str, Any]:
    """Read, check and write the data of a recipe.

    A row is bad, and left out, if the source cannot read it, if its image, sound or the like cannot be decoded, if all
    its modalities are missing, or if it is one of valid or test and has no target of any task. A row that lacks some
    targets or some modalities is kept, and so is a training row without any target.

    Args:
        config: the recipe's ``data``.
        folder: where the files are written; made if absent.
        base: folder that relative paths of the recipe start from.
        progress: called with (rows done, rows in all) while media are decoded.
        seed: of the choice of the rows that keep their labels, where the recipe hides some.
        words: most tokens of a vocabulary that is learnt from the training texts; None for none.

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
    settle_tasks(rows)  # complaints should not wait until all media are decoded
    keep_labels(rows, config.labelled, seed)
    folder.mkdir(parents=True, exist_ok=True)
    formats = formats_of(config)
    media = {name: Medium(config.columns(name)[0], formats[name]) for name in formats if name in MEDIA}
    digests: dict[str, Keys] = {}
    doubts: dict[str, list[int]] = {}
    if media:
        once = config.decode_once
        digests, doubts = write_media(media, source, rows, folder, decode_once=once, progress=progress)
    report: dict[str, Any] = {"source": Path(source.name).name, "bad_rows": _describe_bad(config, source, rows)}
    runs.write_json(folder / REPORT_FILE, report)
    _check_bad(config, source, report["bad_rows"], folder / REPORT_FILE)
    tasks = settle_tasks(rows)
    kept = positions_where(rows.bad.flags, disk, flag=False)
    groups = None if rows.groups is None else take(rows.groups, kept, disk)
    numbers = _write_texts(folder / TEXT_FILE, config, source, kept, take(rows.texts, kept, disk), disk)
    labelled = keep_labels(rows, config.labelled, seed)
    keys = {name: take(found, kept, disk) for name, found in digests.items()}
    hidden = _write_rows(folder / ROWS_FILE, rows, kept, numbers, groups, keys, tasks, labelled)
    runs.write_json(folder / FORMATS_FILE, to_json(_fitted(formats, rows, kept, folder)))
    runs.write_json(folder / LABELS_FILE, tasks_to_json(tasks))
    data = PreparedData.open(folder)
    if words is not None:
        learn_vocabulary((data.texts[row] for row in data.rows(TRAIN)), words, folder / TOKENIZER_FILE)
    report |= {**_describe(data), "hidden_labels": hidden}
    for name, found in keys.items():
        report[f"duplicate_{PLURALS[name]}_across_splits"] = _across_splits(data, found)
    report["groups_across_splits"] = _across_splits(data, groups)
    report["looks_wrong"] = {
        what: {"count": len(found), "ids": [int(rows.ids[row]) for row in found[:NUM_EXAMPLES]]}
        for what, found in doubts.items()
    }
    runs.write_json(folder / REPORT_FILE, report)
    return _summarize(report)


def _fitted(formats: dict[str, Format], rows: Rows, kept: NDArray[np.int64], folder: Path) -> dict[str, Format]:
    """The formats with what the training rows tell; series and records are standardised by it, as they lie there."""
    found = dict(formats)
    series = formats.get("series")
    if isinstance(series, SeriesFormat):
        values, lengths = (runs.read_array(array_file(folder, name), mmap_mode="r+") for name in series.arrays)
        some = [slice(start, start + SERIES) for start in range(0, len(kept), SERIES)]
        series = series.fit((values[part], np.where(_trains(rows, kept[part]), lengths[part], 0)) for part in some)
        for part in some:
            values[part] = series.standardise(values[part], lengths[part])
        found["series"] = series
    if rows.table is not None:
        pieces = [kept[part] for part in chunks(len(kept))]
        found[TABULAR] = fitted = rows.table.fit(piece[_trains(rows, piece)] for piece in pieces)
        with runs.atomic(array_file(folder, TABULAR)) as temporary, open(temporary, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(kept), fitted.width)}
            np.lib.format.write_array_header_1_0(file, header)
            for piece in pieces:
                there = rows.present[TABULAR][piece]
                file.write((rows.table.encode(fitted, piece) * there[:, None]).tobytes())
    return found


def _trains(rows: Rows, some: NDArray[np.int64]) -> NDArray[np.bool_]:
    return rows.split[some] == SPLITS.index(TRAIN)


def _describe_bad(config: DataConfig, source: Source, rows: Rows) -> dict[str, Any]:
    media = [column for modality in MEDIA for column in config.columns(modality)]

    def where(row: int, column: str | None) -> str:
        if column is None and media:
            column = media[0]
        return source.where(row, column) if column else f"row {row}"

    listed = [
        {"id": int(rows.ids[row]), "where": where(row, column), "reason": reason}
        for row, reason, column in rows.bad.listed
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
    groups: Keys | None,
    media: dict[str, Keys],
    tasks: dict[str, Task],
    labelled: NDArray[np.bool_],
) -> int:
    """Write a record for each of the kept rows; return how many training rows have labels that are not written.

    ``groups`` and ``media`` are hashes; rows without are all different.
    """
    kind = record_type(rows.present, tasks, media)
    keys = {"group": groups, **{f"{CODE}{name}": found for name, found in media.items()}}
    codes = {name: None if found is None else dense_codes(found, rows.folder)[0] for name, found in keys.items()}
    hidden = 0
    with runs.room_for(path, len(kept) * kind.itemsize), runs.atomic(path) as temporary, open(temporary, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (len(kept),)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in chunks(len(kept)):
            at = kept[part]
            records = np.zeros(len(at), kind)
            records["id"], records["source_row"], records["text"] = rows.ids[at], at, texts[part]
            records["split"] = np.array(SPLITS)[rows.split[at]]
            for name, own in codes.items():
                records[name] = np.arange(part.start, part.stop) if own is None else own[part]
            for modality, values in rows.present.items():
                records[PRESENT + modality] = values[at]
            for task, targets in rows.targets.items():
                records[TARGET + task] = targets.of(at)
            hide = (rows.split[at] == SPLITS.index(TRAIN)) & ~labelled[at]
            hidden += int((hide & any_target((records[TARGET + task] for task in tasks), len(at))).sum())
            for task in tasks:
                values = records[TARGET + task]
                values[hide] = missing_like(values, int(hide.sum()))
            file.write(records.tobytes())
    return hidden


def _describe(data: PreparedData) -> dict[str, Any]:
    rows, labelled = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    present = {modality: dict.fromkeys(SPLITS, 0) for modality in data.present}
    missing = dict.fromkeys(data.targets, 0)
    for part in chunks(len(data)):
        for split in SPLITS:
            here = data.split[part] == split
            count = int(here.sum())
            rows[split] += count
            labelled[split] += int(any_target((values[part][here] for values in data.targets.values()), count).sum())
            for modality, there in data.present.items():
                present[modality][split] += int(there[part][here].sum())
            for task, values in data.targets.items():
                missing[task] += count - int(known(values[part][here]).sum())
    counts = {split: data.class_counts(split) for split in SPLITS}

    def named(task: str, found: NDArray[np.int64]) -> dict[str, int]:
        return dict(zip(data.labels[task], np.atleast_2d(found)[-1].tolist(), strict=True))

    classes = {task: {split: named(task, counts[split][task]) for split in SPLITS} for task in counts[TRAIN]}
    numbers = {
        name: {column: {"mean": task.mean[place], "std": task.std[place]} for place, column in enumerate(task.names)}
        for name, task in data.tasks.items()
        if task.kind == REGRESSION
    }
    found = {"rows": rows, "labelled": labelled, "present": present, "missing_targets": missing, "classes": classes}
    return found | ({"numbers": numbers} if numbers else {})


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
    counts = {name: report[name]["count"] for name in ("bad_rows", *WARNINGS) if name in report}
    for name, meaning in WARNINGS.items():
        if counts.get(name):
            log.warning("%d %s; examples are in %s", counts[name], meaning, REPORT_FILE)
    for what, found in report["looks_wrong"].items():
        if found["count"] > MANY * sum(report["rows"].values()):
            log.warning("%d rows look wrong and are kept (%s); ids are in %s", found["count"], what, REPORT_FILE)
    if unlabelled := report["rows"][TRAIN] - report["labelled"][TRAIN] - report["hidden_labels"]:
        log.warning("%d training rows have no label: only terms that read a teacher learn from them", unlabelled)
    num_classes = {task: len(splits[TRAIN]) for task, splits in report["classes"].items()}
    named = {name: report[name] for name in ("rows", "labelled", "hidden_labels")}
    return {**named, "num_classes": num_classes, "modalities": sorted(report["present"]), **counts}
