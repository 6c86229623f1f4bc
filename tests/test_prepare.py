"""Prepared data: what is written, what is left out and listed, and what stops with a sentence."""

import io
import json
import logging
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from omegaconf import OmegaConf
from PIL import Image

from distill.contracts import IGNORE, UserError
from distill.data.prepare import PreparedData, prepare, source_fingerprint
from distill.data.sources import open_source
from distill.data_config import DataConfig
from distill.formats.image import decode_image
from distill.recipe import packaged_configs

SPLITS = ["train"] * 6 + ["valid"] * 2 + ["test"] * 2


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def good_rows() -> list[dict]:
    return [
        {
            "id": 100 - number,
            "image": picture(number),
            "text": f"drawing {number}",
            "label": "ab"[number % 2],
            "colour": number % 2,
            "family": f"f{number // 2}",
            "split": split,
        }
        for number, split in enumerate(SPLITS)
    ]


def config(**changes) -> DataConfig:
    values = {
        "source": {"type": "table", "path": "t.parquet"},
        "modalities": {"image": "image", "text": "text"},
        "targets": {"label": "label", "colour": "colour"},
        "group": "family",
        "id": "id",
        "working_size": 8,
    }
    return DataConfig.model_validate(values | changes)


def run(folder, rows, progress=None, seed=0, **changes):
    """Write the table, prepare it, and return (info, data, report)."""
    pa_parquet.write_table(pa.Table.from_pylist(rows), folder / "t.parquet", row_group_size=3)
    info = prepare(config(**changes), folder / "data", folder, progress, seed=seed)
    return info, PreparedData.open(folder / "data"), report_of(folder)


def report_of(folder):
    return json.loads((folder / "data" / "data_report.json").read_text())


def test_everything_is_written(tmp_path):
    info, data, report = run(tmp_path, good_rows())
    assert data.ids.tolist() == [100 - n for n in range(10)] and len(data) == 10
    assert data.arrays["image"].shape == (10, 3, 8, 8) and data.arrays["image"].dtype == np.uint8
    assert all(np.array_equal(data.arrays["image"][n], decode_image(picture(n), 8)) for n in range(10))
    assert data.texts[3] == "drawing 3" and data.split.tolist() == SPLITS
    assert data.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert data.labels == {"label": ["a", "b"], "colour": ["0", "1"]}
    assert data.targets["label"].tolist() == [0, 1] * 5 and data.targets["label"].dtype == np.int64
    assert all(values.all() and values.dtype == bool for values in data.present.values())
    assert info == {
        "rows": {"train": 6, "valid": 2, "test": 2},
        "labelled": {"train": 6, "valid": 2, "test": 2},
        "hidden_labels": 0,
        "num_classes": {"label": 2, "colour": 2},
        "modalities": ["image", "text"],
        "bad_rows": 0,
        "duplicate_images_across_splits": 0,
        "groups_across_splits": 0,
    }
    assert report["classes"]["label"]["train"] == {"a": 3, "b": 3}
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "data_report.json",
        "formats.json",
        "image.npy",
        "labels.json",
        "rows.npy",
        "text.arrow",
    ]


def test_rows_of_a_split_are_in_order_of_id(tmp_path):
    _, data, _ = run(tmp_path, good_rows())
    assert data.rows("train").tolist() == [5, 4, 3, 2, 1, 0]
    assert data.rows("test").tolist() == [9, 8]


def test_images_are_mapped_not_read(tmp_path):
    _, data, _ = run(tmp_path, good_rows())
    assert isinstance(data.arrays["image"], np.memmap) and not data.arrays["image"].flags.writeable


def test_bad_images_are_left_out_and_listed(tmp_path):
    rows = good_rows()
    rows[2]["image"] = b"not an image"
    info, data, report = run(tmp_path, rows, max_bad_fraction=0.1)
    assert info["bad_rows"] == 1 and 98 not in data.ids and len(data) == 9
    assert data.arrays["image"].shape[0] == 9 and np.array_equal(data.arrays["image"][2], decode_image(picture(3), 8))
    [listed] = report["bad_rows"]["rows"]
    assert listed["id"] == 98 and listed["where"] == "column 'image', row 2" and "not a readable" in listed["reason"]


