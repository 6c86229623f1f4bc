"""Rows of every modality from their files to a batch: the same numbers in training and in ``predict``."""

import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest
import torch
from media import clip, sound, tone
from PIL import Image
from tokenizers import Tokenizer

from distill.contracts import INPUTS, UserError
from distill.data.loader import InputSpec, Loader
from distill.data.prepare import prepare, source_fingerprint
from distill.data.prepared import PreparedData
from distill.data_config import DataConfig
from distill.preprocess import Preprocessor

MODALITIES = ("image", "audio", "video", "series", "tabular")
N = 24
SPLITS = ["train"] * 16 + ["valid"] * 4 + ["test"] * 4


def write_rows(folder, **changed):
    """A table whose rows hold every modality; ``changed`` are cells by (column, row)."""
    random = np.random.default_rng(0)
    rows = []
    for number, split in enumerate(SPLITS):
        Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.wav").write_bytes(sound(tone(200 + 40 * number, 0.1 + 0.01 * number, 8000), 8000))
        (folder / f"{number}.gif").write_bytes(clip([number, 2 * number, 255 - number]))
        steps = 5 + number % 7
        np.savetxt(folder / f"{number}.csv", random.normal(5, 3, (steps, 2)), delimiter=",", header="x,y", comments="")
        row = {m: f"{number}.{end}" for m, end in zip(MODALITIES[:4], ("png", "wav", "gif", "csv"), strict=True)}
        row |= {"age": random.integers(20, 70), "pay": "" if number % 5 == 0 else round(random.normal(100, 50), 2)}
        row |= {"kind": "abcd"[number % 4] if number % 6 else "", "text": f"row {number}", "label": "xy"[number % 2]}
        rows.append(row | {"split": split})
    for (column, number), value in changed.get("cells", {}).items():
        rows[number][column] = value
    with open(folder / "rows.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return rows


def config(**changes):
    values = {
        "source": {"type": "table", "path": "rows.csv"},
        "modalities": {**{m: m for m in MODALITIES[:4]}, "tabular": ["age", "pay", "kind"], "text": "text"},
        "targets": {"label": "label"},
        "working_size": 8,
        "audio": {"sample_rate": 4000, "seconds": 0.25},
        "video": {"frames": 2},
        "series": {"channels": 2, "steps": 9},
        "tabular": {"categories": ["kind"], "max_categories": 2},
    }
    return DataConfig.model_validate(values | changes)


def opened(folder, **changes):
    """Prepare the table, and open what was written."""
    info = prepare(config(**changes), folder / "out", folder)
    return info, PreparedData.open(folder / "out", config(**changes), folder)


def loader(data, split="train", **options):
    spec = InputSpec(tuple(name for name in data.present if name != "text"))
    given = {"batch_size": N, "seed": 0, "augment": None, "shuffle": False}
    return Loader(data, split, {"m": spec}, **given | options)


def value_of(folder, row, modality):
    """A cell as ``predict`` is given it."""
    if modality == "tabular":
        return {name: row[name] for name in ("age", "pay", "kind")}
    return folder / row[modality]


@pytest.mark.parametrize("decode_once", [True, False])
def test_training_and_predict_read_the_same_numbers(tmp_path, decode_once):
    rows = write_rows(tmp_path)
    info, data = opened(tmp_path, decode_once=decode_once)
    assert info["modalities"] == sorted([*MODALITIES, "text"]) and info["bad_rows"] == 0
    assert (tmp_path / "out/audio.npy").exists() is decode_once and (tmp_path / "out/audio_length.npy").exists()
    Preprocessor(data.formats).save(tmp_path / "bundle")
    preprocess = Preprocessor.load(tmp_path / "bundle")
    for split, chosen in (("train", rows[:16]), ("test", rows[20:])):
        (batch,) = loader(data, split).at(0, 0).values()
        feeds = preprocess([{m: value_of(tmp_path, row, m) for m in MODALITIES} for row in chosen])
        assert set(batch.inputs) == {name for name in INPUTS if not name.startswith("text")}
        for name, value in batch.inputs.items():
            assert np.array_equal(value.numpy(), feeds[name]), name
            assert value.numpy().dtype == feeds[name].dtype


def test_statistics_are_those_of_the_training_rows(tmp_path):
    rows = write_rows(tmp_path)
    _, data = opened(tmp_path)
    train = rows[:16]
    ages = np.array([row["age"] for row in train], float)
    table, series = data.formats["tabular"], data.formats["series"]
    assert table.mean[0] == pytest.approx(ages.mean()) and table.std[0] == pytest.approx(ages.std())
    counts = {kind: sum(row["kind"] == kind for row in train) for kind in "abcd"}
    assert table.values == (tuple(sorted(counts, key=lambda kind: (-counts[kind], kind))[:2]),)
    steps = np.concatenate([np.loadtxt(tmp_path / row["series"], delimiter=",", skiprows=1)[:9] for row in train])
    assert np.allclose(series.mean, steps.mean(0), atol=1e-5) and np.allclose(series.std, steps.std(0), atol=1e-5)


def test_any_modality_may_be_missing(tmp_path):
    cells = {(m, number): "" for number, m in enumerate(MODALITIES[:4])}
    cells |= {(name, 4): "" for name in ("age", "pay", "kind")} | {("text", 5): ""}
    write_rows(tmp_path, cells=cells)
    info, data = opened(tmp_path)
    assert info["bad_rows"] == 0
    for number, modality in enumerate((*MODALITIES, "text")):
        assert np.flatnonzero(~data.present[modality]).tolist() == [number]
    changes = {"audio": {"noise": 0.5}, "series": {"jitter": 1.0}, "tabular": {"drop": 0.5}, "image": {"shift": 3}}
    augmented = config(augment={**changes, "video": {"brightness": 0.5}}).augment
    (batch,) = loader(data, augment=augmented, shuffle=True).at(0, 0).values()
    assert (batch.views >= 0).all()
    for modality in MODALITIES:
        for name, value in batch.inputs_of(modality).items():
            assert not value[~batch.present[modality]].any(), name
    clean = loader(data).at(0, 0)["m"]
    order = batch.ids.argsort()
    assert all(not torch.equal(batch.inputs[m][order], clean.inputs[m]) for m in MODALITIES)


def test_bad_cells_of_each_modality_are_listed_with_their_reason(tmp_path):
    cells = {("image", 1): "0.wav", ("audio", 2): "0.png", ("video", 3): "0.csv", ("series", 4): "nan.csv"}
    cells |= {("age", 5): "inf", ("audio", 6): "empty.wav", ("series", 7): "gone.csv"}
    (tmp_path / "nan.csv").write_text("1,2\nnan,3\n")
    (tmp_path / "empty.wav").write_bytes(sound(np.zeros((0, 1), np.float32), 8000))
    write_rows(tmp_path, cells=cells)
    info, data = opened(tmp_path, max_bad_fraction=0.5)
    assert info["bad_rows"] == 7 and len(data) == N - 7
    listed = {bad["id"]: bad for bad in json.loads((tmp_path / "out/data_report.json").read_text())["bad_rows"]["rows"]}
    reasons = {
        1: ("0.wav", "not a readable image"),
        2: ("0.png", "not readable audio"),
        3: ("0.csv", "not a readable video"),
        4: ("nan.csv", "series holds nan at step 1, channel 0"),
        5: ("", "column 'age' holds inf"),
        6: ("empty.wav", "audio of length 0"),
        7: ("gone.csv", "cannot be read"),
    }
    for number, (file, reason) in reasons.items():
        assert reason in listed[number]["reason"]
        assert listed[number]["where"].endswith(file)
    (batch,) = loader(data).at(0, 0).values()
    assert batch.ids.tolist() == [0, *range(8, 16)]
    feeds = Preprocessor(data.formats)([{"audio": tmp_path / f"{row}.wav"} for row in batch.ids.tolist()])
    assert np.array_equal(batch.inputs["audio"].numpy(), feeds["audio"])  # arrays hold the good rows alone


def test_too_many_bad_rows_stop_with_a_sentence(tmp_path):
    write_rows(tmp_path, cells={("audio", 2): "0.png"})
    with pytest.raises(UserError, match=r"1 of 24 rows cannot be used.*0\.png\): not readable audio"):
        opened(tmp_path)


def test_numbers_that_are_names_are_refused(tmp_path):
    write_rows(tmp_path)
    with pytest.raises(UserError, match=r"column 'kind' holds string and no numbers.*data\.tabular\.categories"):
        opened(tmp_path, tabular={})


def test_categories_of_a_table_are_those_of_predict(tmp_path):
    columns = {
        "zip": ["007", "12", "1200"],
        "price": ["1.50", "2", "0.1"],
        "flag": ["true", "false", "True"],
        "day": ["2024-01-01", "2024-02-03", "2025-01-01"],
        "at": ["2024-01-01T10:00:00", "2024-01-02 11:30:00", "2024-01-03 00:00:00"],
        "mixed": ["NA", "7", "x"],
    }
    rows = write_rows(tmp_path)
    texts = [{name: values[number % 3] for name, values in columns.items()} for number in range(N)]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], *columns])
        table.writeheader()
        table.writerows([row | text for row, text in zip(rows, texts, strict=True)])
    changes = {"modalities": {"tabular": ["age", *columns]}, "tabular": {"categories": [*columns]}}
    _, data = opened(tmp_path, **changes)
    records = [{"age": str(row["age"])} | text for row, text in zip(rows, texts, strict=True)]
    feeds = Preprocessor(data.formats)([{"tabular": record} for record in records])
    assert np.array_equal(feeds["tabular"], data.arrays["tabular"])
    assert (feeds["tabular"][:, 2:] > 0).all()  # all have a code


