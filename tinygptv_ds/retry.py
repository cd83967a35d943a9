"""Local storage, or a network file system, that fails for a moment: more attempts, further and further apart."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tinygptv_ds.errors import DataError

log = logging.getLogger(__name__)
RETRY_SECONDS = (0.1, 1.0, 5.0)
# What another attempt does not change; the rest (EIO, ESTALE, ETIMEDOUT, ENOTCONN, ...) may pass.
_FINAL = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
}
_Result = TypeVar("_Result")


def persist(where: str, action: Callable[[], _Result], again: Callable[[], _Result] | None = None) -> _Result:
    """What `action` returns; it is called up to four times while the system fails it, in about six seconds.

    Args:
        where: what is read, for the log.
        action: may raise OSError, or DataError in consequence of one.
        again: called instead from the second time on.

    Raises:
        OSError, DataError: what `action` raised last, or what another attempt would not change.
    """
    for delay in RETRY_SECONDS:
        try:
            return action()
        except (OSError, DataError) as error:
            if not _may_pass(error):
                raise
            log.warning("%s: %s; next attempt in %g s", where, error, delay)
        time.sleep(delay)
        action = again or action
    return action()


def _may_pass(error: OSError | DataError) -> bool:
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno not in _FINAL
