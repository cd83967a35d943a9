import errno
import gzip
import hashlib
import io
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygptv_ds.data.shards import index as index_module
from tinygptv_ds.data.shards.index import ShardIndex, build_index, load_index, sample_count, sample_counts
from tinygptv_ds.data.shards.tar import Member, bad_end, scan_tar, split_name
from tinygptv_ds.data.shards.writer import ShardWriter, expand_shards
from tinygptv_ds.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tar(path: Path, members: list[tuple[str, bytes]], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, size: int = 700) -> list[tuple[str, bytes]]:
    return [(f"{i:04d}.{suffix}", bytes([i]) * size) for i in range(count) for suffix in ("jpg", "json")]


def contents(tar: Path) -> list[tuple[str, dict[str, bytes]]]:
    index, data = load_index(tar), tar.read_bytes()
    return [
        (index.key(i), {m.suffix: data[m.offset : m.offset + m.size] for m in index.members(i)})
        for i in range(len(index))
    ]


# ---- patterns --------------------------------------------------------------------------------------------------------


def test_expand_braces_wildcards_folders_and_lists(tmp_path: Path) -> None:
    tars = [make_tar(tmp_path / f"{i:05d}.tar", []) for i in range(12)]
    (tmp_path / "00000_stats.json").touch()
    assert expand_shards("{00000..00011}.tar", tmp_path) == tars
    assert expand_shards("0000?.tar", tmp_path) == tars[:10]
    assert expand_shards(".", tmp_path) == tars
    assert expand_shards(str(tmp_path)) == tars
    assert expand_shards(["00003.tar", "{00001,00000}.tar"], tmp_path) == [tars[3], tars[1], tars[0]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{00000..00005}.tar", "00002.tar .and 3 more of 6 named"),
        ("a/*.tar", r"not found: .*a/\*.tar"),
        ("empty", "holds no"),
        (["00000.tar", "*0.tar"], "more than once"),
        ("pipe:cat x.tar", "shell command.*allow_pipe"),
        ("{pipe:cat://,pipe:x}", "shell command.*allow_pipe"),
        ("nosuch://bucket/", "Protocol not known: nosuch"),
        ("{0..1.tar", "unbalanced|not found"),
    ],
)
def test_patterns_that_give_nothing_are_errors(pattern: str, message: str, tmp_path: Path) -> None:
    """A forgotten shard must not shrink the dataset silently."""
    (tmp_path / "empty").mkdir()
    for i in range(2):
        make_tar(tmp_path / f"{i:05d}.tar", [])
    with pytest.raises(DataError, match=message):
        expand_shards(pattern, tmp_path)


# ---- index -----------------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.lists(st.tuples(st.text("ab.", min_size=1), st.integers(0, 2**40), st.integers(0, 2**40)), max_size=4),
    )
)
def test_index_survives_its_file(content: dict) -> None:
    pairs = [(key, tuple(Member(*member) for member in members)) for key, members in content.items()]
    index = ShardIndex.from_bytes(ShardIndex(pairs).to_bytes((1, 2)))
    assert [(index.key(i), index.members(i)) for i in range(len(index))] == pairs


def test_index_points_at_the_bytes(tmp_path: Path) -> None:
    """Also behind the long-name headers of both tar dialects."""
    members = [("a/b.c/x.jpg", b"1"), ("a/b.c/x.JSON", b"22"), (f"{'n' * 200}.json", b"333"), ("é.txt", b"")]
    for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        tar = make_tar(tmp_path / f"{dialect}.tar", members, format=dialect)
        assert contents(tar) == [
            ("a/b.c/x", {"jpg": b"1", "json": b"22"}),
            ("n" * 200, {"json": b"333"}),
            ("é", {"txt": b""}),
        ]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(st.tuples(st.text("aé/~ ", max_size=4), st.integers(0, 130), st.integers(0, 1100)), max_size=5),
    dialect=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
)
def test_members_lie_where_the_standard_library_finds_them(members: list, dialect: int, tmp_path: Path) -> None:
    if dialect == tarfile.USTAR_FORMAT:  # which has no room for long names and other letters
        members = [(name.replace("é", "e"), min(length, 90), size) for name, length, size in members]
    numbered = [(f"{i}{'n' * length}{name}/{i}.x", bytes([i]) * size) for i, (name, length, size) in enumerate(members)]
    tar = make_tar(tmp_path / "0.tar", numbered, format=dialect)
    with tarfile.open(tar) as file:
        expected = [(info.name.removesuffix(".x"), Member("x", info.offset_data, info.size)) for info in file]
    assert [(key, *found) for key, found in scan_tar(tar)] == expected


