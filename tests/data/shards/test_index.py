"""The index of a shard: what it holds, where it is stored, and when it is built again."""

import errno
import os
import tarfile
from pathlib import Path

import pytest
from helpers.tars import contents, make_read_only, make_tar, pairs
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.data.shards import index as index_module
from tinygptv_ds.data.shards.index import ShardIndex, build_index, load_index, sample_count, sample_counts
from tinygptv_ds.data.shards.members import Member
from tinygptv_ds.errors import DataError


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


def test_count_needs_the_first_bytes_only(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", pairs(9))
    assert sample_count(tar) == 9
    index = tmp_path / "0.tar.idx"
    index.write_bytes(index.read_bytes()[:64])
    assert sample_count(tar) == 9
    assert len(load_index(tar)) == 9  # the torn one is built again
    assert index.stat().st_size > 64


def test_stale_index_is_rebuilt(tmp_path: Path) -> None:
    """Same size, other content: the time of change tells."""
    tar = make_tar(tmp_path / "0.tar", pairs(3))
    assert sample_count(tar) == 3
    state = tar.stat()
    make_tar(tar, [(name.replace("0001", "0000"), data) for name, data in pairs(3)])
    os.utime(tar, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert tar.stat().st_size == state.st_size
    assert sample_count(tar) == 2


def test_index_of_a_read_only_folder_goes_to_the_cache(
    tmp_path: Path, user_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = make_tar(tmp_path / "0.tar", pairs(3))
    make_read_only(monkeypatch, tmp_path)
    assert sample_count(tar) == 3
    assert not (tmp_path / "0.tar.idx").exists()
    monkeypatch.setattr(index_module, "build_index", None)  # from here on the stored one must do
    assert sample_count(tar) == len(load_index(tar)) == 3
    assert len(list(user_cache.rglob("*.idx"))) == 1


def test_index_that_can_be_stored_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    tar = make_tar(tmp_path / "0.tar", pairs(1))
    monkeypatch.setattr(index_module, "write_atomically", refuse)
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        build_index(tar)


def test_many_shards_are_indexed_by_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = [make_tar(tmp_path / f"{i}.tar", pairs(i + 1)) for i in range(3)]
    monkeypatch.setattr(index_module, "_MANY", 1)
    assert sample_counts(tars, workers=2) == [1, 2, 3]
    assert all(tar.with_name(f"{tar.name}.idx").exists() for tar in tars)
