"""Images decoded when they are read are those that were decoded once, in every kind of source."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_loader import assert_equal
from test_prepare import config, good_rows, picture, report_of
from test_tar_shards import config as tar_config
from test_tar_shards import write_shards

from distill.contracts import UserError
from distill.data.loader import InputSpec, Loader
from distill.data.prepare import prepare
from distill.data.prepared import PreparedData, SourceMedia
from distill.data_config import AugmentConfig
from distill.formats.image import decode_image

AUGMENT = AugmentConfig.model_validate({"image": {"flip": 0.5, "shift": 2}})


def table(folder, rows):
    pa_parquet.write_table(pa.Table.from_pylist(rows), folder / "t.parquet", row_group_size=3)
    return config(max_bad_fraction=0.5)


def files(folder, rows):
    for row in rows:
        if row["image"] is not None:
            (folder / f"{row['id']}.png").write_bytes(row["image"])
    return table(folder, [row | {"image": row["image"] and f"{row['id']}.png"} for row in rows])


def dataset(folder, rows):
    cells = [row | {"image": {"bytes": row["image"], "path": None}} for row in rows]
    Dataset.from_list(cells).save_to_disk(folder / "set")
    return config(max_bad_fraction=0.5, source={"type": "hf_dataset", "path": "set"})


def shards(folder, rows):
    write_shards(folder)
    return tar_config(max_bad_fraction=0.5)


def both(folder, chosen):
    """The data decoded once, and the data decoded when read."""
    found = []
    for once in (True, False):
        place, settings = folder / f"data-{once}", chosen.model_copy(update={"decode_once": once})
        prepare(settings, place, folder)
        found.append(PreparedData.open(place, settings, folder))
    return found


def batches(data):
    options = {"batch_size": 3, "seed": 0, "augment": AUGMENT, "shuffle": True}
    return [batch["m"] for batch in Loader(data, "train", {"m": InputSpec(("image",))}, **options).epoch(1)]


@pytest.mark.parametrize("write", [table, files, dataset, shards])
def test_batches_are_the_same(tmp_path, write):
    rows = good_rows()
    rows[1]["image"], rows[3]["image"] = b"not an image", None
    once, live = both(tmp_path, write(tmp_path, rows))
    assert isinstance(live.arrays["image"], SourceMedia) and live.arrays["image"].shape == once.arrays["image"].shape
    assert not (tmp_path / "data-False" / "image.npy").exists()
    assert once.ids.tolist() == live.ids.tolist() and len(once) == (10 if write is shards else 9)
    for one, other in zip(batches(once), batches(live), strict=True):
        assert_equal(one, other)
    assert all(np.array_equal(live.arrays["image"][row], once.arrays["image"][row]) for row in range(len(once)))


def test_images_are_cropped_by_both(tmp_path):
    rows = good_rows()
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (12, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
    rows[0]["image"] = buffer.getvalue()
    once, live = both(tmp_path, table(tmp_path, rows).model_copy(update={"image_fit": "crop"}))
    assert np.array_equal(once.arrays["image"][0], decode_image(rows[0]["image"], 8, crop=True))
    assert all(np.array_equal(live.arrays["image"][row], once.arrays["image"][row]) for row in range(len(once)))


def test_bad_rows_are_found_by_both(tmp_path):
    rows = good_rows()
    rows[1]["image"] = b"not an image"
    reports = []
    for once in (True, False):
        place = tmp_path / f"at-{once}"
        place.mkdir()
        prepare(table(place, rows).model_copy(update={"decode_once": once}), place / "data", place)
        reports.append(report_of(place))
    assert reports[0] == reports[1] and reports[0]["bad_rows"]["count"] == 1


def test_an_image_that_changed_is_named(tmp_path):
    _, live = both(tmp_path, files(tmp_path, good_rows()))
    (tmp_path / "98.png").write_bytes(picture(2)[:50])
    with pytest.raises(UserError, match=r"98\.png changed since the data was prepared: .*--force=data"):
        live.arrays["image"][np.array([2])]
    assert torch.from_numpy(live.arrays["image"][np.array([3])]).shape == (1, 3, 8, 8)
