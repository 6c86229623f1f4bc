"""Tables and shards behind URLs: fsspec's file system in memory stands for an object store."""

import io
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from test_prepare import SPLITS, config, good_rows, picture
from test_sources import column

from distill.contracts import UserError
from distill.data.prepare import prepare, source_fingerprint
from distill.data.prepared import PreparedData
from distill.data.remote import Place
from distill.data.tables import TableSource
from distill.data.tar_shards import TarShardSource
from distill.formats.base import BadInput


@pytest.fixture
def store():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def as_parquet(rows) -> bytes:
    buffer = io.BytesIO()
    pa_parquet.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=3)
    return buffer.getvalue()


def test_a_remote_table_is_prepared(tmp_path, store):
    store.pipe("/bucket/rows.parquet", as_parquet(good_rows()))
    part = {"type": "table", "path": "memory://bucket/rows.parquet"}
    prepare(config(source=part), tmp_path / "data", tmp_path)
    data = PreparedData.open(tmp_path / "data")
    assert data.split.tolist() == SPLITS and data.texts[4] == "drawing 4"
    before = source_fingerprint(config(source=part), tmp_path)
    assert before == source_fingerprint(config(source=part), tmp_path)
    store.pipe("/bucket/rows.parquet", as_parquet(good_rows()[1:]))
    assert source_fingerprint(config(source=part), tmp_path) != before


def test_a_remote_manifest_names_images_beside_it(tmp_path, store):
    store.pipe("/bucket/rows.csv", b"image,label\nimages/1.png,a\n../2.png,b\ns3://other/3.png,b\nimages/4.png,b\n")
    store.pipe("/bucket/images/1.png", picture(1))
    source = TableSource("memory://bucket/rows.csv", base=tmp_path)
    assert column(source, "label") == ["a", "b", "b", "b"] and source.media(0, "image") == picture(1)
    for row, reason in ((1, "leaves"), (2, "leaves"), (3, "cannot be read: no file")):
        with pytest.raises(BadInput, match=reason):
            source.media(row, "image")


def test_a_remote_folder_of_parquet_files(tmp_path, store):
    for name, rows in (("b", good_rows()[5:]), ("a", good_rows()[:5])):
        store.pipe(f"/bucket/{name}.parquet", as_parquet(rows))
    source = TableSource("memory://bucket", base=tmp_path)
    assert column(source, "id") == list(range(100, 90, -1)) and source.media(7, "image") == picture(7)


@pytest.mark.parametrize("pattern", ["memory://bucket/s-{0..1}.tar", "memory://bucket/s-*.tar"])
def test_remote_shards_are_read_in_place(tmp_path, store, pattern):
    for shard in range(2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            member = tarfile.TarInfo(f"{shard}.png")
            member.size = len(picture(shard))
            tar.addfile(member, io.BytesIO(picture(shard)))
        store.pipe(f"/bucket/s-{shard}.tar", buffer.getvalue())
    source = TarShardSource(pattern, base=tmp_path, folder=tmp_path)
    assert column(source, "key") == ["0", "1"] and source.media(1, "image") == picture(1)
    store.pipe("/bucket/s-1.tar", buffer.getvalue() + b"\0" * 512)
    with pytest.raises(UserError, match=r"memory://.*s-1\.tar changed since it was indexed"):
        len(TarShardSource(pattern, base=tmp_path, folder=tmp_path))


def test_a_driver_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    def missing(name, *_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"s3://bucket/t\.csv needs a driver that is not installed: Install s3fs"):
        TableSource("s3://bucket/t.csv", base=tmp_path)


def test_an_unknown_protocol_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"s4://bucket/t\.csv needs a driver that is not installed: Protocol not known"):
        TableSource("s4://bucket/t.csv", base=tmp_path)


def test_what_is_not_there(tmp_path, store):
    with pytest.raises(UserError, match=r"no table memory://bucket/t\.csv"):
        TableSource("memory://bucket/t.csv", base=tmp_path)
    with pytest.raises(UserError, match=r"no file memory://bucket/t\.csv; check the address"):
        Place("memory://bucket/t.csv").read()


def test_local_and_remote_places_answer_alike(tmp_path, store):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f.bin").write_bytes(b"0123456789")
    store.pipe("/a/f.bin", b"0123456789")
    for place in (Place("a/f.bin", tmp_path), Place("memory://a/f.bin")):
        assert place.name == "f.bin" and place.suffix == ".bin" and place.is_file() and not place.is_dir()
        assert place.read() == b"0123456789" and place.read(2, 5) == b"234" and place.read(8, 20) == b"89"
        assert place.state()[0] == 10 and place.state() == place.state() and place.identity()
        assert [found.name for found in place.parent.matching("*.bin")] == ["f.bin"]
        with place.open() as file:
            file.seek(9)
            assert file.read() == b"9"


def test_planning_reads_no_remote_image(tmp_path, store, monkeypatch):
    store.pipe("/bucket/rows.csv", b"image,label\nimages/1.png,a\n")
    store.pipe("/bucket/images/1.png", picture(1))
    source = TableSource("memory://bucket/rows.csv", base=tmp_path)
    monkeypatch.setattr(Place, "read", lambda *_: 1 / 0)
    assert list(source.identity(["image"])) == ["rows.csv", "memory://bucket"]
    other = TableSource("memory://bucket/rows.csv", "memory://other", base=tmp_path)
    assert other.identity(["image"]) != source.identity(["image"])