def test_absent_records_are_zeros_everywhere(tmp_path):
    write_rows(tmp_path, cells={(name, 4): "" for name in ("age", "pay", "kind")})
    _, data = opened(tmp_path)
    empty = {"age": "", "pay": None, "kind": " "}
    feeds = Preprocessor(data.formats)([{"tabular": empty}, {}])
    assert not feeds["tabular"].any() and not feeds["tabular_present"].any()
    assert not data.arrays["tabular"][4].any() and not data.present["tabular"][4]


def test_a_huge_number_is_one_bad_row_and_a_constant_column_stays_small(tmp_path):
    cells = {("age", 3): "1e200", **{("pay", row): 0.1 for row in range(N)}} | {("pay", 21): 0.2}
    write_rows(tmp_path, cells=cells)
    info, data = opened(tmp_path, max_bad_fraction=0.5)
    listed = json.loads((tmp_path / "out/data_report.json").read_text())["bad_rows"]["rows"]
    assert info["bad_rows"] == 1 and listed[0]["where"] == "row 3" and "beyond 32 bits" in listed[0]["reason"]
    assert np.abs(data.arrays["tabular"]).max() < 10


def test_nested_categories_are_refused(tmp_path):
    write_rows(tmp_path)
    table = pa_csv.read_csv(tmp_path / "rows.csv")
    nested = table.append_column("tags", pa.array([["a"]] * N))
    pa_parquet.write_table(nested, tmp_path / "rows.parquet")
    changes = {"source": {"type": "table", "path": "rows.parquet"}, "modalities": {"tabular": ["age", "tags"]}}
    with pytest.raises(UserError, match=r"column 'tags' holds list<.*categories are names or numbers"):
        opened(tmp_path, **changes, tabular={"categories": ["tags"]})


