"""Dataloader workers that are lost, seen from the process that they load for."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.patience import PATIENCE
from torch.utils.data import Dataset

from tinygptv_ds.data.loader.workers import Workers, WorkersLostError


class Unsent:
    """What a worker cannot hand over, as a batch where /dev/shm is full."""

    def __reduce__(self) -> tuple[object, ...]:
        raise RuntimeError("unable to allocate shared memory(shm)")


class Numbers(Dataset):
    """Gives what it is asked for; some numbers are too much for it."""

    def __getitem__(self, number: int) -> int | Unsent:
        if number == 4:
            return Unsent()
        if number == 1:
            time.sleep(0.5)  # the number before it is on its way
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 2:
            raise RuntimeError("two is no good")
        if number == 3:
            os._exit(7)
        return number


def workers(*numbers: int) -> Workers:
    return Workers(Numbers(), numbers, num_workers=1, pin_memory=False)


def test_a_lost_worker_is_reported_when_its_batch_is_requested() -> None:
    """And nowhere else: torch's own handler would break off whatever is going on, a collective too."""
    pool = workers(0, 1)
    assert pool.next() == 0
    (process,) = pool._processes
    until = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    with pytest.raises(WorkersLostError, match=r"dataloader worker 1 of 1 \(process \d+\) was killed by SIGKILL, most"):
        pool.next()


def test_an_exit_is_a_loss() -> None:
    with pytest.raises(WorkersLostError, match="ended with exit code 7"):
        workers(3).next()


def test_a_batch_that_cannot_be_handed_over_is_a_loss(capfd: pytest.CaptureFixture[str]) -> None:
    """Python prints a traceback and drops it, and training would wait for it until a time-out."""
    with pytest.raises(WorkersLostError, match=r"could not hand over a batch .*/dev/shm is full"):
        workers(4, 0).next()
    assert capfd.readouterr().err.endswith(": unable to allocate shared memory(shm)\n")


def test_an_error_is_no_loss() -> None:
    """A bug would come again with any process."""
    pool = workers(2, 0)
    with pytest.raises(RuntimeError, match="two is no good"):
        pool.next()
    assert pool.next() == 0


def test_python_ends_while_a_pool_waits() -> None:
    """The processes ignore SIGTERM, by which Python would end them."""
    leave = "import test_workers; pool = test_workers.workers(0, 0); pool.next()"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*Path(__file__).parents[:1], *Path(__file__).parents[2:4]])),
    }
    with subprocess.Popen([sys.executable, "-c", leave], env=env, start_new_session=True) as process:
        try:
            assert process.wait(PATIENCE) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
