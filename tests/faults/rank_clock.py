"""A fault for `forked.started`: the clock is set back; the ranks themselves import it."""

import time

from tinygptv_ds.train import loop
from tinygptv_ds.train.run import Run

HOUR = 3600.0


def set_back(at: int) -> None:
    """Set the clock that Python's programs read back by an hour in step `at`, from 0, and again in the next."""
    optimizer_step, clock = loop.optimizer_step, time.time

    def noted(training: Run, step: int, *rest: object) -> None:
        if step >= at:
            time.time = lambda: clock() - (1 + min(step - at, 1)) * HOUR
        optimizer_step(training, step, *rest)

    loop.optimizer_step = noted