def test_image_files_are_listed_by_path(tmp_path):
    rows = good_rows()
    for number, row in enumerate(rows):
        row["image"] = f"{number}.png"
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "4.png").unlink()
    (tmp_path / "6.png").unlink()
    (tmp_path / "6.png").mkdir()
    _, data, report = run(tmp_path, rows, max_bad_fraction=0.2)
    missing, folder = report["bad_rows"]["rows"]
    assert missing["where"] == str(tmp_path / "4.png") and "cannot be read" in missing["reason"]
    assert folder["id"] == 94 and len(data) == 8


def test_too_many_bad_rows_stop_with_the_first_example(tmp_path):
    rows = good_rows()
    rows[2]["image"] = rows[5]["image"] = b"not an image"
    with pytest.raises(UserError, match=r"2 of 10 rows .*max_bad_fraction 0\.1 .* id 98 .*not a readable"):
        run(tmp_path, rows, max_bad_fraction=0.1)
    assert report_of(tmp_path)["bad_rows"]["count"] == 2
    assert not (tmp_path / "data" / "rows.npy").exists()


def test_missing_targets(tmp_path):
    rows = good_rows()
    rows[0]["label"] = None
    rows[7]["label"], rows[7]["colour"] = "", None
    info, data, report = run(tmp_path, rows, max_bad_fraction=0.1)
    assert info["bad_rows"] == 1 and report["bad_rows"]["rows"][0]["reason"] == "no target"
    assert data.targets["label"][0] == IGNORE and data.targets["colour"][0] == 0
    assert report["missing_targets"] == {"label": 1, "colour": 0}
    assert info["labelled"] == {"train": 6, "valid": 1, "test": 2}


def test_missing_modalities_are_marked(tmp_path):
    rows = good_rows()
    rows[0]["text"], rows[1]["text"], rows[2]["image"] = None, "  ", None
    rows[3]["text"] = rows[3]["image"] = None
    _, data, report = run(tmp_path, rows, max_bad_fraction=0.1)
    assert [entry["reason"] for entry in report["bad_rows"]["rows"]] == ["every modality is missing"]
    assert data.present["text"].tolist() == [False, False] + [True] * 7
    assert data.present["image"].tolist() == [True, True, False] + [True] * 6
    assert data.texts[:2] == ["", ""] and not data.arrays["image"][2].any()
    assert report["present"]["text"] == {"train": 3, "valid": 2, "test": 2}


def test_text_alone(tmp_path):
    rows = good_rows()
    rows[0]["text"] = ""
    info, data, report = run(tmp_path, rows, modalities={"text": "text"}, max_bad_fraction=0.1)
    assert not data.arrays and set(data.present) == {"text"} and info["modalities"] == ["text"]
    assert report["bad_rows"]["rows"] == [{"id": 100, "where": "row 0", "reason": "every modality is missing"}]


def test_image_alone(tmp_path):
    _, data, _ = run(tmp_path, good_rows(), modalities={"image": "image"})
    assert set(data.present) == {"image"} and list(data.texts) == [""] * 10


def test_rows_without_ids_and_groups(tmp_path):
    _, data, _ = run(tmp_path, good_rows(), id=None, group=None)
    assert data.ids.tolist() == list(range(10)) == data.groups.tolist()


def test_integer_classes_are_in_order_of_value(tmp_path):
    rows = good_rows()
    for number, row in enumerate(rows):
        row["colour"] = (2, 10)[number % 2]
    assert run(tmp_path, rows)[1].labels["colour"] == ["2", "10"]


def test_booleans_are_classes(tmp_path):
    rows = [row | {"colour": row["colour"] == 1} for row in good_rows()]
    assert run(tmp_path, rows)[1].labels["colour"] == ["False", "True"]


def test_the_packaged_data_config_fits_its_sample(tmp_path):
    raw = OmegaConf.to_container(OmegaConf.load(packaged_configs() / "data" / "emoji.yaml"))
    emoji = DataConfig.model_validate(raw)
    columns = open_source(emoji.source, tmp_path).columns
    columns_of_targets = [target.column for target in emoji.targets.values()]
    named = [*emoji.modalities.values(), *columns_of_targets, emoji.split, emoji.group, emoji.id]
    assert set(named) <= set(columns)


def test_common_names_of_validation_are_understood(tmp_path):
    rows = good_rows()
    rows[6]["split"], rows[7]["split"] = "val", "validation"
    assert run(tmp_path, rows)[0]["rows"]["valid"] == 2


def test_image_folder(tmp_path):
    for number, split in enumerate(SPLITS):
        folder = tmp_path / "pictures" / split / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(number))
    part = {"type": "image_folder", "path": "pictures"}
    _, data, _ = run(
        tmp_path,
        good_rows(),
        source=part,
        modalities={"image": "image"},
        targets={"kind": "label"},
        id=None,
        group=None,
    )
    assert len(data) == 10 and data.labels == {"kind": ["a", "b"]}


