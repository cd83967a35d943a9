"""The verb `index`: every tar gets its index, and what prevents that is named."""

from pathlib import Path

import pytest
from helpers import verbs
from helpers.tars import make_read_only, make_tar

from tinygptv_ds.data.shards import index as index_module
from tinygptv_ds.data.shards import make_indexes
from tinygptv_ds.data.shards.index import sample_count
from tinygptv_ds.errors import ConfigError, DataError


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Write three tars, of no sample, of one and of two."""
    return [make_tar(tmp_path / f"{n}.tar", [(f"{i}.json", b"") for i in range(n)]) for n in range(3)]


@pytest.mark.parametrize("pattern", ["", "*.tar", "{0..2}.tar"])
def test_every_tar_gets_an_index(
    pattern: str, tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs.call(make_indexes, tmp_path / pattern)
    assert "3 shards with 3 samples" in capsys.readouterr().out
    monkeypatch.setattr(index_module, "build_index", None)
    assert [sample_count(tar) for tar in tars] == [0, 1, 2]
    verbs.call(make_indexes, tmp_path / pattern)  # what has one is left alone


def test_what_cannot_be_done(tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="made where the tars are files"):
        verbs.call(make_indexes, "https://host/{0..3}.tar")
    with pytest.raises(DataError, match=r"3\.tar"):
        verbs.call(make_indexes, tmp_path / "{0..3}.tar")
    with pytest.raises(ConfigError, match="--workers"):
        verbs.call(make_indexes, tmp_path, "--workers", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_read_only(monkeypatch, tmp_path)
    with pytest.raises(DataError, match=r"0\.tar and 2 more: their folder cannot be written"):
        verbs.call(make_indexes, tmp_path)
