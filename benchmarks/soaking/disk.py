"""The disk of the run directories: a small tmpfs that really fills, or a folder with a stand-in for it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.soaking.inside import FULL

_SIZE = "96m"


class Disk:
    """Where runs are written; a context manager.

    As root it is a tmpfs of its own, so nothing else can run out of room. Elsewhere the ranks are ordered to fail with
    ENOSPC when they write weights.

    Args:
        folder: is created; whatever it holds is removed at the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)]
        self.is_real = os.getuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self, room: int, records: Path) -> None:
        """Leave `room` bytes; `records` is the folder of the ranks' orders."""
        if not self.is_real:
            (records / FULL).touch()
            return
        ballast = self.folder / "ballast"
        with ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
        os.truncate(ballast, max(0, ballast.stat().st_size - room))

    def clear(self, records: Path) -> None:
        """Make room again."""
        (records / FULL).unlink(missing_ok=True)
        (self.folder / "ballast").unlink(missing_ok=True)

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_real:
            subprocess.run(["umount", "-l", str(self.folder)], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
