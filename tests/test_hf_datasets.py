"""Data sets of the datasets library: written by save_to_disk, read memory-mapped and undecoded."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from test_prepare import SPLITS, good_rows, picture
from test_sources import column

from distill.contracts import UserError
from distill.data.hf_datasets import HFDatasetSource
from distill.data.prepare import prepare, source_fingerprint
from distill.data.prepared import PreparedData
from distill.data_config import DataConfig
from distill.formats.image import decode_image

FEATURES = Features({"image": Image(), "text": Value("string"), "label": ClassLabel(names=["cat", "dog"])})
FOLDER = {"type": "hf_dataset", "path": "set"}


def rows(count, first=0):
    return [
        {"image": {"bytes": picture(n), "path": None}, "text": f"text {n}", "label": n % 2}
        for n in range(first, first + count)
    ]


def write_splits(folder):
    parts = {"train": rows(6), "validation": rows(2, 6), "test": rows(2, 8)}
    found = {name: Dataset.from_list(part, features=FEATURES) for name, part in parts.items()}
    DatasetDict(found).save_to_disk(folder / "set")
    return folder


def config(**changes):
    values = {"source": FOLDER, "modalities": {"image": "image", "text": "text"}, "targets": {"label": "label"}}
    return DataConfig.model_validate(values | {"working_size": 8} | changes)


def test_splits_become_prepared_data(tmp_path):
    info = prepare(config(), tmp_path / "data", write_splits(tmp_path))
    data = PreparedData.open(tmp_path / "data")
    assert info["rows"] == {"train": 6, "valid": 2, "test": 2} and data.labels == {"label": ["cat", "dog"]}
    assert data.split.tolist() == SPLITS and list(data.texts) == [f"text {n}" for n in range(10)]
    assert all((data.arrays["image"][n] == decode_image(picture(n), 8)).all() for n in range(10))


def test_labels_are_names_and_minus_one_is_missing(tmp_path):
    Dataset.from_list([*rows(2), rows(1)[0] | {"label": -1}], features=FEATURES).save_to_disk(tmp_path / "set")
    source = HFDatasetSource("set", base=tmp_path)
    assert column(source, "label") == ["cat", "dog", None] and source.columns == ["image", "text", "label"]


def test_a_table_without_splits_says_them_itself(tmp_path):
    table = Dataset.from_list([row | {"image": {"bytes": row["image"], "path": None}} for row in good_rows()])
    table.select(range(9, -1, -1)).save_to_disk(tmp_path / "set")
    prepare(config(id="id", targets={"label": "label"}), tmp_path / "data", tmp_path)
    data = PreparedData.open(tmp_path / "data")
    assert data.ids.tolist() == list(range(91, 101)) and data.split.tolist() == SPLITS[::-1]


def test_columns_come_in_pieces_across_splits(tmp_path, monkeypatch):
    write_splits(tmp_path)
    monkeypatch.setattr("distill.data.hf_datasets.PIECE", 4)
    source = HFDatasetSource("set", base=tmp_path)
    assert [piece.table.num_rows for piece in source.read(["text", "split"])] == [4, 2, 2, 2]
    assert column(source, "split") == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    assert [source.media(row, "image") for row in (9, 0, 6)] == [picture(9), picture(0), picture(6)]


def test_paths_start_from_the_folder(tmp_path):
    paths = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "../b.png"}]
    Dataset.from_list([{"image": path} for path in paths]).save_to_disk(tmp_path / "set")
    source = HFDatasetSource("set", base=tmp_path)
    assert source.media(0, "image") == tmp_path / "set/a.png" and source.where(1, "image") == "column 'image', row 1"


def test_the_fingerprint_follows_the_rows_but_not_the_place(tmp_path):
    before = source_fingerprint(config(), write_splits(tmp_path))
    (tmp_path / "moved").mkdir()
    (tmp_path / "set").rename(tmp_path / "moved" / "set")
    assert source_fingerprint(config(), tmp_path / "moved") == before
    Dataset.from_list(rows(3), features=FEATURES).save_to_disk(tmp_path / "set")
    assert source_fingerprint(config(), tmp_path) != before


def test_the_hub_is_asked_by_name_and_config(tmp_path, monkeypatch):
    asked = []

    def load(name, config):
        asked.append((name, config))
        return datasets.load_from_disk(str(write_splits(tmp_path) / "set"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = HFDatasetSource("hub:someone/things", "small", base=tmp_path)
    assert asked == [("someone/things", "small")] and len(source) == 10
    assert set(source.identity(["image"])) > {"hub:someone/things"}


def test_a_hub_set_that_is_not_there(tmp_path, monkeypatch):
    def load(name, config):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"data set hub:a/b cannot be loaded: no route; check its name"):
        HFDatasetSource("hub:a/b", base=tmp_path)


def test_unusable_folders(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*gone"):
        HFDatasetSource("gone", base=tmp_path)
    with pytest.raises(UserError, match="cannot be read as a data set"):
        HFDatasetSource(".", base=tmp_path)
    with pytest.raises(UserError, match="config 'x' is for hub:ID"):
        HFDatasetSource(".", "x", base=tmp_path)


def test_damaged_files_are_refused(tmp_path):
    write_splits(tmp_path)
    for file in (tmp_path / "set" / "train").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as a data set"):
        HFDatasetSource("set", base=tmp_path)


def test_splits_have_the_same_columns(tmp_path):
    parts = {"train": Dataset.from_list([{"a": 1}]), "test": Dataset.from_list([{"b": 1}])}
    DatasetDict(parts).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="split 'test' has other columns than 'train'"):
        HFDatasetSource("set", base=tmp_path)


def test_the_fingerprint_follows_images_that_cells_name(tmp_path):
    Dataset.from_list([{"image": "a.png"}]).save_to_disk(tmp_path / "set")
    for root, number in (("one", 1), ("two", 2)):
        (tmp_path / root).mkdir()
        (tmp_path / root / "a.png").write_bytes(picture(number))
    one, two = (HFDatasetSource("set", root=root, base=tmp_path).identity(["image"]) for root in ("one", "two"))
    assert set(one) == set(two) and one != two


def test_images_beside_a_set_are_found_from_a_relative_base(tmp_path, monkeypatch):
    Dataset.from_list([{"image": "a.png"}]).save_to_disk(tmp_path / "set")
    monkeypatch.chdir(tmp_path.parent)
    base = tmp_path.relative_to(tmp_path.parent)
    assert HFDatasetSource("set", base=base).media(0, "image") == base / "set/a.png"


def test_a_set_without_splits_or_rows_is_refused(tmp_path):
    DatasetDict({}).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="without splits"):
        HFDatasetSource("set", base=tmp_path)