def test_coco_captions_keep_those_of_an_image_together(tmp_path):
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split, first, count in (("train", 0, 20), ("val", 20, 4)):
        (tmp_path / "coco" / split).mkdir()
        numbers = range(first, first + count)
        for number in numbers:
            (tmp_path / "coco" / split / f"{number}.png").write_bytes(picture(number))
        captions = [
            {"id": 5 * n + k, "image_id": n, "caption": f"drawing {n} again"} for n in numbers for k in range(5)
        ]
        content = {"images": [{"id": n, "file_name": f"{n}.png"} for n in numbers], "annotations": captions}
        (tmp_path / "coco" / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    info, data, _ = run(
        tmp_path,
        good_rows(),
        source={"type": "coco_captions", "path": "coco"},
        modalities={"image": "image"},
        targets={"caption": {"column": "caption", "kind": "captioning", "vocab_size": 64}},
        group="image_id",
        hold_out=0.2,
    )
    assert info["rows"]["test"] == 20 and info["rows"]["train"] + info["rows"]["valid"] == 100
    assert info["rows"]["valid"] % 5 == 0 and info["rows"]["valid"] > 0 and info["groups_across_splits"] == 0
    assert data.tasks["caption"].text(data.targets["caption"][0]).startswith("drawing")


def test_duplicates_and_shared_groups_across_splits_are_reported(tmp_path, caplog):
    rows = good_rows()
    rows[9]["image"], rows[1]["image"] = rows[0]["image"], rows[0]["image"]
    rows[8]["family"] = "f0"
    with caplog.at_level(logging.WARNING):
        info, _, report = run(tmp_path, rows)
    assert info["duplicate_images_across_splits"] == info["groups_across_splits"] == 1
    assert report["duplicate_images_across_splits"]["examples"] == [{"train": 100, "test": 91}]
    assert report["groups_across_splits"]["examples"] == [{"train": 100, "test": 92}]
    assert len(caplog.messages) == 2


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    rows = good_rows()
    rows[9]["label"] = rows[9]["colour"] = None
    run(tmp_path, rows, lambda done, total: seen.append((done, total)), max_bad_fraction=0.1)
    assert seen[-1] == (9, 9)


def changed(column, value, rows=(0,)):
    table = good_rows()
    for row in rows:
        table[row][column] = value
    return table


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (good_rows(), {"targets": {"label": "lable"}}, r"t\.parquet has no column 'lable'; did you mean 'label'"),
        (good_rows(), {"modalities": {"image": "picture"}}, "no column 'picture'"),
        (good_rows(), {"modalities": {"images": "image"}}, "unknown modality 'images'.* did you mean 'image'"),
        (good_rows(), {"split": "part"}, "no column 'part'"),
        (good_rows(), {"group": "famili"}, "did you mean 'family'"),
        (good_rows(), {"id": "idd"}, "did you mean 'id'"),
        (good_rows(), {"id": "text"}, "column 'text', row 0: 'drawing 0' is not an integer id"),
        (good_rows(), {"modalities": {"text": "id"}}, "column 'id', row 0: 100 is not a text"),
        (changed("id", 7, (2, 8)), {}, "id 7 2 times"),
        (changed("split", "trian"), {}, "row 0: unknown split 'trian'; did you mean 'train'"),
        (changed("split", None), {}, "row 0: None is not one of train, valid, test"),
        (changed("split", "train", (6, 7)), {}, "no usable row of split 'valid'"),
        (changed("label", "c", (8,)), {}, "task 'label': class 'c' of split 'test' never occurs in train"),
        (changed("label", "a", range(10)), {}, r"task 'label' has 1 class\(es\)"),
        ([row | {"colour": 0.5} for row in good_rows()], {}, "column 'colour' holds float"),
    ],
)
def test_mistakes_stop_before_images_are_decoded(tmp_path, rows, changes, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, rows, **changes)
    assert not (tmp_path / "data").exists()


def test_a_split_that_only_has_bad_rows_is_empty(tmp_path):
    with pytest.raises(UserError, match="no usable row of split 'test'"):
        run(tmp_path, changed("image", b"bad", (8, 9)), max_bad_fraction=0.5)


