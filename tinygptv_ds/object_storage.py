"""Object storage and servers through fsspec: URLs, retries, what a failure means, and folders kept as a whole."""

from __future__ import annotations

import errno
import json
import logging
import os
import posixpath
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tinygptv_ds.errors import DataError, ObjectStorageError
from tinygptv_ds.files import sha256, whole_folder
from tinygptv_ds.retry import RetryPolicy

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MANIFEST = "manifest.json"
_CONNECT_SECONDS, _SILENT_SECONDS = 30, 60  # a server that sends nothing for so long has failed
_TRY_AGAIN = (408, 425, 429)  # those of HTTP's 4xx errors that may pass
_Result = TypeVar("_Result")


def open_url(url: str) -> tuple[AbstractFileSystem, str]:
    """Return (file system, path in it); fsspec keeps one file system per process."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # The default limit is 5 minutes for a whole file.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)
        options = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
    if url.startswith("file://"):  # other stores have no folders, and asked for one, they may make a bucket
        options = {"auto_mkdir": True}
    return url_to_fs(url, **options)


def hide_password(url: str) -> str:
    """Return a URL for a log."""
    return re.sub(r"://[^/@]*@", "://***@", url)


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return not 400 <= status < 500 or status in _TRY_AGAIN
    final = (
        *(DataError, ImportError, ValueError),
        *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError),
    )
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return not (isinstance(error, final) or full or wants_credentials(error))


NETWORK = RetryPolicy(delays=(1.0, 4.0, 16.0), may_pass=_may_pass, log_level=logging.INFO)
"""For servers and object storage: four attempts in about 20 seconds."""


def wants_credentials(error: Exception) -> bool:
    """Return whether access was refused."""
    refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
    return refused or "Credentials" in type(error).__name__  # botocore's and google's


def explain_failure(url: str, error: Exception) -> str:
    """Return what went wrong with a URL, with the remedy where there is one."""
    protocol = url.partition("://")[0]
    if isinstance(error, ImportError):
        return f"{error}; {protocol}:// needs a package: pip install {_package(protocol)}"
    if wants_credentials(error):
        return (
            f"access refused ({error}); give the credentials as this storage's own tools take them, or by "
            f"FSSPEC_{protocol.upper()}_... variables and ~/.config/fsspec"
        )
    return f"{type(error).__name__}: {error}"


def _package(protocol: str) -> str:
    from fsspec.registry import known_implementations

    package = known_implementations.get(protocol, {"class": ""})["class"].partition(".")[0]
    return "'fsspec[http]'" if package == "fsspec" else package or f"fsspec[{protocol}]"


class RemoteFolders:
    """Folders of files under a URL, each whole or not there at all.

    A folder's files are written first, and then `manifest.json` with their sizes and SHA-256. One without a manifest,
    as an upload that was cut short leaves it, does not exist. Every request is repeated while its failure may pass.

    Args:
        url: any that fsspec can write to, without a slash at its end.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return hide_password(self.url)

    def check_writable(self) -> None:
        """Write one small object, and remove it.

        Raises:
            ObjectStorageError: that failed; names the URL and the remedy.
        """
        name = f".writable-{uuid.uuid4().hex}"

        def probe() -> None:
            files, root = open_url(self.url)
            path = posixpath.join(root, name)
            files.pipe_file(path, b"tinygptv")
            files.rm_file(path)

        self._call(name, probe)

    def names(self, parent: str, *, complete: bool = True) -> list[str]:
        """Return the sorted names of the folders in `parent` that are there; with `complete=False` of the others."""

        def listing() -> list[str]:
            files, root = open_url(self.url)
            files.invalidate_cache()
            try:
                found = [str(entry["name"]) for entry in files.ls(posixpath.join(root, parent), detail=True)]
            except FileNotFoundError:
                return []
            is_whole = {path: files.exists(posixpath.join(path, MANIFEST)) for path in found}
            return sorted(posixpath.basename(path.rstrip("/")) for path in found if is_whole[path] == complete)

        return self._call(parent, listing)

    def read(self, folder: str, file: str) -> bytes:
        """Return the content of one small file.

        Raises:
            ObjectStorageError: it cannot be read.
        """

        def cat() -> bytes:
            files, root = open_url(self.url)
            return files.cat_file(posixpath.join(root, folder, file))

        return self._call(f"{folder}/{file}", cat)

    def put(self, local: Path, folder: str) -> None:
        """Copy a local folder there, where it replaces one of this name; it may take as long as the network does.

        Raises:
            ObjectStorageError: it could not be copied; then it does not exist there.
            OSError: the local folder cannot be read.
        """
        paths = sorted(path for path in local.rglob("*") if path.is_file())
        if not paths:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(local))
        noted = {str(path.relative_to(local)): {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths}
        manifest = json.dumps({"files": noted}, indent=1).encode()
        if self._has(folder, manifest):
            return
        self.remove(folder)
        for name, entry in noted.items():
            self._put_file(local / name, f"{folder}/{name}", int(str(entry["size"])))

        def write_manifest() -> None:
            files, root = open_url(self.url)
            files.pipe_file(posixpath.join(root, folder, MANIFEST), manifest)

        self._call(f"{folder}/{MANIFEST}", write_manifest)

    def get(self, folder: str, out: Path) -> None:
        """Fetch a folder as a whole, every file checked; a local one of this name is replaced.

        Raises:
            ObjectStorageError: it cannot be fetched, or a file is not what was written.
            OSError: it cannot be written here.
        """
        try:
            noted = json.loads(self.read(folder, MANIFEST))["files"]
            entries = [(str(name), int(entry["size"]), str(entry["sha256"])) for name, entry in noted.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ObjectStorageError(f"{self}/{folder}/{MANIFEST} is damaged ({error})") from None
        with whole_folder(out) as partial:
            for name, size, digest in entries:
                target = partial / name
                if not target.resolve().is_relative_to(partial.resolve()):
                    raise ObjectStorageError(f"{self}/{folder}/{MANIFEST} names {name!r}, which leaves the folder")
                target.parent.mkdir(parents=True, exist_ok=True)
                self._get_file(f"{folder}/{name}", target)
                if target.stat().st_size != size or sha256(target) != digest:
                    raise ObjectStorageError(f"{self}/{folder}/{name} is not what its manifest says: it is damaged")

    def remove(self, folder: str) -> None:
        """Remove a folder, its manifest first; it may be missing or incomplete."""

        def remove() -> None:
            files, root = open_url(self.url)
            files.invalidate_cache()
            path = posixpath.join(root, folder)
            if files.exists(posixpath.join(path, MANIFEST)):
                files.rm_file(posixpath.join(path, MANIFEST))
            if files.exists(path):
                files.rm(path, recursive=True)

        self._call(folder, remove)

    def _has(self, folder: str, manifest: bytes) -> bool:
        def has() -> bool:
            files, root = open_url(self.url)
            path = posixpath.join(root, folder, MANIFEST)
            files.invalidate_cache()
            return bool(files.exists(path)) and files.cat_file(path) == manifest

        return self._call(f"{folder}/{MANIFEST}", has)

    def _put_file(self, local: Path, name: str, size: int) -> None:
        def put() -> None:
            files, root = open_url(self.url)
            path = posixpath.join(root, name)
            files.put_file(str(local), path)
            files.invalidate_cache()
            written = files.size(path)
            if written != size:
                raise ConnectionError(f"{written} of {size} bytes arrived")

        self._call(name, put)

    def _get_file(self, name: str, to: Path) -> None:
        def get() -> None:
            files, root = open_url(self.url)
            files.get_file(posixpath.join(root, name), str(to))

        self._call(name, get)

    def _call(self, name: str, action: Callable[[], _Result]) -> _Result:
        try:
            return NETWORK.call(f"{self}/{name}", action)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the disk here, with its own remedy
                raise
            raise ObjectStorageError(f"{self}/{name}: {explain_failure(self.url, error)}") from error
        except Exception as error:  # each file system has its own kinds
            raise ObjectStorageError(f"{self}/{name}: {explain_failure(self.url, error)}") from error
