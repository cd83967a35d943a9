"""Locks, journals and comparisons of settings."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinygptv_ds import files
from tinygptv_ds.files import Journal, LockedError, fingerprint_differences, lock_file, read_journal


def test_a_lock_is_exclusive_and_keeps_the_content(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("content")
    with lock_file(path), pytest.raises(LockedError, match="another process holds"):
        lock_file(path)
    lock_file(path).release()
    assert path.read_text() == "content"


def test_a_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys, time\nfrom tinygptv_ds.files import lock_file\n"
            "lock = lock_file(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(100)",
            str(path),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(LockedError):
        lock_file(path)
    holder.kill()
    holder.wait()
    lock_file(path, wait=True).release()


def test_a_released_lock_is_free_although_a_forked_process_has_the_file_open(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "lock")
    child = os.fork()
    if child == 0:
        time.sleep(100)
        os._exit(0)
    lock.release()
    lock.release()
    lock_file(tmp_path / "lock").release()
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_lock_file_removed_by_its_holder_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock = tmp_path / "lock", files.fcntl.flock

    def removed_first(descriptor: int, how: int) -> None:
        path.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", removed_first)
    with pytest.raises(files.LockRemovedError, match="start again"):
        lock_file(path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with pytest.raises(files.LocksUnsupportedError, match="No locks available"):
        lock_file(tmp_path / "lock")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_syncing_and_permissions(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FUSE and SMB may be; a disk that has failed is still an error."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    files.write_atomically(tmp_path / "index", b"whole")
    assert (tmp_path / "index").read_bytes() == b"whole"
    expected = contextlib.nullcontext() if number != errno.EIO else pytest.raises(OSError, match="Input/output")
    with expected, files.whole_folder(tmp_path / "step-1") as partial:
        (partial / "state").write_bytes(b"whole")
    assert (tmp_path / "step-1/state").exists() == (number != errno.EIO)
    assert not list(tmp_path.glob("*.partial"))


def test_a_journal_drops_a_torn_line_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert list(read_journal(path)) == []
    with Journal(path) as journal:
        journal.append({"text": "ä"}, {"text": "half a character: \ud83d"})
        assert list(read_journal(path)) == [{"text": "ä"}, {"text": "half a character: \ud83d"}]
    assert path.read_bytes().startswith('{"text": "ä"}\n'.encode())
    path.write_bytes(path.read_bytes() + b'{"text": "tor')
    assert len(list(read_journal(path))) == 2
    with Journal(path) as journal:
        journal.append(3)
    assert [json.loads(line) for line in path.read_bytes().splitlines()][2:] == [3]


def test_differences_name_both_values() -> None:
    recorded, current = {"a": 1, "b": None, "c": "x"}, {"a": 1, "c": "ä", "d": [2]}
    assert fingerprint_differences(recorded, recorded) == {}
    assert fingerprint_differences(recorded, current, recorded_in="in the checkpoint") == {
        "c": 'c: "x" in the checkpoint, "ä" here',
        "d": "d: nothing in the checkpoint, [2] here",
    }
