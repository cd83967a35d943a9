"""One job at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.log import LOGGER

LOCK = "lock.json"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock_run_dir(run_dir: Path) -> int:
    """Take the run directory for this process, until it ends in whatever way.

    Returns:
        The file descriptor that holds the lock; closing it gives the lock back.

    Raises:
        ConfigError: another job holds it; says which, since when, and what to do about a lock that was left behind.
    """
    path = run_dir / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(_in_use(run_dir, path)) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        LOGGER.warning("%s lies on a file system without locks: nothing keeps a second job out of it", run_dir)
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    told = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
    os.truncate(handle, 0)
    os.pwrite(handle, told.encode() + b"\n", 0)
    return handle


def _in_use(run_dir: Path, path: Path) -> str:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        host, who = held["host"], f"process {held['pid']} on {held['host']} since {held['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        host, who = socket.gethostname(), "another process"
    message = f"{run_dir} is in use by another job ({who}); let it end, or choose another --run-dir"
    if host != socket.gethostname():
        message += (
            f". If {host} has crashed, its lock may have stayed behind on a network file system: see that the job is "
            f"gone, then remove {path}"
        )
    return message
