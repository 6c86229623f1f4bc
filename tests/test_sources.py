"""Tables and image folders: the same rows from each format, and a sentence for each mistake."""

import csv
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from datasets import Dataset

from distill.contracts import UserError
from distill.data.folders import ImageFolderSource
from distill.data.sources import SOURCES, open_source
from distill.data.tables import TableSource
from distill.data_config import Part
from distill.formats.base import BadInput

ROWS = [{"id": n, "image": f"images/{n}.png", "label": "ab"[n % 2], "text": f"text {n}"} for n in range(5)]


def column(source, name):
    return [value for piece in source.read([name]) for value in piece.table.column(name).to_pylist()]


def write_table(folder, suffix):
    path = folder / f"table{suffix}"
    if suffix == ".parquet":
        pa_parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    source = TableSource(write_table(tmp_path, suffix).name, base=tmp_path)
    assert len(source) == 5 and source.columns == ["id", "image", "label", "text"]
    assert column(source, "id") == [0, 1, 2, 3, 4]
    assert column(source, "text")[3] == "text 3"
    assert [source.media(row, "image") for row in (4, 0)] == [tmp_path / "images/4.png", tmp_path / "images/0.png"]


def test_folder_of_parquet_files_is_read_in_order_of_name(tmp_path):
    for name, rows in (("b", ROWS[3:]), ("a", ROWS[:3])):
        pa_parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    source = TableSource(".", base=tmp_path)
    assert column(source, "id") == [0, 1, 2, 3, 4]
    assert list(source.identity([])) == ["a.parquet", "b.parquet"]


def test_files_of_a_folder_have_the_same_columns(tmp_path):
    pa_parquet.write_table(pa.table({"id": [1]}), tmp_path / "a.parquet")
    pa_parquet.write_table(pa.table({"id": [1], "extra": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="'extra'"):
        TableSource(".", base=tmp_path)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (b"data", b"data"),
        (b"", None),
        ({"bytes": b"data", "path": "a.png"}, b"data"),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"bytes": None, "path": None}, None),
        ("a.png", "a.png"),
        ("", None),
        ("/elsewhere/a.png", "/elsewhere/a.png"),
    ],
)
def test_image_cells(tmp_path, cell, expected):
    pa_parquet.write_table(pa.Table.from_pylist([{"image": cell}]), tmp_path / "t.parquet")
    value = TableSource("t.parquet", base=tmp_path).media(0, "image")
    assert value == (tmp_path / expected if isinstance(expected, str) else expected)


@pytest.mark.parametrize(("cell", "message"), [(3, "a int"), ("../a.png", "leaves the folder")])
def test_bad_image_cells(tmp_path, cell, message):
    pa_parquet.write_table(pa.table({"image": [cell]}), tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=message):
        TableSource("t.parquet", base=tmp_path).media(0, "image")


def test_root_is_where_image_paths_start(tmp_path):
    (tmp_path / "tables").mkdir()
    write_table(tmp_path / "tables", ".csv")
    source = TableSource("tables/table.csv", root=".", base=tmp_path)
    assert source.media(1, "image") == tmp_path / "images/1.png"
    assert list(source.identity(["image"]))[:2] == ["table.csv", "images/0.png"]


def test_embedded_images_need_no_files(tmp_path):
    pa_parquet.write_table(pa.table({"image": [b"x"]}), tmp_path / "t.parquet")
    assert list(TableSource("t.parquet", base=tmp_path).identity(["image"])) == ["t.parquet"]


