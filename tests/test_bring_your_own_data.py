"""docs/bring-your-own-data.md, followed to the letter: a folder of real images and a CSV, and nothing else."""

import csv
import io
import json
import re
import shutil
import tarfile
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from media import sound, tone
from PIL import Image
from tiny_project import ROOT, distill

from distill.contracts import SPLITS
from distill.recipe import load_recipe
from distill.runs import read_json

PAGE = (ROOT / "docs" / "bring-your-own-data.md").read_text(encoding="utf-8")
RECIPES = [block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if block.startswith("version:")]
COMMANDS = [line.split() for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SMALL = ["teacher.train.epochs=1", "student.train.epochs=1", "prune.train.epochs=1", "bench.repeats=10"]
KINDS = ("Animals & Nature", "Food & Drink", "Travel & Places")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a newcomer has: image files, and a table that says what each shows; texts are for the second recipe."""
    table = pa_parquet.read_table(ROOT / "distill/data/samples/emoji/noto.parquet").to_pylist()
    kept = [row for row in table if row["category"] in KINDS]
    (tmp_path / "photos").mkdir()
    with open(tmp_path / "photos.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "title"])
        for number, row in enumerate(kept, start=1):
            name = f"photos/{number:04}.jpg"  # what a file's name says of its type is not believed
            (tmp_path / name).write_bytes(row["image"])
            writer.writerow([name, row["category"], row["text"]])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipes_are_short():
    assert len(RECIPES) == 3 and all(len(recipe.splitlines()) <= 10 for recipe in RECIPES[:2])


def follow(photos: Path, *overrides: str) -> None:
    """Each command of the page, in its order."""
    (photos / "mine.yaml").write_text(RECIPES[0], encoding="utf-8")
    assert len(COMMANDS) == 3
    for program, *arguments in COMMANDS:
        assert program == "distill"
        answer = distill(*arguments, *(overrides if arguments[0] == "run" else ()))
        assert answer.code == 0, answer.err
    assert re.search(r"animal: .* \d+\.\d%", answer.out)
    report = read_json(photos / "runs/mine/report/report.json")
    named = set(re.findall(r"`(runs/mine/\S+)`", PAGE))
    assert len(named) == 4 and all((photos / path).exists() for path in named)
    assert {"teacher", "baseline", "student", "pruned", "onnx-int8"} <= {model["name"] for model in report["models"]}


def test_following_the_page_ends_with_a_report(photos):
    follow(photos, *SMALL, "export.min_agreement_int8=0", "report.bootstrap=100")


@pytest.mark.slow
def test_following_the_page_as_it_is_gives_good_models(photos):
    follow(photos)
    models = read_json(photos / "runs/mine/report/report.json")["models"]
    found = {model["name"]: model["quality"]["animal"]["accuracy"] for model in models}
    print(found)
    assert found["teacher"] > 0.6 and found["student"] > 0.5  # 1 in 3 by chance


def test_a_recipe_with_texts_is_valid_too(photos):
    (photos / "both.yaml").write_text(RECIPES[1], encoding="utf-8")
    recipe = load_recipe("both.yaml")
    assert {term.task for term in recipe.teacher.objective} == {f"animal.{head}" for head in ("fused", "image", "text")}
    answer = distill("run", "both.yaml", "--dry-run")
    assert answer.code == 0, answer.err


def write_machines(folder: Path, count: int = 120) -> None:
    """A table with a picture, a sound, a series and a record a row, each of which tells something of the state."""
    random = np.random.default_rng(0)
    rows = [["photo", "sound", "sensors", "age", "load", "maker", "state"]]
    for number in range(count):
        state = number % 3
        Image.new("RGB", (40, 30), tuple(random.integers(60 * state, 60 * state + 90, 3).tolist())).save(
            folder / f"m{number}.jpg"
        )
        (folder / f"m{number}.wav").write_bytes(sound(tone(200 + 300 * state, 1.2, 11025, channels=2), 11025))
        steps = np.cumsum(random.normal(state - 1, 1, (50 + number % 30, 2)), axis=0)
        np.savetxt(folder / f"m{number}.csv", steps, delimiter=",", header="x,y", comments="")
        age, load = random.integers(0, 5) + 4 * state, random.choice(["", "0.5", "0.9"])
        row = [f"m{number}.jpg", f"m{number}.wav", f"m{number}.csv", age, load, random.choice(["acme", "bolt"])]
        row[number % 6] = row[number % 6] if number % 4 else ""  # any of them may be missing
        rows.append([*row, ("fine", "worn", "broken")[state]])
    with open(folder / "machines.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def test_sounds_series_and_records_end_with_a_report_and_a_bundle_that_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_machines(tmp_path)
    (tmp_path / "machines.yaml").write_text(RECIPES[2], encoding="utf-8")
    small = ["teacher.train.epochs=8", "student.train.epochs=6", "prune.train.epochs=2", "bench.repeats=10"]
    answer = distill("run", "machines.yaml", *small, "export.min_agreement_int8=0", "report.bootstrap=100")
    assert answer.code == 0, answer.err
    report = read_json(tmp_path / "runs/machines/report/report.json")
    models = {model["name"]: model for model in report["models"]}
    modalities = ("image", "audio", "series", "tabular")
    expected = ["+".join(some) for size in (1, 2, 3) for some in combinations(modalities, size)]
    assert all(sorted(models[name]["subsets"]) == sorted(expected) for name in ("teacher", "student"))
    assert [name.count("+") for name in models["teacher"]["subsets"]] == [0] * 4 + [1] * 6 + [2] * 4
    assert models["teacher"]["quality"]["state"]["accuracy"] > 0.5  # 1 in 3 by chance
    (tmp_path / "new.csv").write_text(
        "image,audio,series,age,maker\nm1.jpg,m1.wav,m1.csv,3,acme\n,m2.wav,,,\n,,,9.5,never seen\n"
    )
    bundle = tmp_path / "runs/machines/quantize/onnx-int8"
    answer = distill("predict", bundle, "--table", "new.csv", "--json")
    assert answer.code == 0, answer.err
    said = json.loads(answer.out)
    assert [row["predictions"]["state"]["label"] in ("fine", "worn", "broken") for row in said] == [True] * 3
    assert said[1]["tabular"] is None and said[2]["audio"] is None
    alone = distill("predict", bundle, "--audio", "m2.wav", "--json")
    assert json.loads(alone.out)[0]["predictions"] == said[1]["predictions"]


def in_folders(photos: Path, rows: list[dict[str, str]], name: str, *, splits: bool) -> None:
    (photos / "photos").rename(photos / "old")
    for number, row in enumerate(rows):
        split = SPLITS[number % 3] if splits else ""
        place = photos / name / split / row["label"]
        place.mkdir(parents=True, exist_ok=True)
        content = (photos / "old" / Path(row["file"]).name).read_bytes()
        end = {"photos": "jpg", "sounds": "wav", "clips": "gif"}[name]
        (place / f"{number}.{end}").write_bytes(content)  # a plan looks at names alone


def in_tables(photos: Path, rows: list[dict[str, str]]) -> None:
    table = pa.Table.from_pylist(rows)
    pa_parquet.write_table(table, photos / "rows.parquet")
    (photos / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    datasets.Dataset(table).save_to_disk(str(photos / "folder"))


def in_shards(photos: Path, rows: list[dict[str, str]]) -> None:
    (photos / "shards").mkdir()
    for shard in range(100):
        with tarfile.open(photos / f"shards/{shard:03}.tar", "w") as tar:
            for number, row in list(enumerate(rows))[shard::100]:
                for end, data in (("jpg", (photos / row["file"]).read_bytes()), ("cls", row["label"].encode())):
                    entry = tarfile.TarInfo(f"{number:04}.{end}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def in_coco(photos, rows):
    """The rows as COCO lays them out, with their labels as captions and a file for each split."""
    for place, split in enumerate(("train", "valid", "test")):
        own = list(enumerate(rows))[place::3]
        for folder in ("annotations", split):
            (photos / "coco" / folder).mkdir(parents=True, exist_ok=True)
        for number, row in own:
            shutil.copy(photos / row["file"], photos / "coco" / split / f"{number}.jpg")
        content = {
            "images": [{"id": number, "file_name": f"{number}.jpg"} for number, _ in own],
            "annotations": [{"id": number, "image_id": number, "caption": row["label"]} for number, row in own],
        }
        (photos / "coco/annotations" / f"captions_{split}.json").write_text(json.dumps(content))


SOURCES = re.findall(r"`(\{type: \w+, path: (?:\"[^\"]*\"|[^}\"]*)\})`", PAGE)
COLUMNS = {"table": ("file", "label"), "hf_dataset": ("file", "label"), "coco_captions": ("image", "caption")}


@pytest.mark.parametrize(
    ("source", "splits"),
    [
        (source, splits)
        for source in SOURCES
        for splits in (False, True)
        if "hub:" not in source
        and not (splits and "tar_shards" in source)  # shards have a pattern for each split
        and not (not splits and "coco" in source)  # which says it always
    ],
)
def test_the_other_sources_have_the_columns_that_the_page_names(photos, source, splits):
    kind = re.search(r"type: (\w+)", source)[1]
    with open(photos / "photos.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    modality = kind.removesuffix("_folder") if kind.endswith("_folder") else "image"
    if kind.endswith("_folder"):
        in_folders(photos, rows, re.search(r"path: (\w+)", source)[1], splits=splits)
    elif kind == "tar_shards":
        in_shards(photos, rows)
    elif kind == "coco_captions":
        in_coco(photos, rows)
    else:
        in_tables(photos, [{**row, "split": SPLITS[n % 3]} if splits else row for n, row in enumerate(rows)])
    column, label = COLUMNS.get(kind, (modality, "label"))
    chosen = [f"data.source={source}", f"data.modalities={{{modality}: {column}}}", f"data.targets={{animal: {label}}}"]
    type_of = {"image": "convnet", "audio": "audio_convnet", "video": "frame_convnet"}[modality]
    encoders = f"{{{modality}: {{type: {type_of}, widths: [4], blocks: [0]}}}}"
    chosen += [f"{model}.encoders={encoders}" for model in ("teacher", "student")] if modality != "image" else []
    (photos / "mine.yaml").write_text(RECIPES[0], encoding="utf-8")
    answer = distill(
        "run", "mine.yaml", *chosen, *(["data.random_split=null"] if splits else []), "--dry-run", "--json"
    )
    assert answer.code == 0, answer.err
    assert sum(json.loads(answer.out)["rows"].values()) == len(rows)
