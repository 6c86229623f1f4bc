"""Tar shards: real files, read in place through an index; what is wrong with them is named, listed or refused."""

import io
import json
import os
import tarfile

import pytest
from test_prepare import SPLITS, picture
from test_sources import column

from distill.contracts import UserError
from distill.data.prepare import prepare, source_fingerprint
from distill.data.prepared import PreparedData
from distill.data.sources import open_source
from distill.data.tar_index import INDEX_FILE, MEDIA
from distill.data.tar_shards import TarShardSource, expand_braces
from distill.data_config import DataConfig, Part
from distill.formats.base import BadInput
from distill.formats.image import decode_image


def sample(number: int, split: str) -> dict[str, bytes]:
    fields = {"split": split, "id": 100 - number, "tone": number % 2}
    return {
        f"{number:04}.png": picture(number),
        f"{number:04}.txt": f"drawing {number}".encode(),
        f"{number:04}.cls": b"ab"[number % 2 : number % 2 + 1],
        f"{number:04}.json": json.dumps(fields).encode(),
    }


def write_tar(path, files, **options):
    """Write files, bytes or TarInfo, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files:
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def write_shards(folder, rows_a_shard=4):
    samples = [sample(number, split) for number, split in enumerate(SPLITS)]
    for shard, start in enumerate(range(0, len(samples), rows_a_shard)):
        files = [item for each in samples[start : start + rows_a_shard] for item in each.items()]
        write_tar(folder / f"s-{shard:02}.tar", files)
    return folder


def config(**changes) -> DataConfig:
    values = {
        "source": {"type": "tar_shards", "path": "s-{00..02}.tar"},
        "modalities": {"image": "image", "text": "text"},
        "targets": {"label": "label", "tone": "tone"},
        "id": "id",
        "working_size": 8,
    }
    return DataConfig.model_validate(values | changes)


def test_shards_become_prepared_data(tmp_path):
    write_shards(tmp_path)
    info = prepare(config(), tmp_path / "data", tmp_path)
    data = PreparedData.open(tmp_path / "data")
    assert info["rows"] == {"train": 6, "valid": 2, "test": 2} and info["bad_rows"] == 0
    assert data.ids.tolist() == [100 - number for number in range(10)]
    assert list(data.texts) == [f"drawing {number}" for number in range(10)]
    assert data.labels == {"label": ["a", "b"], "tone": ["0", "1"]}
    assert all((data.arrays["image"][number] == decode_image(picture(number), 8)).all() for number in range(10))
    assert {path.name for path in tmp_path.rglob("*") if path.suffix in (".png", ".txt")} == set()


@pytest.mark.parametrize("pattern", ["s-*.tar", "s-{00,01,02}.tar", "s-0[0-2].tar"])
def test_patterns_name_the_same_shards(tmp_path, pattern):
    source = TarShardSource(pattern, base=write_shards(tmp_path))
    assert len(source) == 10 and column(source, "key") == [f"{number:04}" for number in range(10)]
    assert column(source, "shard")[3:5] == ["s-00.tar", "s-01.tar"]
    assert source.columns == ["key", "shard", *MEDIA, "text", "label", "split", "id", "tone"]
    assert source.media(7, "image") == picture(7) and source.where(7, "image") == f"{tmp_path / 's-01.tar'}: 0007"


def test_patterns_can_say_the_split(tmp_path):
    write_shards(tmp_path)
    source = TarShardSource(train="s-{00,01}.tar", test="s-02.tar", base=tmp_path)
    assert column(source, "split") == ["train"] * 8 + ["test"] * 2 and source.columns.count("split") == 1


def test_braces():
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"] and expand_braces("plain") == ["plain"]


def test_the_index_is_made_once_and_kept(tmp_path, monkeypatch):
    write_shards(tmp_path)
    first = TarShardSource("s-*.tar", base=tmp_path, folder=tmp_path / "kept")
    assert len(first) == 10 and (tmp_path / "kept" / INDEX_FILE).is_file()
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: 1 / 0)
    again = TarShardSource("s-*.tar", base=tmp_path, folder=tmp_path / "kept")
    assert again.media(9, "image") == picture(9) and column(again, "id") == column(first, "id")


def test_a_shard_that_changed_is_named(tmp_path):
    write_shards(tmp_path)
    assert len(TarShardSource("s-*.tar", base=tmp_path, folder=tmp_path)) == 10
    write_tar(tmp_path / "s-01.tar", sample(4, "train").items())
    with pytest.raises(UserError, match=r"s-01\.tar changed since it was indexed"):
        len(TarShardSource("s-*.tar", base=tmp_path, folder=tmp_path))
    write_shards(tmp_path / "other", 10)
    (tmp_path / "s-02.tar").unlink()
    (tmp_path / INDEX_FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="not an index of shards"):
        len(TarShardSource("s-*.tar", base=tmp_path, folder=tmp_path))


def test_another_number_of_shards_is_refused(tmp_path):
    write_shards(tmp_path)
    assert len(TarShardSource("s-{00,01}.tar", base=tmp_path, folder=tmp_path)) == 8
    with pytest.raises(UserError, match="there were 2 shards, now 3"):
        len(TarShardSource("s-*.tar", base=tmp_path, folder=tmp_path))


def test_the_fingerprint_follows_the_shards(tmp_path):
    write_shards(tmp_path)
    before = source_fingerprint(config(), tmp_path)
    assert before == source_fingerprint(config(), tmp_path)
    write_tar(tmp_path / "s-02.tar", sample(8, "test").items())
    assert source_fingerprint(config(), tmp_path) != before


def test_the_fingerprint_follows_each_of_two_shards_of_one_name(tmp_path):
    source = {"type": "tar_shards", "train": "train/s.tar", "test": "test/s.tar"}
    one, other = (write_tar(tmp_path / part / "s.tar", sample(3, part).items()) for part in ("train", "test"))
    for shard in (one, other):
        before = source_fingerprint(config(source=source), tmp_path)
        shard.write_bytes(shard.read_bytes() + bytes(10240))
        assert source_fingerprint(config(source=source), tmp_path) != before


def bad_rows(tmp_path, files):
    """Reasons of the bad rows among good shards and one more."""
    write_shards(tmp_path)
    write_tar(tmp_path / "s-99.tar", files)
    source = {"type": "tar_shards", "path": "s-*.tar"}
    info = prepare(config(source=source, max_bad_fraction=0.5), tmp_path / "data", tmp_path)
    listed = json.loads((tmp_path / "data" / "data_report.json").read_text())["bad_rows"]["rows"]
    assert info["bad_rows"] == len(listed) and sum(info["rows"].values()) >= 10
    return [(entry["where"], entry["reason"]) for entry in listed]


def link(name, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"0042.json": b"[1]"}, "not a mapping of fields"),
        ({"0042.json": b"{"}, "not a mapping of fields"),
        ({"0042.txt": b"\xff\xfe"}, "text is not UTF-8"),
        ({"0042.png": b"nonsense"}, "not a readable image"),
        ({"0042.png": link("0042.png")}, "is a link, a device or sparse"),
        ({"0042.png": link("0042.png", tarfile.LNKTYPE)}, "is a link, a device or sparse"),
        ({"0042.png": link("0042.png", tarfile.CHRTYPE)}, "is a link, a device or sparse"),
        ({"0042.jpg": picture(1)}, "two files of its image"),
    ],
)
def test_bad_samples_are_left_out_with_a_reason(tmp_path, changes, reason):
    found = bad_rows(tmp_path, (sample(42, "train") | changes).items())
    assert found == [(f"{tmp_path / 's-99.tar'}: 0042", found[0][1])] and reason in found[0][1]


@pytest.mark.parametrize("name", ["/abs/0042", "../0042", "a/../../0042"])
def test_names_that_leave_the_shard_are_left_out(tmp_path, name):
    files = [(name + key[4:], content) for key, content in sample(42, "train").items()]
    [(_, reason)] = bad_rows(tmp_path, files)
    assert "not a relative name" in reason


def test_a_key_that_comes_twice_is_left_out_the_second_time(tmp_path):
    files = [*sample(42, "train").items(), *sample(43, "train").items(), *sample(42, "train").items()]
    [(where, reason)] = bad_rows(tmp_path, files)
    assert where.endswith("0042") and reason == "key '0042' comes again in s-99.tar"


def test_missing_members_are_missing_cells(tmp_path):
    files = [("0.cls", b"a"), ("0.json", b'{"id": 7, "split": "train"}'), ("1.png", b"x"), ("2.notes", b"y")]
    source = TarShardSource("t.tar", base=write_tar(tmp_path / "t.tar", files).parent)
    assert len(source) == 2 and source.media(0, "image") is None and source.media(1, "image") == b"x"
    assert column(source, "text") == [None, None] and column(source, "label") == ["a", None]
    assert column(source, "id") == [7, None]


def test_long_names_and_folders_are_read(tmp_path):
    long = f"{'folder/' * 30}{'n' * 120}"
    source = TarShardSource(
        "t.tar", base=write_tar(tmp_path / "t.tar", [(f"{long}.seg.png", b"s"), (f"{long}.PNG", b"x")]).parent
    )
    assert column(source, "key") == [long] and source.media(0, "image") == b"x"


@pytest.mark.parametrize("keep", [0.1, 0.35, 0.5, 0.77, 0.9])
def test_a_truncated_shard_is_named(tmp_path, keep):
    write_shards(tmp_path)
    content = (tmp_path / "s-01.tar").read_bytes().rstrip(b"\0")
    (tmp_path / "s-01.tar").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"s-01\.tar is damaged.* copy it again"):
        len(TarShardSource("s-*.tar", base=tmp_path))


@pytest.mark.parametrize("offset", [0, 1024])
def test_a_damaged_header_is_named(tmp_path, offset):
    path = write_tar(tmp_path / "t.tar", [("0.txt", b"a"), ("1.txt", b"b")])
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = b"?" * 40
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.tar is damaged"):
        len(TarShardSource("t.tar", base=tmp_path))


def test_a_shard_that_shrinks_while_it_is_read_is_bad_input(tmp_path):
    source = TarShardSource("s-02.tar", base=write_shards(tmp_path))
    assert len(source) == 2
    (tmp_path / "s-02.tar").write_bytes(b"")
    with pytest.raises(BadInput, match="ends within a file"):
        source.media(0, "image")


def test_compressed_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="no uncompressed tar"):
        len(TarShardSource("t.tar", base=tmp_path))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "either path or patterns"),
        ({"path": "s-*.tar", "train": "s-*.tar"}, "either path or patterns"),
        ({"path": "s-{00..07}.tar"}, r"no shard .*s-03\.tar"),
        ({"path": "t-*.tar"}, r"no shard .*t-\*\.tar"),
        ({"train": "s-00.tar", "test": "s-*.tar"}, r"s-00\.tar is matched twice"),
        ({"path": "s-*.tar", "index": "x"}, "no parameter 'index'"),
        ({"path": "s-*.tar", "folder": "x"}, "no parameter 'folder'"),
    ],
)
def test_wrong_parameters(tmp_path, params, message):
    write_shards(tmp_path)
    with pytest.raises(UserError, match=message):
        open_source(Part(type="tar_shards", **params), tmp_path)


def test_a_field_of_two_types_is_refused(tmp_path):
    files = [("0.json", b'{"tone": 1}'), ("1.json", b'{"tone": "dark"}')]
    source = TarShardSource("t.tar", base=write_tar(tmp_path / "t.tar", files).parent)
    with pytest.raises(UserError, match=r"field 'tone' of \.json has values of several types"):
        column(source, "tone")


def test_shards_of_one_name_in_several_folders_all_count_in_the_fingerprint(tmp_path):
    source = {"type": "tar_shards"} | {split: f"{split}/0.tar" for split in ("train", "valid", "test")}
    for number, split in enumerate(("train", "valid", "test")):
        write_tar(tmp_path / split / "0.tar", sample(number, split).items())
    before = source_fingerprint(config(source=source), tmp_path)
    for split in ("train", "valid", "test"):
        write_tar(tmp_path / split / "0.tar", [*sample(0, split).items(), *sample(7, split).items()])
        after = source_fingerprint(config(source=source), tmp_path)
        assert after != before
        before = after


def test_a_range_that_runs_backwards_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"names no shard, as its range runs backwards"):
        TarShardSource("s-{02..00}.tar", base=write_shards(tmp_path))


def test_a_folder_is_no_shard(tmp_path):
    (tmp_path / "s-99.tar").mkdir()
    with pytest.raises(UserError, match=r"s-99\.tar is a folder"):
        len(TarShardSource("s-*.tar", base=write_shards(tmp_path)))


def test_brackets_in_the_name_of_the_base_are_no_pattern(tmp_path):
    assert len(TarShardSource("s-*.tar", base=write_shards(tmp_path / "run[1]"))) == 10


def test_names_in_another_encoding_are_read(tmp_path):
    write_tar(tmp_path / "0.tar", [("caf\xe9.txt", b"coffee")], encoding="latin-1", format=tarfile.GNU_FORMAT)
    source = TarShardSource("0.tar", base=tmp_path)
    assert column(source, "text") == ["coffee"] and column(source, "key") == ["caf\\udce9"]


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path):
    files = [("a.json", rb'{"tone": "x \ud83d"}'), ("b.json", rb'{"tone": "x \ud83d\ude00"}')]
    write_tar(tmp_path / "0.tar", files)
    source = TarShardSource("0.tar", base=tmp_path)
    (piece,) = source.read(["tone"])
    assert list(piece.bad) == [0] and "not Unicode" in piece.bad[0]
    assert piece.table.column("tone").to_pylist() == [None, "x \U0001f600"]


def test_headers_that_never_end_are_damage(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(tarfile.BLOCKSIZE, b"\0")
    (tmp_path / "0.tar").write_bytes(block * 3000)
    with pytest.raises(UserError, match="damaged"):
        len(TarShardSource("0.tar", base=tmp_path))


def test_a_shard_that_is_gone_while_it_is_read_is_named(tmp_path):
    source = TarShardSource("s-*.tar", base=write_shards(tmp_path))
    assert len(source) == 10
    (tmp_path / "s-01.tar").unlink()
    with pytest.raises(UserError, match=r"s-01\.tar cannot be read any more: No such file"):
        source.media(5, "image")


def test_a_shard_of_the_same_size_but_another_time_changed(tmp_path):
    write_shards(tmp_path)
    assert len(TarShardSource("s-*.tar", base=tmp_path, folder=tmp_path)) == 10
    before = (tmp_path / "s-01.tar").stat()
    os.utime(tmp_path / "s-01.tar", ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    with pytest.raises(UserError, match=r"s-01\.tar changed since it was indexed"):
        len(TarShardSource("s-*.tar", base=tmp_path, folder=tmp_path))
