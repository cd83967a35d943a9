"""Folders in object storage are whole or not there, whatever happens to an upload."""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tinygptv_ds import object_storage
from tinygptv_ds.errors import ObjectStorageError
from tinygptv_ds.object_storage import MANIFEST, RemoteFolders

EIO = OSError(errno.EIO, "Input/output error")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage.NETWORK, "delays", (0.0, 0.0))


@pytest.fixture(params=["memory", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteFolders:
    where = "memory://bucket" if request.param == "memory" else tmp_path.as_uri()
    return RemoteFolders(f"{where}/{tmp_path.name}/mirror/")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "ranks").mkdir(parents=True)
    for name, content in (("a.bin", b"a" * 5000), ("ranks/b.bin", b"b" * 3000), ("c.json", b"{}")):
        (made / name).write_bytes(content)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[..., Any]) -> None:
    """Let `act(original, *args)` take the place of a method of both file systems."""
    for kind in (MemoryFileSystem, fsspec.get_filesystem_class("file")):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, _original=original, **more: act(_original, *args, **more))


def test_there_and_back(remote: RemoteFolders, folder: Path, tmp_path: Path) -> None:
    remote.check_writable()
    assert remote.names("") == remote.names("checkpoints") == []
    remote.put(folder, "checkpoints/one")
    remote.put(folder, "checkpoints/two")
    assert remote.names("checkpoints") == ["one", "two"]
    assert remote.read("checkpoints/one", "c.json") == b"{}"
    remote.get("checkpoints/one", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    remote.remove("checkpoints/one")
    remote.remove("checkpoints/none")
    assert remote.names("checkpoints") == ["two"] and remote.names("checkpoints", complete=False) == []


def test_an_upload_that_fails_half_way(remote: RemoteFolders, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not exist; nor does what was there under its name before. The next attempt replaces the rest of it."""
    remote.put(folder, "x/one")
    (folder / "a.bin").write_bytes(b"A" * 5000)

    def second_fails(original: Callable, self: Any, local: str, path: str, **more: Any) -> None:
        if path.endswith("c.json"):
            raise EIO
        original(self, local, path, **more)

    with monkeypatch.context() as patch:
        failing(patch, "put_file", second_fails)
        with pytest.raises(ObjectStorageError, match=r"x/one/c.json: OSError: .*Input/output error"):
            remote.put(folder, "x/one")
        assert remote.names("x") == [] and remote.names("x", complete=False) == ["one"]
    remote.put(folder, "x/one")
    assert remote.names("x") == ["one"]


def test_a_torn_upload_is_noticed(remote: RemoteFolders, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that keeps half of a file without an error gets it again, and then no manifest."""
    calls = []

    def half(original: Callable, self: Any, local: str, path: str, **more: Any) -> None:
        calls.append(path)
        self.pipe_file(path, Path(local).read_bytes()[:100])

    failing(monkeypatch, "put_file", half)
    with pytest.raises(ObjectStorageError, match=r"a.bin: ConnectionError: 100 of 5000 bytes arrived"):
        remote.put(folder, "one")
    assert len(calls) == 3 and remote.names("") == []


def test_failures_that_pass(remote: RemoteFolders, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = set()

    def first_time(original: Callable, self: Any, *args: Any, **more: Any) -> Any:
        if args not in failed:
            failed.add(args)
            raise EIO
        return original(self, *args, **more)

    for name in ("put_file", "pipe_file", "get_file", "cat_file"):
        failing(monkeypatch, name, first_time)
    remote.put(folder, "one")
    remote.get("one", folder.with_name("back"))
    assert contents(folder.with_name("back")) == contents(folder) and len(failed) > 6


def test_what_is_equal_is_not_copied_again(
    remote: RemoteFolders, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.put(folder, "one")
    failing(monkeypatch, "put_file", lambda *_, **__: pytest.fail("copied again"))
    remote.put(folder, "one")
    assert remote.names("") == ["one"]


@pytest.mark.parametrize("how", ["flipped", "missing", "manifest", "escaping"])
def test_damage_there(how: str, remote: RemoteFolders, folder: Path, tmp_path: Path) -> None:
    """Nothing gets the name that was asked for, and nothing is left over."""
    remote.put(folder, "one")
    files, root = fsspec.core.url_to_fs(f"{remote.url}/one")
    manifest = json.loads(files.cat_file(f"{root}/{MANIFEST}"))
    if how == "flipped":
        files.pipe_file(f"{root}/a.bin", b"a" * 4999 + b"b")
    elif how == "missing":
        files.rm_file(f"{root}/a.bin")
    elif how == "manifest":
        files.pipe_file(f"{root}/{MANIFEST}", b'{"files": {"a.bin": 3}}')
    else:
        manifest["files"] = {"../../a.bin": manifest["files"]["a.bin"]}
        files.pipe_file(f"{root}/{MANIFEST}", json.dumps(manifest).encode())
    with pytest.raises(
        ObjectStorageError, match=r"is not what|not found|No such file|FileNotFound|is damaged|leaves the folder"
    ):
        remote.get("one", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.partial").exists()


def test_what_can_be_done_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ObjectStorageError, match="s3:// needs a package: pip install s3fs"):
        RemoteFolders("s3://user:secret@bucket/run").check_writable()
    with pytest.raises(ObjectStorageError, match=r"s3://\*\*\*@bucket/run") as caught:
        RemoteFolders("s3://user:secret@bucket/run").check_writable()
    assert "secret" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(ObjectStorageError, match="file/run"):
        RemoteFolders(f"{tmp_path.as_uri()}/file/run").check_writable()

    def refused(original: Callable, *args: Any, **more: Any) -> None:
        raise PermissionError(errno.EACCES, "Access Denied")

    failing(monkeypatch, "pipe_file", refused)
    with pytest.raises(ObjectStorageError, match=r"access refused .* give the credentials"):
        RemoteFolders("memory://refused").check_writable()