def test_each_row_group_is_read_once_for_each_column_of_media(tmp_path, monkeypatch):
    rows = write_rows(tmp_path)
    columns = {m: [(tmp_path / row[m]).read_bytes() for row in rows] for m in ("image", "audio")}
    columns |= {"label": [row["label"] for row in rows], "split": SPLITS}
    pa_parquet.write_table(pa.table(columns), tmp_path / "rows.parquet", row_group_size=N)
    asked = []
    read = pa_parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pa_parquet.ParquetFile, "read_row_group", lambda self, n, **k: asked.append(k["columns"]) or read(self, n, **k)
    )
    source = {"type": "table", "path": "rows.parquet"}
    opened(tmp_path, source=source, modalities={"image": "image", "audio": "audio"}, tabular={})
    assert sorted(map(tuple, asked)) == [("audio",), ("image",)]


def test_a_row_without_anything_is_bad(tmp_path):
    columns = (*MODALITIES[:4], "age", "pay", "kind", "text")
    write_rows(tmp_path, cells={(column, 3): "" for column in columns})
    _, data = opened(tmp_path, max_bad_fraction=0.5)
    listed = json.loads((tmp_path / "out/data_report.json").read_text())["bad_rows"]["rows"]
    assert [(bad["id"], bad["reason"]) for bad in listed] == [(3, "every modality is missing")] and 3 not in data.ids


