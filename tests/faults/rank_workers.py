"""Faults for `forked.started`: dataloader workers die or hang, storage fails; the ranks themselves import them."""

import itertools
import os
import signal
import time
from pathlib import Path

from rank_faults import watched

from tinygptv_ds import retry as storage
from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.loader.dataset import MicroBatches

HOWS = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "hanging": lambda: time.sleep(1000)}


def broken_workers(how: str, at: int, times: int, marks: str, rank: int = 0) -> None:
    """Let this happen so many times to the dataloader worker that makes step `at` of a rank, and note its steps."""
    make = MicroBatches.__getitem__

    def broken(self: MicroBatches, place: tuple[int, int]) -> MicroBatch:
        if place == (at, 1) and os.environ["RANK"] == str(rank) and len(list(Path(marks).iterdir())) < times:
            (Path(marks) / str(os.getpid())).touch()
            HOWS[how]()
        return make(self, place)

    MicroBatches.__getitem__ = broken
    watched()


def failing_reads(share: int, number: int, seconds: float = 0.0, dataset: str = "") -> None:
    """Let one in `share` reads of a dataset's shards fail with error `number`, and all take so many seconds."""
    pread, calls = os.pread, itertools.count(1)
    storage.STORAGE.delays = (0.01, 0.02, 0.03)

    def faulty(file: int, size: int, offset: int) -> bytes:
        time.sleep(seconds)
        path = Path(f"/proc/self/fd/{file}").readlink()
        if path.suffix == ".tar" and path.parent.name.startswith(dataset) and next(calls) % share == 0:
            raise OSError(number, os.strerror(number))
        return pread(file, size, offset)

    os.pread = faulty
    watched()
