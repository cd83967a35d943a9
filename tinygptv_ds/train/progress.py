"""Where a rank stands, what it does there, and how long that may take."""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from tinygptv_ds.config.schema import TrainSection

START_UP, DATA, COMPUTING = "starting up", "waiting for data", "computing"
IN_STEP = (DATA, COMPUTING)
_STEPS = 64  # that the median is taken over
_MARGIN = 30.0  # seconds that collectives may wait beyond the limits here, so that the watchdog comes first


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself.

    Attributes:
        rank: which.
        host: where it runs.
        pid: of its process there.
        step: the one under way, from 1; 0: none yet.
        phase: what it does.
        moves: phases entered so far; all ranks go through the same ones, so that the others wait for the lowest.
        seconds: since the step began, or the phase where that has a limit of its own.
    """

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = START_UP
    moves: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class AwakeClock:
    """Seconds that this process was running: time in which it was suspended, as by Ctrl-Z, does not count.

    Args:
        longest: seconds between two ticks; more was a suspension.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._suspended = 0.0
        self._ticked = time.monotonic()

    def tick(self) -> None:
        """To be called at short intervals."""
        now = time.monotonic()
        gap, self._ticked = now - self._ticked, now
        if gap > self._longest:
            self._suspended += gap

    def now(self) -> float:
        """On a scale of its own."""
        return time.monotonic() - self._suspended


class Progress:
    """One rank's way through a run: the training tells it, the watchdog reads it from another thread.

    Args:
        rank: which.
        train: the limits.
        clock: what they are measured by.
        set_group_timeout: sets how long collectives may wait.
    """

    def __init__(
        self, rank: int, train: TrainSection, clock: AwakeClock, set_group_timeout: Callable[[timedelta], None]
    ) -> None:
        self._rank, self._host = rank, socket.gethostname()
        self._clock = clock
        self._set_group_timeout = set_group_timeout
        self.long, self.short = limits(train)
        self._first_step: int | None = None
        self._durations: deque[float] = deque(maxlen=_STEPS)
        self._state = (0, START_UP, 0, clock.now())  # step, phase, moves, when its limit began to run; replaced whole

    @property
    def usual(self) -> float:
        """Median seconds of the last steps; 0 where there are none."""
        durations = list(self._durations)
        return statistics.median(durations) if durations else 0.0

    def limit_of(self, phase: str) -> float:
        """Seconds that it may take."""
        return self.short if phase in IN_STEP else self.long

    def beat(self) -> Beat:
        """As of now."""
        step, phase, moves, began = self._state
        return Beat(self._rank, self._host, os.getpid(), step, phase, moves, self._clock.now() - began)

    def begin_step(self, step: int) -> None:
        """A step, counted from 0, begins, with the wait for its data. The first one of a run is part of its start-up."""
        if self._first_step is None:
            self._first_step = step
        if step == self._first_step:
            self._enter(START_UP, step + 1, self._state[3])
            return
        if self._state[1] == COMPUTING:
            self._durations.append(self._clock.now() - self._state[3])
        else:
            self._let_groups_wait(self.short)
        self._enter(DATA, step + 1)

    def computing(self) -> None:
        """The step's data is there."""
        if self._state[1] == DATA:
            self._enter(COMPUTING, began=self._state[3])

    @contextmanager
    def patience(self, phase: str) -> Iterator[None]:
        """What happens inside may take as long as the start-up, and counts to no step. To be entered on all ranks."""
        _, before, _, began = self._state
        entered = self._clock.now()
        self._let_groups_wait(self.long)
        self._enter(phase)
        yield
        self._let_groups_wait(self.limit_of(before))
        self._enter(before, began=began + self._clock.now() - entered)

    def last_phase(self, phase: str) -> None:
        """As `patience`, until the end."""
        self._let_groups_wait(self.long)
        self._enter(phase)

    def _enter(self, phase: str, step: int | None = None, began: float | None = None) -> None:
        before, _, moves, _ = self._state
        self._state = (
            before if step is None else step,
            phase,
            moves + 1,
            self._clock.now() if began is None else began,
        )

    def _let_groups_wait(self, seconds: float) -> None:
        self._set_group_timeout(timedelta(seconds=min(seconds, self.long) + _MARGIN))


def limits(train: TrainSection) -> tuple[float, float]:
    """Seconds that the start-up and what is like it may take, and those of a step."""
    return 60.0 * train.startup_minutes, 60.0 * train.step_minutes or math.inf


def first_group_timeout(train: TrainSection) -> timedelta:
    """How long collectives may wait while a run starts up."""
    return timedelta(seconds=limits(train)[0] + _MARGIN)
