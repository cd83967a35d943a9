"""Remote shards: URLs through fsspec, and `pipe:` commands whose output is a tar."""

from __future__ import annotations

import errno
import posixpath
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from tinygptv_ds.errors import DataError
from tinygptv_ds.object_storage import NETWORK, explain_failure, hide_password, open_url, wants_credentials

PIPE = "pipe:"
_BLOCK = 1 << 20
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RemoteShard:
    """A tar that has to be fetched. `url` is any that fsspec opens, or ``pipe:COMMAND``."""

    url: str

    def __str__(self) -> str:
        return hide_password(self.url)

    @property
    def is_pipe(self) -> bool:
        """Whether the tar is the output of a command."""
        return self.url.startswith(PIPE)

    @property
    def name(self) -> str:
        """Last part of the URL, or the whole command."""
        return self.url if self.is_pipe else posixpath.basename(self.url.partition("?")[0])


Shard = Path | RemoteShard


def list_shards(url: str) -> list[RemoteShard]:
    """Return the tars of a folder (a URL that ends in ``/``) or of a wildcard, sorted.

    Raises:
        DataError: there are none, or they cannot be listed.
    """
    pattern = url + "*.tar" if url.endswith("/") else url
    shard = RemoteShard(pattern)

    def find() -> list[RemoteShard]:
        files, path = open_url(pattern)
        return [RemoteShard(files.unstrip_protocol(name)) for name in sorted(files.glob(path))]

    found = _retry(shard, find)
    if not found:
        raise DataError(f"shards {shard}: none found; check the URL, or name each with braces: {{00000..00010}}.tar")
    return found


def remote_size(shard: RemoteShard) -> int | None:
    """Return the size of the tar in bytes, or None if only fetching it would show.

    Raises:
        DataError: it does not exist, or cannot be reached.
    """
    if shard.is_pipe:
        return None

    def ask() -> int | None:
        files, path = open_url(shard.url)
        return files.size(path)

    return _retry(shard, ask)


def adjacent_index(shard: RemoteShard, length: int | None = None) -> bytes:
    """Return the index next to the tar, or its first `length` bytes; empty if there is no index."""
    if shard.is_pipe:
        return b""
    path, mark, query = shard.url.partition("?")

    def read() -> bytes:
        files, index = open_url(f"{path}.idx{mark}{query}")
        try:
            return files.cat_file(index, start=length and 0, end=length)[:length]  # a server may ignore ranges
        except (FileNotFoundError, PermissionError):  # S3 refuses missing files if listing is not allowed
            return b""
        except Exception as error:
            if getattr(error, "status", None) in (401, 403, 410, 416):
                return b""
            raise

    return _retry(shard, read)


def download(shard: RemoteShard, to: Path, size: int | None, arrived: Callable[[int], None]) -> None:
    """Fetch the whole tar into the file `to`, with several attempts if the network fails.

    Args:
        shard: which.
        to: written from its beginning by every attempt.
        size: expected size in bytes, if known.
        arrived: called with the number of bytes so far; may raise a DataError to stop the download.

    Raises:
        DataError: it cannot be fetched; names the URL and the remedy.
    """

    def fetch() -> None:
        if shard.is_pipe:
            _run(shard.url.removeprefix(PIPE), to, arrived)
        else:
            _get(shard.url, to, size, arrived)
        length = to.stat().st_size
        if size not in (None, length):
            raise OSError(f"{length} of {size} bytes arrived")

    _retry(shard, fetch)


def _get(url: str, to: Path, size: int | None, arrived: Callable[[int], None]) -> None:
    from fsspec.callbacks import Callback

    files, path = open_url(url)
    if size is None:
        with files.open(path, "rb") as source:
            _copy(source, to, arrived)
    else:  # each file system's own way, the fastest
        callback = Callback(hooks={"arrived": lambda _, value, **__: arrived(value)})
        files.get_file(path, str(to), callback=callback)


def _copy(source: IO[bytes], to: Path, arrived: Callable[[int], None]) -> None:
    """Copy block by block, calling `arrived` before each is written: whether it fits is not known yet."""
    with to.open("wb") as out:
        while block := source.read(_BLOCK):
            arrived(out.tell() + len(block))
            out.write(block)


def _run(command: str, to: Path, arrived: Callable[[int], None]) -> None:
    """Write the output of a shell command; with `pipefail`, ``curl ... | zcat`` fails if curl does."""
    shell = ["bash", "-o", "pipefail", "-c", command]
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        try:
            if process.stdout is not None:
                _copy(process.stdout, to, arrived)
        except BaseException:
            process.kill()
            raise
        if process.wait():
            stderr.seek(0)
            tail = stderr.read().decode(errors="replace").strip()[-500:]
            raise OSError(f"the command ended with exit code {process.returncode}: {tail or 'no message'}")


def _retry(shard: RemoteShard, action: Callable[[], _Result]) -> _Result:
    """Return what `action` returns, repeated where the failure may pass.

    Raises:
        DataError: names the shard, the failure and its remedy.
    """
    try:
        return NETWORK.call(shard, action)
    except DataError:
        raise
    except Exception as error:  # each file system has its own kinds
        raise DataError(f"{shard}: {_explained(shard, error)}") from error


def _explained(shard: RemoteShard, error: Exception) -> str:
    """Return what went wrong, with the remedy."""
    if isinstance(error, FileNotFoundError):
        return "not found; check the URL (that of a folder ends in /), or narrow the pattern to existing files"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk of the cache is full; lower data.cache_gb, or set data.cache_dir to another disk"
    known = isinstance(error, ImportError) or wants_credentials(error)
    return explain_failure(shard.url, error) if known else f"cannot be fetched: {explain_failure(shard.url, error)}"
