"""The step and phase of a rank, and how long they may take."""

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

from tinygptv_ds.config.train_section import TrainSection

START_UP, DATA, PREPARING, FORWARD, BACKWARD, REPORTING = (
    "starting up",
    "waiting for data",
    "preparing the step",
    "in a forward pass",
    "in a backward pass or a step of the optimizer",
    "reporting",
)
_STEPS = 64  # the median is taken over as many
_MARGIN = 30.0  # seconds that collectives may wait beyond the limits here, so that the watchdog comes first


@dataclass(frozen=True)
class RankStatus:
    """What a rank reports of itself.

    Attributes:
        rank: its number.
        host: where it runs.
        pid: of its process there.
        step: the current one, from 1; 0: none yet.
        phase: what it is doing.
        phases: entered so far; all ranks go through the same ones, so that the others wait for the lowest.
        patient: whether it may take long, as a start-up, a save or a validation may.
        seconds: since the step began, or the phase where that is patient.
        idle: seconds since it last used a CPU core for a good part of a check's interval.
    """

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = START_UP
    phases: int = 0
    patient: bool = True
    seconds: float = 0.0
    idle: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class AwakeClock:
    """Seconds that this process was running; time in which it was suspended, e.g. by Ctrl-Z, does not count.

    Args:
        longest: seconds between two ticks; a longer gap was a suspension.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._suspended = 0.0
        self._ticked = time.monotonic()

    def tick(self) -> None:
        """Check for a suspension; call at short intervals."""
        now = time.monotonic()
        gap, self._ticked = now - self._ticked, now
        if gap > self._longest:
            self._suspended += gap

    def now(self) -> float:
        """Return the seconds on this clock's own scale."""
        return time.monotonic() - self._suspended


class Progress:
    """One rank's step and phase, set by the training and read by the watchdog from another thread.

    Args:
        rank: its number.
        train: the limits.
        set_group_timeout: sets how long collectives may wait.
        clock: measures the phases.

    Attributes:
        starting: until the second step begins.
    """

    def __init__(
        self,
        rank: int,
        train: TrainSection,
        set_group_timeout: Callable[[timedelta], None],
        clock: AwakeClock | None = None,
    ) -> None:
        self._rank, self._host = rank, socket.gethostname()
        self._set_group_timeout = set_group_timeout
        self._clock = clock or AwakeClock(math.inf)
        self._long, self._short = _limits(train)
        self.starting = True
        self._first_step: int | None = None
        self._durations: deque[float] = deque(maxlen=_STEPS)
        # step, phase, phases entered, patient, when its limit began: replaced as a whole, for the other thread
        self._state = (0, START_UP, 0, True, self._clock.now())
        self._used, self._worked_at = time.process_time(), self._clock.now()

    def note_work(self, least: float) -> None:
        """Note whether this process has used at least so many seconds of CPU since the last call; for the watchdog."""
        before, self._used = self._used, time.process_time()
        if self._used - before >= least:
            self._worked_at = self._clock.now()

    @property
    def usual(self) -> float:
        """Return the median seconds of the last steps; 0 if there are none."""
        durations = list(self._durations)
        return statistics.median(durations) if durations else 0.0

    def limit(self, *, patient: bool) -> float:
        """Return the seconds that a phase may take."""
        return self._long if patient else self._short

    def status(self) -> RankStatus:
        """Return the present status."""
        step, phase, phases, patient, began = self._state
        now = self._clock.now()
        idle = now - self._worked_at
        return RankStatus(self._rank, self._host, os.getpid(), step, phase, phases, patient, now - began, idle)

    def begin_step(self, step: int) -> None:
        """Begin a step, counted from 0, with the wait for its data; a run's first one is part of its start-up."""
        now = self._clock.now()
        _, _, phases, patient, began = self._state
        if self._first_step is None:
            self._first_step = step
        elif not patient:
            self._durations.append(now - began)
        if step == self._first_step:
            self._state = (step + 1, DATA, phases + 1, True, began)
            return
        if self.starting:
            self.starting = False
            self._set_group_timeout_for(patient=False)
        self._state = (step + 1, DATA, phases + 1, False, now)

    def enter(self, phase: str) -> None:
        """Enter the next phase of the current step."""
        step, _, phases, patient, began = self._state
        self._state = (step, phase, phases + 1, patient, began)

    @contextmanager
    def patience(self, phase: str) -> Iterator[None]:
        """Let a block take as long as the start-up, outside the time of steps. Enter on all ranks."""
        _, before, _, patient, began = self._state
        entered = self._clock.now()
        self.last_phase(phase)
        yield
        self._set_group_timeout_for(patient=patient)
        step, _, phases, _, _ = self._state
        self._state = (step, before, phases + 1, patient, began + self._clock.now() - entered)

    def last_phase(self, phase: str) -> None:
        """Enter a phase that lasts to the end, as `patience` does for a block."""
        self._set_group_timeout_for(patient=True)
        step, _, phases, _, _ = self._state
        self._state = (step, phase, phases + 1, True, self._clock.now())

    def _set_group_timeout_for(self, *, patient: bool) -> None:
        self._set_group_timeout(timedelta(seconds=min(self.limit(patient=patient), self._long) + _MARGIN))


def first_group_timeout(train: TrainSection) -> timedelta:
    """Return how long collectives may wait while a run starts up."""
    return timedelta(seconds=_limits(train)[0] + _MARGIN)


def _limits(train: TrainSection) -> tuple[float, float]:
    """Return the seconds that a patient phase, such as the start-up, and a step may take."""
    return 60.0 * train.startup_minutes, 60.0 * train.step_minutes or math.inf
