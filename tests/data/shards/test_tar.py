"""Scanning tars: whole ones, broken ones, and members that are no files."""

import gzip
import io
import logging
import os
import tarfile
from pathlib import Path

import pytest
from helpers.tars import contents, make_tar, pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygptv_ds.data.shards.grouping import split_name
from tinygptv_ds.data.shards.index import load_index, sample_count
from tinygptv_ds.data.shards.members import Member
from tinygptv_ds.data.shards.tar import bad_end, scan_tar
from tinygptv_ds.errors import DataError


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


@pytest.mark.parametrize("part", ["inside the last image", "inside the last record", "in a header", "no end mark"])
def test_torn_tar_gives_the_complete_samples_and_a_warning(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tar = make_tar(tmp_path / "0.tar", pairs(5))
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
    tar = make_tar(tmp_path / "0.tar", pairs(5))
    offset = load_index(tar).members(3)[0].offset - 512
    with tar.open("r+b") as file:
        file.seek(offset)
        file.write(b"x" * 512)
    assert [key for key, _ in contents(tar)] == ["0000", "0001"]
    assert f"bad header at byte {offset}" in caplog.text
    assert bad_end(tar, offset) == bad_end(tar, 0) == f"bad header at byte {offset}"
    assert bad_end(make_tar(tmp_path / "1.tar", pairs(5)), offset) is None


def test_what_is_no_tar_is_an_error(tmp_path: Path) -> None:
    """HTML saved as .tar, and a compressed tar, which cannot be read at random."""
    page = tmp_path / "0.tar"
    page.write_bytes(b"<html>" * 200)
    packed = tmp_path / "1.tar"
    packed.write_bytes(gzip.compress(make_tar(tmp_path / "2.tar", pairs(1)).read_bytes()))
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
