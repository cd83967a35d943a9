"""A rank that dies or stands still within a step: to be given to `forked.started`, and imported by the ranks."""

import ctypes
import os
import signal
import time

from tinygptv_ds.train.engine import Engine

HOWS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "asleep": lambda: time.sleep(1000),
    "holding Python's lock": lambda: ctypes.PyDLL(None).sleep(1000),
    "failing": lambda: [].pop(),
}


def in_step(at: int, rank: int, how: str) -> None:
    """Between the first two micro-batches of step `at`, from 0, this happens to one rank, and it is noted when."""
    micro_step = Engine.micro_step
    steps = iter(range(1000))

    def broken(engine: Engine, *given: object, number: int, count: int) -> object:
        if number == 1 and next(steps) == at and engine.job.ranks.rank == rank:
            (engine.job.run_dir / "reached").touch()
            HOWS[how]()
        return micro_step(engine, *given, number=number, count=count)

    Engine.micro_step = broken
