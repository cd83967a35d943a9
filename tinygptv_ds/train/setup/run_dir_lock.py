"""The lock of a run directory: one job at a time."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import FileLock, LockedError, LocksUnsupportedError, lock_file
from tinygptv_ds.log import LOGGER

LOCK = "lock.json"


def lock_run_dir(run_dir: Path) -> FileLock | None:
    """Take the run directory for this process, until it ends in whatever way.

    Returns:
        The lock; None on a file system without locks, which is logged.

    Raises:
        ConfigError: another job holds it; names that job, since when, and what to do about a lock that was left over.
    """
    path = run_dir / LOCK
    try:
        lock = lock_file(path)
    except LockedError:
        raise ConfigError(_in_use(run_dir, path)) from None
    except LocksUnsupportedError:
        LOGGER.warning("%s is on a file system without locks: nothing keeps a second job out of it", run_dir)
        lock = None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be locked ({error.strerror}); remove it, or choose another --run-dir"
        ) from None
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    try:
        path.write_text(json.dumps(holder) + "\n", encoding="utf-8")
    except OSError as error:  # the lock holds without it, and only the message of a second job lacks its holder
        LOGGER.warning("%s could not be written (%s)", path, error.strerror)
    return lock


def _in_use(run_dir: Path, path: Path) -> str:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        host, holder = held["host"], f"process {held['pid']} on {held['host']} since {held['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        host, holder = socket.gethostname(), "another process"
    message = f"{run_dir} is in use by another job ({holder}); let it end, or choose another --run-dir"
    if host != socket.gethostname():
        message += (
            f". If {host} has crashed, its lock may have stayed behind on a network file system: check that the job is "
            f"gone, then remove {path}"
        )
    return message