def test_packaged_sample(tmp_path):
    source = TableSource("sample:emoji", base=tmp_path)
    assert {"id", "image", "text", "category", "subcategory", "family", "split"} <= set(source.columns)
    assert isinstance(source.media(len(source) - 1, "image"), bytes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "no table"),
        ("t.xlsx", "", r"unknown suffix '\.xlsx'"),
        ("t.parquet", "nonsense", "cannot be read as a table"),
        ("t.jsonl", "{", "cannot be read as a table"),
        ("t.csv", "", "cannot be read as a table"),
        ("sample:emojis", None, "did you mean 'emoji'"),
    ],
)
def test_unusable_tables(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        TableSource(name, base=tmp_path)


def test_empty_folder_is_no_table(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.parquet file"):
        TableSource(".", base=tmp_path)


def test_missing_column_names_the_nearest(tmp_path):
    source = TableSource(write_table(tmp_path, ".csv").name, base=tmp_path)
    with pytest.raises(UserError, match=r"table\.csv has no column 'labels'; did you mean 'label'"):
        column(source, "labels")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_image_folder_with_classes(tmp_path):
    touch(tmp_path, "dog/2.JPG", "cat/1.png", "cat/notes.txt", ".hidden/x/y.png", "readme.md")
    source = ImageFolderSource(".", base=tmp_path)
    assert source.columns == ["image", "label"] and len(source) == 2
    assert column(source, "label") == ["cat", "dog"]
    assert source.media(1, "image") == tmp_path / "dog/2.JPG"


def test_image_folder_with_splits(tmp_path):
    touch(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/3.png")
    source = ImageFolderSource(".", base=tmp_path)
    assert column(source, "split") == ["train", "train", "val"]
    assert column(source, "label") == ["cat", "dog", "cat"]
    assert list(source.identity(["image"])) == column(source, "image")


def test_a_class_may_be_called_like_a_split(tmp_path):
    touch(tmp_path, "train/1.png", "bus/1.png")
    assert column(ImageFolderSource(".", base=tmp_path), "label") == ["bus", "train"]


@pytest.mark.parametrize(("path", "message"), [("gone", "no folder"), (".", "holds no image at class/file")])
def test_unusable_image_folders(tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        ImageFolderSource(path, base=tmp_path)


def write_coco(folder, **changes):
    (folder / "annotations").mkdir()
    for split, image, numbers in (("train2017", 391895, (10, 3)), ("val2017", 9, (7,))):
        content = {
            "info": {"year": 2017},
            "images": [{"id": image, "file_name": f"{image:012}.jpg", "height": 4, "width": 4}],
            "annotations": [{"id": n, "image_id": image, "caption": f" caption {n}\n"} for n in numbers],
        } | changes
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    (folder / "annotations" / "instances_val2017.json").write_text("{}")  # boxes, which come with it


def test_coco_captions(tmp_path):
    write_coco(tmp_path)
    touch(tmp_path, "train2017/000000391895.jpg", "val2017/000000000009.jpg")
    source = open_source(Part(type="coco_captions", path="."), tmp_path)
    assert len(source) == 3 and column(source, "id") == [10, 3, 7]
    assert column(source, "caption") == ["caption 10", "caption 3", "caption 7"]
    assert column(source, "split") == ["train", "train", "test"] and column(source, "image_id") == [391895, 391895, 9]
    assert source.media(1, "image") == tmp_path / "train2017/000000391895.jpg" and source.media(1, "image").is_file()
    files = [f"annotations/captions_{split}2017.json" for split in ("train", "val")]
    assert {*source.identity(["image"])} == {"train2017/000000391895.jpg", "val2017/000000000009.jpg", *files}
    told = open_source(Part(type="coco_captions", path=".", val="valid"), tmp_path)
    assert column(told, "split") == ["train", "train", "valid"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, r"holds no annotations/captions_SPLIT\.json; give a folder laid out as COCO's"),
        ({"images": 3}, r"captions_train2017\.json is no file of COCO captions: TypeError .*; fetch it again"),
        ({"annotations": [{"id": 1}]}, "is no file of COCO captions: KeyError 'image_id'"),
        ({"images": []}, "caption 10 is of image 391895, of which it names no file"),
        ({"images": [{"id": n, "file_name": "../a.jpg"} for n in (391895, 9)]}, "caption 10 is of image 391895"),
    ],
)
def test_damaged_coco_captions(tmp_path, changes, message):
    if changes is not None:
        write_coco(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        open_source(Part(type="coco_captions", path="."), tmp_path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "tabel"}, "did you mean 'table'"),
        ({"type": "table", "paht": "x"}, "no parameter 'paht'; did you mean 'path'"),
        ({"type": "table", "base": "x"}, "no parameter 'base'"),
        ({"type": "table"}, "needs the parameter 'path'"),
        ({"type": "table", "path": 3}, r"data\.source: path is 3; expected a string"),
    ],
)
def test_wrong_parts(tmp_path, part, message):
    with pytest.raises(UserError, match=message):
        open_source(Part(**part), tmp_path)


def test_parts_open_their_sources(tmp_path):
    touch(tmp_path, "cat/1.png", "cat/1.wav", "cat/1.mp4")
    write_table(tmp_path, ".csv")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    write_coco(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w"):
        folders = dict.fromkeys(("image_folder", "audio_folder", "video_folder", "coco_captions"), ".")
        paths = {"table": "table.csv", **folders, "hf_dataset": "set", "tar_shards": "a.tar"}
    for kind, builder in SOURCES.items():
        assert isinstance(open_source(Part(type=kind, path=paths[kind]), tmp_path), builder)


def test_damage_within_a_parquet_file_is_one_sentence(tmp_path):
    table = pa.table({"text": [f"text {number}" for number in range(999)], "image": [b"x"] * 999})
    pa_parquet.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    content = (tmp_path / "t.parquet").read_bytes()
    half = len(content) // 2
    (tmp_path / "t.parquet").write_bytes(content[:4] + b"\xff" * (half - 4) + content[half:])
    source = TableSource("t.parquet", base=tmp_path)
    for read in (lambda: column(source, "text"), lambda: [source.media(0, name) for name in source.columns]):
        with pytest.raises(UserError, match=r"t\.parquet cannot be read as a table"):
            read()


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path):
    (tmp_path / "t.csv").write_text("text,id,text\na,1,b\n")
    source = TableSource("t.csv", base=tmp_path)
    assert column(source, "id") == [1]
    with pytest.raises(UserError, match="several columns 'text'"):
        column(source, "text")


def test_cells_that_can_be_no_path_have_no_hash(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    cells = ["a\0b.png", "loop.png", "long words " * 99, "../a.png", None]
    pa_parquet.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    source = TableSource("t.parquet", base=tmp_path)
    assert set(source.identity(["image"]).values()) == {source.identity([])["t.parquet"], None}
    for row in (0, 1):
        with pytest.raises(BadInput, match="cannot be followed"):
            source.media(row, "image")


def test_only_structs_without_bytes_name_files(tmp_path):
    (tmp_path / "b.png").write_bytes(b"b")
    cells = [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    pa_parquet.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    assert list(TableSource("t.parquet", base=tmp_path).identity(["image"])) == ["t.parquet", "b.png"]
