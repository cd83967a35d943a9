"""Errors that a user can fix, by kind. The command line prints their message alone and exits with code 2."""

import errno
from typing import Any

_OF_THE_DISK = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions, or choose another place",
    errno.ESTALE: "the network file system has lost it; start again",
    errno.EIO: "the disk or its connection has failed (dmesg); choose another place",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another file system",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs of this machine",
}
_SHARED_MEMORY = " (perhaps /dev/shm, which dataloader workers need; --set data.num_workers=0 does without)"
# Locks and queues of processes name no file.
_OF_SHARED_MEMORY = {
    errno.ENOSPC: " (perhaps /dev/shm, of which Docker gives 64 MB: --shm-size=8g)",
    errno.EROFS: _SHARED_MEMORY,
    errno.EACCES: _SHARED_MEMORY,
}
SHOWN = 60  # characters of a value in a message


class TinyGPTVError(Exception):
    """An error that the user has to fix. The message names what is wrong, where, and the remedy."""


class ConfigError(TinyGPTVError):
    """A recipe, a DeepSpeed JSON or a command line that is invalid."""


class DataError(TinyGPTVError):
    """A dataset, shard or sample that is missing or unreadable."""


class WeightsError(TinyGPTVError):
    """Weights that are missing, of the wrong shape, or only partly recognised."""


class CheckpointError(TinyGPTVError):
    """A training checkpoint that is incomplete, altered, or of another run."""


class ObjectStorageError(TinyGPTVError):
    """A URL that cannot be read or written, or a folder there that is damaged."""


class Stopped(Exception):
    """The end of a run that a signal has stopped, and that can be resumed from what it has saved.

    Attributes:
        code: the exit code, 128 + the signal's number: 143 after SIGTERM, 138 after SIGUSR1.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number


class Finished(Exception):
    """The end of a command whose result is there already; exit code 0."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def disk_problem(error: BaseException) -> str | None:
    """Return the message about an error of the file system that a user can fix; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _OF_THE_DISK:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    place = _OF_SHARED_MEMORY.get(error.errno, "") if error.filename is None else ""
    return f"{where}{error.strerror}{place}; {_OF_THE_DISK[error.errno]}, then start the same command again"


def shown(value: Any) -> str:
    """Return a value for a message, shortened if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of more digits than Python converts
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
