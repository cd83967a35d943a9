"""What shard patterns name, and those that name nothing."""

from pathlib import Path

import pytest
from helpers.tars import make_tar

from tinygptv_ds.data.shards.patterns import expand_shards
from tinygptv_ds.errors import DataError


def test_expand_braces_wildcards_folders_and_lists(tmp_path: Path) -> None:
    tars = [make_tar(tmp_path / f"{i:05d}.tar", []) for i in range(12)]
    (tmp_path / "00000_stats.json").touch()
    assert expand_shards("{00000..00011}.tar", tmp_path) == tars
    assert expand_shards("0000?.tar", tmp_path) == tars[:10]
    assert expand_shards(".", tmp_path) == tars
    assert expand_shards(str(tmp_path)) == tars
    assert expand_shards(f"file://{tmp_path}") == expand_shards(f"file://{tmp_path}/{{00000..00011}}.tar") == tars
    assert expand_shards(["00003.tar", "{00001,00000}.tar"], tmp_path) == [tars[3], tars[1], tars[0]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{00000..00005}.tar", "00002.tar .and 3 more of 6 named"),
        ("a/*.tar", r"not found: .*a/\*.tar"),
        ("empty", "holds no"),
        ("file://empty", "holds no"),
        ("~nosuchuser/x.tar", "not found: .*/~nosuchuser/x.tar"),
        ("x" * 5000, "not found: .*xxx"),
        ("file:///nonexistent/{0..1}.tar", "not found: /nonexistent/0.tar .and 1 more"),
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
