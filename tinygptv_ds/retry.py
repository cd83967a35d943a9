"""Retries of what may fail for a moment: storage, network file systems and servers, with growing pauses."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tinygptv_ds.errors import DataError

log = logging.getLogger(__name__)
# Another attempt does not change these; the others (EIO, ESTALE, ETIMEDOUT, ENOTCONN, ...) may pass.
_FINAL = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
}
_Result = TypeVar("_Result")


@dataclass
class RetryPolicy:
    """How often a failing call is repeated, and after which errors.

    Attributes:
        delays: seconds to wait before the second attempt, the third, and so on.
        may_pass: whether another attempt may succeed after this error; any other error is raised at once.
        log_level: level of the log line that each failed attempt gets.
    """

    delays: tuple[float, ...]
    may_pass: Callable[[Exception], bool]
    log_level: int = logging.WARNING

    def call(self, where: object, action: Callable[[], _Result], again: Callable[[], _Result] | None = None) -> _Result:
        """Return what `action` returns, repeating it while it fails with an error that may pass.

        Args:
            where: the file or URL that is read, for the log.
            action: called without arguments.
            again: called instead of `action` from the second attempt on.

        Raises:
            Exception: the error of the last attempt, or one that another attempt would not change.
        """
        for delay in self.delays:
            try:
                return action()
            except Exception as error:
                if not self.may_pass(error):
                    raise
                log.log(self.log_level, "%s: %s: %s; next attempt in %g s", where, type(error).__name__, error, delay)
            time.sleep(delay)
            action = again or action
        return action()


def _storage_may_recover(error: Exception) -> bool:
    """Return whether an OSError, or the cause of a DataError, is of a kind that may be temporary."""
    cause = error.__cause__ if isinstance(error, DataError) else error
    return isinstance(cause, OSError) and cause.errno not in _FINAL


STORAGE = RetryPolicy(delays=(0.1, 1.0, 5.0), may_pass=_storage_may_recover)
"""For local storage and mounted network file systems: four attempts in about six seconds."""