def test_no_rows_at_all(tmp_path):
    pa_parquet.write_table(pa.Table.from_pylist(good_rows()).slice(0, 0), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="no usable row of split 'train'"):
        prepare(config(), tmp_path / "data", tmp_path)


def test_fingerprint_follows_the_bytes_of_tables_and_images(tmp_path):
    rows = [row | {"image": "one.png"} for row in good_rows()]
    (tmp_path / "one.png").write_bytes(picture(0))
    pa_parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    first = source_fingerprint(config(), tmp_path)
    assert first == source_fingerprint(config(), tmp_path)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("t.parquet", "one.png"):
        (moved / name).write_bytes((tmp_path / name).read_bytes())
    assert first == source_fingerprint(config(), moved)
    (tmp_path / "one.png").write_bytes(picture(1))
    second = source_fingerprint(config(), tmp_path)
    pa_parquet.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "t.parquet")
    assert len({first, second, source_fingerprint(config(), tmp_path)}) == 3
    (tmp_path / "one.png").unlink()
    assert source_fingerprint(config(), tmp_path) != second


def test_texts_that_are_not_unicode_are_one_sentence(tmp_path):
    table = pa.Table.from_pylist(good_rows())
    raw = pa.array([b"\xff"] * len(table))
    table = table.set_column(2, "text", pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:]))
    pa_parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column 'text', from row 0 on: Invalid UTF8"):
        prepare(config(), tmp_path / "data", tmp_path)


def test_devices_are_no_images(tmp_path):
    rows = [row | {"image": "/dev/zero"} for row in good_rows()[:1]]
    rows += [row | {"image": f"{row['id']}.png"} for row in good_rows()[1:]]
    for row in rows[1:]:
        (tmp_path / row["image"]).write_bytes(picture(row["id"]))
    _, data, report = run(tmp_path, rows, max_bad_fraction=0.2)
    assert len(data) == 9 and "plain files" in report["bad_rows"]["rows"][0]["reason"]


def test_the_message_says_how_many_bad_rows_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.data.rows.NUM_LISTED", 2)
    rows = [row | {"image": b"not an image"} for row in good_rows()[:3]] + good_rows()[3:]
    with pytest.raises(UserError, match=r"3 of 10 rows .*; the first 2 are listed in"):
        run(tmp_path, rows)


def test_the_hash_of_a_split_is_that_of_its_rows_alone(prepared):
    test, train = prepared.rows("test")[0], prepared.rows("train")[0]

    def changed(row):
        """Data that differ in one thing of a row, each in another."""
        targets, present = ({k: v.copy() for k, v in part.items()} for part in (prepared.targets, prepared.present))
        ids, images, texts = prepared.ids.copy(), np.array(prepared.arrays["image"]), list(prepared.texts)
        targets["tone"][row] = 1 - targets["tone"][row]
        present["text"][row] = False
        ids[row], images[row, 0, 0, 0], texts[row] = ids[row] + 1, images[row, 0, 0, 0] + 1, "another"
        values = {"ids": ids, "arrays": {"image": images}, "texts": texts, "targets": targets, "present": present}
        return [replace(prepared, **{name: value}) for name, value in values.items()]

    own = prepared.fingerprint("test")
    assert {data.fingerprint("test") for data in changed(train)} == {own}
    others = [data.fingerprint("test") for data in changed(test)]
    assert own not in others and len(set(others)) == len(others)
    tasks = prepared.tasks | {"tone": replace(prepared.tasks["tone"], names=prepared.tasks["tone"].names[::-1])}
    swapped = prepared.targets | {"tone": 1 - prepared.targets["tone"]}
    assert replace(prepared, tasks=tasks, targets=swapped).fingerprint("test") == own  # classes count by name
    assert replace(prepared, tasks=tasks).fingerprint("test") != own