def test_count_needs_the_first_bytes_only(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", samples(9))
    assert sample_count(tar) == 9
    index = tmp_path / "0.tar.idx"
    index.write_bytes(index.read_bytes()[:64])
    assert sample_count(tar) == 9
    assert len(load_index(tar)) == 9  # the torn one is built again
    assert index.stat().st_size > 64


def test_stale_index_is_rebuilt(tmp_path: Path) -> None:
    """Same size, other content: the time of change tells."""
    tar = make_tar(tmp_path / "0.tar", samples(3))
    assert sample_count(tar) == 3
    state = tar.stat()
    make_tar(tar, [(name.replace("0001", "0000"), data) for name, data in samples(3)])
    os.utime(tar, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert tar.stat().st_size == state.st_size
    assert sample_count(tar) == 2


def test_index_of_a_read_only_folder_goes_to_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = make_tar(tmp_path / "0.tar", samples(3))
    write = index_module.write_atomically

    def refuse(path: Path, data: bytes) -> None:
        if path.parent == tmp_path:
            raise OSError(errno.EROFS, "Read-only file system")
        write(path, data)

    monkeypatch.setattr(index_module, "write_atomically", refuse)
    assert sample_count(tar) == 3
    assert not (tmp_path / "0.tar.idx").exists()
    monkeypatch.setattr(index_module, "build_index", None)  # from here on the stored one must do
    assert sample_count(tar) == len(load_index(tar)) == 3
    assert len(list(cache.rglob("*.idx"))) == 1


def test_index_that_can_be_stored_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    tar = make_tar(tmp_path / "0.tar", samples(1))
    monkeypatch.setattr(index_module, "write_atomically", refuse)
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        build_index(tar)


def test_many_shards_are_indexed_by_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = [make_tar(tmp_path / f"{i}.tar", samples(i + 1)) for i in range(3)]
    monkeypatch.setattr(index_module, "_MANY", 1)
    assert sample_counts(tars, workers=2) == [1, 2, 3]
    assert all(tar.with_name(f"{tar.name}.idx").exists() for tar in tars)


# ---- broken tars -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["inside the last image", "inside the last record", "in a header", "no end mark"])
def test_torn_tar_gives_the_complete_samples_and_a_warning(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = make_tar(tmp_path / "0.tar", samples(5))
    last = load_index(tar).members(4)
    cut = {
        "inside the last image": last[0].offset + 100,
        "inside the last record": last[1].offset + 100,
        "in a header": last[0].offset - 100,
        "no end mark": last[1].offset - 512,
    }[part]
    os.truncate(tar, cut)
    with caplog.at_level(logging.WARNING):
        found = contents(tar)
    # where nothing shows that sample 3 was complete, it is not trusted
    assert [key for key, _ in found] == [f"{i:04d}" for i in range(3 if part == "in a header" else 4)]
    assert str(tar) in caplog.text
    assert f"{len(found)} complete samples" in caplog.text


def test_garbage_in_the_middle_ends_the_shard_with_its_offset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar = make_tar(tmp_path / "0.tar", samples(5))
    offset = load_index(tar).members(3)[0].offset - 512
    with tar.open("r+b") as file:
        file.seek(offset)
        file.write(b"x" * 512)
    assert [key for key, _ in contents(tar)] == ["0000", "0001"]
    assert f"bad header at byte {offset}" in caplog.text
    assert bad_end(tar, offset) == bad_end(tar, 0) == f"bad header at byte {offset}"
    assert bad_end(make_tar(tmp_path / "1.tar", samples(5)), offset) is None


def test_what_is_no_tar_is_an_error(tmp_path: Path) -> None:
    """HTML saved as .tar, and a compressed tar, which cannot be read at random."""
    page = tmp_path / "0.tar"
    page.write_bytes(b"<html>" * 200)
    packed = tmp_path / "1.tar"
    packed.write_bytes(gzip.compress(make_tar(tmp_path / "2.tar", samples(1)).read_bytes()))
    for tar in (page, packed):
        with pytest.raises(DataError, match=f"{tar.name}: no uncompressed tar"):
            sample_count(tar)
    with pytest.raises(DataError, match=r"3.tar: cannot open"):
        sample_count(tmp_path / "3.tar")


def test_empty_tars_hold_no_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sample_count(make_tar(tmp_path / "0.tar", [])) == 0
    assert not caplog.text
    (tmp_path / "1.tar").touch()
    assert sample_count(tmp_path / "1.tar") == 0
    assert "empty file" in caplog.text


def test_duplicates_are_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.json", b"3"), ("b.json", b"4"), ("a.json", b"5")]
    assert contents(make_tar(tmp_path / "0.tar", members)) == [
        ("a", {"jpg": b"1", "json": b"3"}),
        ("b", {"json": b"4"}),
    ]
    assert "2 keys occur more than once, such as a" in caplog.text


def test_hostile_members_are_only_names(tmp_path: Path) -> None:
    """Nothing is written, followed or unpickled: links and devices are no members, paths are keys."""
    tar = tmp_path / "shards" / "0.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as file:
        for name in ("../../x.json", "/etc/x.json", "a.pkl"):
            info = tarfile.TarInfo(name)
            info.size = 2
            file.addfile(info, io.BytesIO(b"{}"))
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        for kind, name in zip(kinds, ("s.json", "h.json", "c.json", "b.json", "p.json", "f.json"), strict=True):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    assert [key for key, _ in contents(tar)] == ["../../x", "/etc/x", "a"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "0.tar.idx", "shards"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("x.jpg", ("x", "jpg")),
        ("a/b.c/x.0.JPG", ("a/b.c/x", "0.jpg")),
        ("x.y.jpg", ("x", "y.jpg")),
        ("README", None),
        (".hidden", None),
        ("a/.hidden.json", None),
    ],
)
def test_split_name(name: str, parts: tuple | None) -> None:
    assert split_name(name) == parts


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(folder: Path, count: int, per_shard: int) -> list[Path]:
    with ShardWriter(folder, per_shard) as writer:
        for i in range(count):
            writer.write(f"{i:05d}", {"json": b"{}", "0.jpg": b"a" * i, "1.jpg": b"b"})
    return writer.tars


def test_written_shards_read_back(tmp_path: Path) -> None:
    tars = write(tmp_path, 5, 2)
    assert [tar.name for tar in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    assert sample_counts(tars) == [2, 2, 1]
    assert contents(tars[1])[1] == ("00003", {"0.jpg": b"aaa", "1.jpg": b"b", "json": b"{}"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"0000{i}.tar{end}" for i in range(3) for end in ("", ".idx")
    )


def test_written_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    """So that a checksum tells whether two people train on the same shards."""
    first, second = (write(tmp_path / name, 3, 10)[0].read_bytes() for name in "ab")
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_interrupted_writing_leaves_complete_shards_only(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 2) as writer:
        for i in range(3):
            writer.write(str(i), {"json": b"{}"})
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00000.tar.idx"]


def test_no_torch(tmp_path: Path) -> None:
    """Start-up, --help and configuration errors must not wait for it."""
    code = (
        "import sys, pathlib, tinygptv_ds.data.prepare.prepare, tinygptv_ds.data.shards.reader;"
        "import tinygptv_ds.data.stream.mixture;"
        f"writer = tinygptv_ds.data.shards.writer.ShardWriter(pathlib.Path({str(tmp_path)!r}), 1);"
        "writer.write('a', {'json': b'{}'});"
        "sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