def test_files_in_several_splits_are_counted_for_each_modality(tmp_path):
    write_rows(tmp_path, cells={("audio", 20): "0.wav", ("series", 21): "1.csv"})
    info, _ = opened(tmp_path)
    assert info["duplicate_sounds_across_splits"] == 1 and info["duplicate_series_across_splits"] == 1
    assert info["duplicate_images_across_splits"] == 0


def test_what_can_be_read_and_looks_wrong_is_listed_and_kept(tmp_path, caplog):
    write_rows(tmp_path)
    Image.new("RGB", (9, 9), (3, 3, 3)).save(tmp_path / "1.png")
    (tmp_path / "2.wav").write_bytes(sound(0.0005 * tone(300, 0.2, 8000), 8000))
    (tmp_path / "3.gif").write_bytes(clip([7, 7, 7]))
    np.savetxt(tmp_path / "4.csv", np.full((5, 2), 3.0), delimiter=",")
    info, data = opened(tmp_path)
    found = json.loads((tmp_path / "out/data_report.json").read_text())["looks_wrong"]
    assert found == {
        "image: of one colour": {"count": 1, "ids": [1]},
        "audio: silent": {"count": 1, "ids": [2]},
        "video: standing still": {"count": 1, "ids": [3]},
        "series: constant": {"count": 1, "ids": [4]},
    }
    assert info["bad_rows"] == 0 and len(data) == N
    assert "1 rows look wrong and are kept (audio: silent)" in caplog.text


@pytest.mark.parametrize("end", ["wav", "gif", "csv"])
def test_the_fingerprint_follows_every_file(tmp_path, end):
    write_rows(tmp_path)
    before = source_fingerprint(config(), tmp_path)
    path = tmp_path / f"3.{end}"
    path.write_bytes(path.read_bytes() + b" ")
    assert source_fingerprint(config(), tmp_path) != before


LEARN = """
import sys
from pathlib import Path
from distill.data.vocabulary import learn_vocabulary
print(learn_vocabulary(["Row one, row two", "rows of 12 ROWS", "über row"], 60, Path(sys.argv[1])))
"""


def test_a_vocabulary_is_the_same_in_every_process(tmp_path):
    for name in ("one", "two"):
        done = subprocess.run(
            [sys.executable, "-c", LEARN, tmp_path / name], capture_output=True, text=True, check=True
        )
        assert 30 < int(done.stdout) <= 60
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_vocabulary_is_learnt_from_the_training_texts(tmp_path):
    rows = write_rows(tmp_path)
    prepare(config(), tmp_path / "out", tmp_path, words=60)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert tokenizer.encode("Row 3").tokens == ["[CLS]", "row", "3", "[SEP]"] and tokenizer.get_vocab_size() <= 60
    assert "q" not in tokenizer.get_vocab() and all("[UNK]" not in tokenizer.encode(r["text"]).tokens for r in rows)
    assert tokenizer.encode("row 19").tokens == ["[CLS]", "row", "1", "##9", "[SEP]"]  # 19 is a test row's
    with pytest.raises(UserError, match="vocab_size is 9, and the characters of the training texts alone take"):
        prepare(config(), tmp_path / "small", tmp_path, words=9)
