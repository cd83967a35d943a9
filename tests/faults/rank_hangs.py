"""Faults for `forked.started`: a rank dies or hangs within a step; the ranks themselves import them."""

import ctypes
import itertools
import os
import signal
import threading
import time

from tinygptv_ds.train import step as step_module
from tinygptv_ds.train.liveness import progress, watchdog
from tinygptv_ds.train.run import Run
from tinygptv_ds.weights import assemble

HOWS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "asleep": lambda: time.sleep(1000),
    "holding Python's lock": lambda: ctypes.PyDLL(None).sleep(1000),
    "at work": lambda: any(number < 0 for number in itertools.count()),
    # Python waits for such a thread, for ever.
    "failing": lambda: [].pop() if threading.Thread(target=time.sleep, args=[1000]).start() is None else None,
}


def in_step(at: int, rank: int, how: str, after: float = 0.0) -> None:
    """Let this happen to one rank between the first two micro-batches of step `at`, from 0, after so many seconds."""
    micro_step = step_module.micro_step
    watchdog._WAY_OUT = 2.0
    steps = iter(range(1000))

    def broken(run: Run, *given: object, number: int, count: int) -> object:
        if number == 1 and next(steps) == at and run.ranks.rank == rank:
            time.sleep(after)
            (run.job.run_dir / "reached").touch()
            HOWS[how]()
        return micro_step(run, *given, number=number, count=count)

    step_module.micro_step = broken


def starting_up(how: str) -> None:
    """Let a rank do this where it would load the model."""
    assemble.build_model = lambda *_, **__: HOWS[how]()


def hanging(at: int, rank: int, margin: float) -> None:
    """Let one rank take three seconds for its first step and sleep forever in step `at`.

    Collectives may wait `margin` seconds more than the watchdog allows; what becomes of them is noted.
    """
    micro_step = step_module.micro_step
    progress._MARGIN = margin
    in_step(at, rank, "asleep")
    asleep = step_module.micro_step

    def noted(run: Run, *given: object, number: int, count: int) -> object:
        if run.ranks.rank == rank:
            if run.progress.starting and number == 1:
                time.sleep(3)
            return asleep(run, *given, number=number, count=count)
        try:
            return micro_step(run, *given, number=number, count=count)
        except RuntimeError as error:
            (run.job.run_dir / f"failed-{run.ranks.rank}").write_text(str(error))
            raise

    step_module.micro_step = noted
