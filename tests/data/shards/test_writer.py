"""The bytes of written shards, and what is left of an interrupted one."""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.patience import PATIENCE
from helpers.tars import contents

from tinygptv_ds.data.shards.index import sample_counts
from tinygptv_ds.data.shards.writer import ShardWriter


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
    """A checksum shows whether two people train on the same shards."""
    first, second = (write(tmp_path / name, 3, 10)[0].read_bytes() for name in "ab")
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert {(m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0o444, 0, 0, "", "")}


def test_written_bytes_never_change(tmp_path: Path) -> None:
    """Pinned across versions of Python and webdataset, for long names, other letters and meta members, too."""
    with ShardWriter(tmp_path) as writer:
        for key in ("plain", "d" * 60 + "/" + "e" * 70, "é/图像"):
            writer.write(key, {"json": b"{}", "_meta": b"m", "1.jpg": b"b" * 513, "0.jpg": b"a" * 20_000})
    digest = hashlib.sha256(writer.tars[0].read_bytes()).hexdigest()
    assert digest == "fa759994a757c8f3992463984a5448787a18f74e1d53ee95f6f4838c71bee529"


def test_interrupted_writing_leaves_complete_shards_only(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 2) as writer:
        for i in range(3):
            writer.write(str(i), {"json": b"{}"})
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00000.tar.idx"]


def test_torch_is_imported_by_the_first_sample_at_the_earliest() -> None:
    """Start-up, --help and configuration errors must not wait for torch, nor for webdataset, which imports it."""
    code = (
        "import sys, tinygptv_ds.data.prepare.prepare, tinygptv_ds.data.shards.reader;"
        "import tinygptv_ds.data.shards.writer, tinygptv_ds.data.stream.mixture;"
        "sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=PATIENCE).returncode == 0