def many_rows(count: int = 400) -> list[dict]:
    """Rows of train and test, two a family."""
    rows = good_rows()[:2] * (count // 2)
    return [
        {**row, "id": number, "family": f"f{number // 2}", "split": "test" if number % 50 > 47 else "train"}
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("group", ["family", None])
def test_held_out_rows_are_a_share_of_train_in_whole_groups(tmp_path, group):
    rows = many_rows()
    found = {}
    for seed, share in ((0, 0.3), (1, 0.3), (0, 0.4)):
        place = tmp_path / f"{seed}-{share}"
        place.mkdir()
        _, data, _ = run(place, rows, seed=seed, hold_out=share, group=group)
        found[seed, share] = set(data.ids[data.split == "valid"].tolist())
        assert {row for row, split in zip(data.ids, data.split, strict=True) if split == "test"} == {
            row["id"] for row in rows if row["split"] == "test"
        }
    assert found[0, 0.3] == found[1, 0.3] < found[0, 0.4]
    assert 0.2 < len(found[0, 0.3]) / 384 < 0.4
    halves = {row ^ 1 for row in found[0, 0.3]}
    assert (halves == found[0, 0.3]) == (group is not None)


def test_rows_are_held_out_only_where_there_is_no_valid_split(tmp_path):
    with pytest.raises(UserError, match=r"data.hold_out is 0.3, and .* has rows of split 'valid'; set it to 0"):
        run(tmp_path, good_rows(), hold_out=0.3)


def test_rows_without_a_label_stay_in_train(tmp_path):
    rows = [{**row, "label": None, "colour": None} if number < 100 else row for number, row in enumerate(many_rows())]
    _, data, _ = run(tmp_path, [row for row in rows if row["label"] or row["split"] == "train"], hold_out=0.4)
    assert data.ids[data.split == "valid"].min() >= 100


SHARES = {"valid": 0.2, "test": 0.3}


@pytest.mark.parametrize("group", ["family", None])
def test_rows_without_a_split_are_dealt_in_whole_groups_and_alike_for_all_seeds(tmp_path, group):
    rows = [{name: value for name, value in row.items() if name != "split"} for row in many_rows()]
    found = []
    for seed, some in ((0, rows), (1, rows), (0, rows[:300])):  # rows that come later move no other
        place = tmp_path / f"{seed}-{len(some)}"
        place.mkdir()
        info, data, _ = run(place, some, seed=seed, random_split=SHARES, group=group)
        found.append(dict(zip(data.ids.tolist(), data.split.tolist(), strict=True)))
    assert found[0] == found[1] and found[2].items() <= found[0].items()
    for split, share in SHARES.items():
        assert list(found[0].values()).count(split) / 400 == pytest.approx(share, abs=0.07)
    together = all(found[0][row] == found[0][row ^ 1] for row in found[0])
    assert together == (group is not None) and sum(info["rows"].values()) == 300


@pytest.mark.parametrize("group", ["family", None])
def test_a_class_that_came_to_other_splits_alone_goes_to_train(tmp_path, group):
    rows = [
        {**row, "label": f"rare{number // 4}" if number < 80 else "common"} for number, row in enumerate(many_rows())
    ]
    _, data, _ = run(tmp_path, rows, random_split={"valid": 0.4, "test": 0.5}, group=group, split="")
    splits = {label: set() for label in data.labels["label"]}
    for label, split in zip(data.targets["label"].tolist(), data.split.tolist(), strict=True):
        splits[data.labels["label"][label]].add(split)
    assert len(splits) == 21 and all("train" in found for found in splits.values())
    assert any(found != {"train"} for label, found in splits.items() if label != "common")
    if group:
        by_id = dict(zip(data.ids.tolist(), data.split.tolist(), strict=True))
        assert all(by_id[row] == by_id[row ^ 1] for row in by_id)


@pytest.mark.parametrize("group", ["family", None])
def test_dealt_rows_that_lack_labels_stay_in_train_with_their_groups(tmp_path, group):
    rows = [
        {**row, "label": None, "colour": None} if number % 4 == 1 and number < 200 else row
        for number, row in enumerate(many_rows())
    ]
    _, data, report = run(tmp_path, rows, random_split=SHARES, group=group, split="")
    split = dict(zip(data.ids.tolist(), data.split.tolist(), strict=True))
    assert all(split[row] == "train" for row in range(1, 200, 4)) and report["bad_rows"]["count"] == 0
    assert all(split[row - 1] == "train" for row in range(1, 200, 4)) == (group is not None)
    assert len(set(split.values())) == 3


def test_a_split_is_not_dealt_where_the_source_has_one(tmp_path):
    with pytest.raises(UserError, match=r"has a column 'split' for that; leave it out, or set data\.split to ''"):
        run(tmp_path, many_rows(), random_split=SHARES)


def test_a_source_without_a_split_is_told_of_both_ways(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "split"} for row in good_rows()]
    with pytest.raises(UserError, match=r"no column 'split'; .*; data\.random_split deals the rows where"):
        run(tmp_path, rows)


def test_shares_leave_some_rows_to_train():
    with pytest.raises(ValueError, match=r"valid and test take 1\.1 of the rows together; leave some to train"):
        config(random_split={"valid": 0.6, "test": 0.5})
