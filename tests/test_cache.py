"""Teacher cache and encoded store: resume, ranks, refusal, damage, random access, size and speed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import shards
from distill.cache import EncodedStore, TeacherCache, encode_once, flatten
from distill.contracts import CLEAN_VIEW, Batch, Outputs, UserError
from distill.runs import sha256_file

KEY = {"teacher": "aa", "preprocessing": "bb", "data": "cc", "augmentation": "dd", "seed": 0, "outputs": ["category"]}
IDS = np.array([3, 4, 7, 11, 12, 13, 20, 21, 22, 30, 31], np.int64)
VIEWS = [CLEAN_VIEW, 0, 1]


def teacher(ids: np.ndarray, view: int) -> Outputs:
    """Values that name their row, view and column."""
    base = torch.from_numpy(ids).float()[:, None] + 100 * view
    return Outputs(
        {"category": base + torch.arange(5) / 8, "category.image": -base.repeat(1, 3)},
        {"fused": torch.cat([base, torch.ones_like(base)], 1)},
        {"encoders.image.blocks.0": base[:, :, None] * torch.ones(2, 3), "mask": base > 10},
    )


def fill(folder: Path, **change: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "rows": IDS, "views": VIEWS, "produce": teacher, "key": KEY, "dtype": "float32", "batch_size": 3,
        "shard_rows": 4,
    }  # fmt: skip
    return TeacherCache.fill(folder, **arguments | change)


def same(found: Outputs, expected: Outputs, tolerance: float = 0) -> None:
    assert flatten(found).keys() == flatten(expected).keys()
    for name, value in flatten(expected).items():
        torch.testing.assert_close(flatten(found)[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_lookup_gives_back_what_the_teacher_said(dtype: str, tolerance: float, tmp_path: Path) -> None:
    info = fill(tmp_path, dtype=dtype)
    cache = TeacherCache.open(tmp_path, KEY)
    assert info == cache.info and info["views"] == VIEWS and info["rows"] == len(IDS)
    ids = torch.tensor([31, 3, 13, 13, 7, 22])
    for view in VIEWS:
        same(cache.lookup(ids, torch.full((6,), view)), teacher(ids.numpy(), view), tolerance)
    mixed = torch.tensor([1, 0, -1, 1, 0, 1])
    expected = [flatten(teacher(ids[i : i + 1].numpy(), int(mixed[i]))) for i in range(6)]
    joined = {name: torch.cat([row[name] for row in expected]) for name in expected[0]}
    for name, value in flatten(cache.lookup(ids, mixed)).items():
        torch.testing.assert_close(value, joined[name], rtol=tolerance, atol=tolerance)
    stored = cache.lookup(ids, mixed, dtype=None).logits["category"]
    assert stored.dtype == getattr(torch, dtype)


def test_it_answers_a_batch_like_a_teacher(tmp_path: Path) -> None:
    fill(tmp_path)
    batch = Batch(torch.from_numpy(IDS), torch.zeros(len(IDS), dtype=torch.int64), {}, {}, {})
    same(TeacherCache.open(tmp_path, KEY)(batch), teacher(IDS, 0))


def test_several_batches_are_looked_up_at_once(tmp_path: Path) -> None:
    fill(tmp_path)
    cache = TeacherCache.open(tmp_path, KEY)
    batches = [
        Batch(torch.tensor(ids), torch.tensor(views), {}, {}, {})
        for ids, views in (([31, 3, 13], [0, 1, -1]), ([3], [1]), ([7, 22], [0, 0]))
    ]
    batches.append(Batch(batches[0].ids[:0], batches[0].views[:0], {}, {}, {}))
    for found, batch in zip(cache.lookup_each(batches), batches, strict=True):
        same(found, cache(batch))
    with pytest.raises(UserError, match="does not hold row 5;"):
        cache.lookup_each([batches[0], batches[0]._replace(ids=torch.tensor([3, 5, 7]))])


def test_an_empty_batch_and_the_shapes_of_rows(tmp_path: Path) -> None:
    fill(tmp_path)
    none = TeacherCache.open(tmp_path, KEY).lookup(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert none.features["encoders.image.blocks.0"].shape == (0, 2, 3)


@pytest.mark.parametrize("apart", [1, 10**6])
def test_ids_that_lie_close_or_far_apart(apart: int, tmp_path: Path) -> None:
    ids = IDS * apart - 9
    fill(tmp_path, rows=ids)
    cache = TeacherCache.open(tmp_path, KEY)
    torch.testing.assert_close(cache.lookup(torch.from_numpy(ids), torch.zeros(11)).logits, teacher(ids, 0).logits)
    for unknown in (ids[0] - 1, ids[3] + 1 - 2 * (apart == 1), ids[-1] + 1, ids[-1] + 10**9):
        if unknown not in ids:
            with pytest.raises(UserError, match=f"does not hold row {unknown}"):
                cache.lookup(torch.tensor([int(ids[0]), int(unknown)]), torch.zeros(2, dtype=torch.int64))


def test_an_unknown_view_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(UserError, match=r"holds views \[-1, 0, 1\], not 2"):
        TeacherCache.open(tmp_path, KEY).lookup(torch.tensor([3, 4]), torch.tensor([0, 2]))


def test_a_key_may_hold_tuples(tmp_path: Path) -> None:
    fill(tmp_path, key=KEY | {"outputs": ("a", "b")})
    TeacherCache.open(tmp_path, KEY | {"outputs": ("a", "b")})
    TeacherCache.open(tmp_path, KEY | {"outputs": ["a", "b"]})


def test_a_mismatch_names_the_differing_parts(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(UserError, match=r"another augmentation, seed \(augmentation: 'dd', now 'xx'\)"):
        TeacherCache.open(tmp_path, KEY | {"seed": 1, "augmentation": "xx"})
    with pytest.raises(UserError, match=r"another outputs"):
        TeacherCache.open(tmp_path, {k: v for k, v in KEY.items() if k != "outputs"})
    with pytest.raises(UserError, match="no finished teacher cache"):
        TeacherCache.open(tmp_path / "absent", KEY)


def test_a_killed_fill_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def mortal(ids: np.ndarray, view: int) -> Outputs:
        if len(asked) == 9:
            raise KeyboardInterrupt
        asked.append((int(ids[0]), view))
        return teacher(ids, view)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "a", produce=mortal)
    assert len(asked) == 9 and not (tmp_path / "a" / "cache.json").exists()
    (tmp_path / "a" / ".shard-view0-00001.safetensors.1.tmp").write_bytes(b"half")
    first, asked = asked, []
    progress: list[tuple[int, int]] = []
    fill(tmp_path / "a", produce=mortal, progress=lambda done, total: progress.append((done, total)))
    assert (12, 1) not in first and {(22, 0), (3, 1), (22, 1)} <= set(asked) and not {view for _, view in asked} & {-1}
    assert progress[-1] == (33, 33) and progress[0][0] > 11
    assert not list((tmp_path / "a").glob("*.tmp")) and not list((tmp_path / "a").glob(".*"))
    fill(tmp_path / "b")
    for file in (tmp_path / "b").glob("shard-*.safetensors"):
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
    asked = []
    fill(tmp_path / "a", produce=mortal, progress=lambda done, total: progress.append((done, total)))
    assert not asked and progress[-1] == (33, 33)


def test_a_fill_mends_damage_and_replaces_other_keys(tmp_path: Path) -> None:
    fill(tmp_path, views=[0, 1, 2], shard_rows=2)
    calls: list[int] = []

    def counted(ids: np.ndarray, view: int) -> Outputs:
        calls.append(len(ids))
        return teacher(ids, view)

    fill(tmp_path, key=KEY | {"seed": 1}, produce=counted)
    assert sum(calls) == 33
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 9  # the finer shards are gone
    flip_last_byte(tmp_path / "shard-view1-00000.safetensors")
    calls.clear()
    fill(tmp_path, key=KEY | {"seed": 1}, produce=counted)
    assert sum(calls) == 4
    TeacherCache.open(tmp_path, KEY | {"seed": 1}).verify()


def test_a_fill_mends_a_damaged_entry_and_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    entry, manifest = tmp_path / "shard-view1-00000.json", tmp_path / "cache.json"
    calls: list[int] = []

    def counted(ids: np.ndarray, view: int) -> Outputs:
        calls.append(len(ids))
        return teacher(ids, view)

    for old, new in (('"float32"', '"float16"'), ('"seconds"', '"secondz"'), ('"rows": 4', '"rows": 5'), ("{", "[")):
        entry.write_text(entry.read_text().replace(old, new))
        calls.clear()
        fill(tmp_path, produce=counted)
        assert sum(calls) == 4
        TeacherCache.open(tmp_path, KEY).verify()
    for text in (manifest.read_text()[:-9], "[]", manifest.read_text().replace('"key"', '"kez"')):
        manifest.write_text(text)
        with pytest.raises(UserError, match=r"cache\.json has changed since it was written"):
            TeacherCache.open(tmp_path, KEY)


def test_a_refill_that_dies_leaves_no_old_manifest(tmp_path: Path) -> None:
    fill(tmp_path)

    def dead(ids: np.ndarray, view: int) -> Outputs:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, key=KEY | {"seed": 1}, produce=dead)
    with pytest.raises(UserError, match="no finished"):
        TeacherCache.open(tmp_path, KEY)


def test_ranks_fill_disjoint_shards_that_equal_one_fill(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def counted(ids: np.ndarray, view: int) -> Outputs:
        seen.extend((int(row), view) for row in ids)
        return teacher(ids, view)

    fill(tmp_path / "one")
    infos = [fill(tmp_path / "many", produce=counted, rank=rank, world_size=4) for rank in (2, 0, 3, 1)]
    assert infos[:3] == [{}, {}, {}] and infos[3]["rows"] == 11
    assert len(seen) == len(set(seen)) == 33
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "many" / file.name).read_bytes()


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damage_is_found_at_the_first_read_or_at_opening(tmp_path: Path) -> None:
    fill(tmp_path)
    flip_last_byte(tmp_path / "shard-view0-00001.safetensors")
    cache = TeacherCache.open(tmp_path, KEY)
    cache.lookup(torch.tensor([3, 12]), torch.tensor([0, 1]))
    with pytest.raises(UserError, match=r"shard-view0-00001\.safetensors has changed"):
        cache.lookup(torch.tensor([12]), torch.tensor([0]))
    with pytest.raises(UserError, match="shard-view0-00001"):
        cache.verify()
    (tmp_path / "shard-view0-00001.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"shard-view0-00001\.safetensors is absent or has another size"):
        TeacherCache.open(tmp_path, KEY)
    flip_last_byte(tmp_path / "index.safetensors")
    with pytest.raises(UserError, match=r"index\.safetensors"):
        TeacherCache.open(tmp_path, KEY)


def test_check_names_the_worst_row_and_output(tmp_path: Path) -> None:
    fill(tmp_path, dtype="float16")
    cache = TeacherCache.open(tmp_path, KEY)
    assert cache.check(teacher) > 0.9999

    def drifted(ids: np.ndarray, view: int) -> Outputs:
        outputs = teacher(ids, view)
        outputs.embeddings["fused"][torch.from_numpy(ids) == 31] = torch.tensor([1.0, -40.0])
        return outputs

    with pytest.raises(UserError, match=r"'embeddings.fused' of row 31, view .* differs .*cosine -?0\.[0-8]"):
        cache.check(drifted, count=11)
    with pytest.raises(UserError, match=r"differ in having 'embeddings.fused'"):
        cache.check(lambda ids, view: teacher(ids, view)._replace(embeddings={}))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (1e5, "range of float16")],
)
def test_values_that_cannot_be_stored_are_refused(value: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"'logits.category' .*{message}"):
        fill(tmp_path, produce=lambda ids, view: Outputs({"category": torch.full((len(ids), 2), value)}, {}, {}),
             dtype="float16")  # fmt: skip


def test_outputs_that_change_between_shards_are_refused(tmp_path: Path) -> None:
    def fickle(ids: np.ndarray, view: int) -> Outputs:
        return Outputs({"category": torch.zeros(len(ids), 2 + view)}, {}, {})

    with pytest.raises(UserError, match="same outputs for every batch"):
        fill(tmp_path, produce=fickle)


def test_the_disk_is_checked_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="make room"):
        fill(tmp_path)
    assert not list(tmp_path.glob("shard-*"))


def ten_logits(ids: np.ndarray, view: int) -> Outputs:
    return Outputs({"category": torch.randn(len(ids), 10)}, {}, {})


@pytest.mark.parametrize("views", [[0], [0, 1, 2, 3]])
def test_ten_logits_take_25_bytes_a_row_at_most(views: list[int], tmp_path: Path) -> None:
    info = fill(tmp_path, rows=np.arange(20_000) * 3, views=views, produce=ten_logits, dtype="float16",
                batch_size=1024, shard_rows=4096)  # fmt: skip
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != "cache.json")
    assert info["bytes"] == on_disk and info["bytes_per_row"] <= 25
    assert on_disk + (tmp_path / "cache.json").stat().st_size <= 25 * 20_000 * len(views)


def test_reading_is_fast(tmp_path: Path) -> None:
    fill(tmp_path, rows=np.arange(100_000), views=[0], produce=ten_logits, dtype="float16", batch_size=4096,
         shard_rows=4096)  # fmt: skip
    cache = TeacherCache.open(tmp_path, KEY)
    batches = [torch.randint(100_000, (256,)) for _ in range(200)]
    views = torch.zeros(256, dtype=torch.int64)
    for ids in batches[:20]:
        cache.lookup(ids, views)
    began = time.process_time()
    for ids in batches:
        cache.lookup(ids, views)
    rate = 200 * 256 / (time.process_time() - began)
    assert rate > 200_000, f"{rate:.0f} rows a CPU-second over 25 shards"


@pytest.mark.parametrize(("rows", "files"), [(2048, 1), (20_000, 10), (300_000, 64), (1_200_000, 74)])
def test_a_cache_has_few_files_a_view(rows: int, files: int, tmp_path: Path) -> None:
    def constant(ids: np.ndarray, view: int) -> Outputs:
        return Outputs({"category": torch.zeros(len(ids), 1)}, {}, {})

    info = TeacherCache.fill(
        tmp_path, rows=np.arange(rows), views=[0], produce=constant, key=KEY, dtype="float16", batch_size=2**20
    )
    assert len(info["shards"]) == files and sum(shard["rows"] for shard in info["shards"]) == rows


def test_large_stores_get_larger_shards() -> None:
    assert shards.shard_size(10**6, 4096) == 4096
    assert shards.shard_size(10**9, 4096) == -(-(10**9) // shards.MOST_SHARDS)


def test_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    fill(tmp_path, dtype="bfloat16")
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    path = tmp_path / "shard-view-1-00000.safetensors"
    tensors, outputs = load_file(path), flatten(teacher(IDS[:4], CLEAN_VIEW))
    assert set(tensors) == {"record", "features.mask"} and tensors["record"].dtype == torch.bfloat16
    values = [outputs[name].flatten(1) for name in sorted(outputs) if name != "features.mask"]
    torch.testing.assert_close(tensors["record"], torch.cat(values, 1).bfloat16(), rtol=0, atol=0)
    described = json.loads((tmp_path / "cache.json").read_text())["tensors"]
    assert described["features.mask"] == {"dtype": "bool", "shape": [1]}
    with safe_open(path, framework="pt") as file:  # so the file alone says what its columns are
        assert json.loads(file.metadata()["tensors"]) == described


def test_a_shard_of_another_version_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    cache = TeacherCache.open(tmp_path, KEY)
    path = tmp_path / "shard-view0-00000.safetensors"
    save_file({"logits.category": load_file(path)["record"]}, path)
    (shard,) = (shard for shard in cache.info["shards"] if shard["name"] == path.stem)
    shard["sha256"] = sha256_file(path)
    with pytest.raises(UserError, match=r"shard-view0-00000\.safetensors was written by another version; run the same"):
        cache.lookup(torch.tensor([3]), torch.tensor([0]))


TOKENS = np.array([[1, 2, 0], [3, 0, 0], [1, 2, 0], [4, 5, 6], [3, 0, 0], [1, 2, 0], [7, 0, 0]], np.int32)


def tower(positions: np.ndarray) -> dict[str, Tensor]:
    tokens = torch.from_numpy(TOKENS[positions]).float()
    return {"tokens": tokens[:, :, None] * torch.ones(4), "pooled": tokens.sum(1, keepdim=True)}


def test_each_distinct_input_is_encoded_once(tmp_path: Path) -> None:
    asked: list[int] = []

    def counted(positions: np.ndarray) -> dict[str, Tensor]:
        asked.extend(positions.tolist())
        return tower(positions)

    arguments: dict[str, Any] = {"keys": TOKENS, "key": {"tower": "t"}, "dtype": "float16", "batch_size": 2}
    info = encode_once(tmp_path, **arguments, produce=counted, shard_rows=3)
    assert asked == [0, 1, 3, 6] and info["distinct"] == 4 and info["inputs"] == 7
    store = EncodedStore.open(tmp_path, {"tower": "t"})
    everywhere = np.array([6, 5, 4, 3, 2, 1, 0, 0])
    for positions in (everywhere, torch.from_numpy(everywhere)):
        for name, value in store.lookup(positions).items():
            assert torch.equal(value, tower(everywhere)[name]) and value.dtype == torch.float32
    assert store.lookup(everywhere, dtype=None)["tokens"].dtype == torch.float16
    store.verify()
    encode_once(tmp_path, **arguments, produce=counted, shard_rows=3)
    assert len(asked) == 4
    encode_once(tmp_path, **arguments | {"keys": TOKENS + 1}, produce=counted, shard_rows=3)
    assert len(asked) == 8


def test_the_store_refuses_other_keys_and_positions(tmp_path: Path) -> None:
    encode_once(tmp_path, keys=TOKENS, key={"tower": "t"}, dtype="float16", batch_size=2, produce=tower)
    with pytest.raises(UserError, match="another tower"):
        EncodedStore.open(tmp_path, {"tower": "u"})
    with pytest.raises(UserError, match="not position 7"):
        EncodedStore.open(tmp_path, {"tower": "t"}).lookup(torch.tensor([0, 7]))
    with pytest.raises(UserError, match="not position -1"):
        EncodedStore.open(tmp_path, {"tower": "t"}).lookup(np.array([-1]))


def test_ranks_encode_disjoint_inputs(tmp_path: Path) -> None:
    for rank in (1, 0):
        info = encode_once(tmp_path, keys=TOKENS, key={}, dtype="float32", batch_size=2, shard_rows=1, produce=tower,
                           rank=rank, world_size=2)  # fmt: skip
    assert info["distinct"] == 4
    assert torch.equal(EncodedStore.open(tmp_path, {}).lookup(np.arange(7))["pooled"], tower(np.arange(7))["pooled"])
