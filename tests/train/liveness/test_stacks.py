"""The file of a rank's stacks: where the run directory is in the way, and while the rank is suspended."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.forked import apart
from helpers.patience import PATIENCE

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.processes import is_suspended
from tinygptv_ds.train.liveness.stacks import Stacks
from tinygptv_ds.train.liveness.suspension import Suspension


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); make room, or move .*/stacks away"):
        Stacks(tmp_path, 0)
    assert (tmp_path / "stacks").read_text() == "mine"


def suspended(folder: Path) -> tuple[int, int]:
    """Return the status of a process that is suspended for longer than it may be silent, and the size of its stacks."""
    child = os.fork()
    if child == 0:
        os._exit(asyncio.run(_is_watched(folder)))
    until = time.monotonic() + PATIENCE
    while not (folder / "ready").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(child, signal.SIGTSTP)
    while not is_suspended(child) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(1.5)
    os.kill(child, signal.SIGCONT)
    (folder / "stacks/go").touch()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), (folder / "stacks/rank-0.txt").stat().st_size


async def _is_watched(folder: Path) -> int:
    stacks = Stacks(folder, 0)
    Suspension(stacks.disarm).listen(asyncio.get_running_loop())
    stacks.arm(1.0, leave=True)
    (folder / "ready").touch()
    while not (folder / "stacks/go").exists():
        await asyncio.sleep(0.01)
    return 7


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_suspended_process_continues(tmp_path: Path) -> None:
    """Its time asleep is no silence, which would end it as it continues."""
    assert apart(suspended, tmp_path) == (7, 0)
