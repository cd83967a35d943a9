"""Clocks: what one rank's time is spent on between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds inside blocks, added up until they are read.

    On a GPU the work of a block is timed there, by events, without waiting for it; call `read` after something that
    has waited. The time of the host, which only launches that work, is kept next to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time a block."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if self._on_gpu else (None, None)
        if begin is not None:
            begin.record()
        start = time.perf_counter()
        yield
        self._host_seconds += time.perf_counter() - start
        if begin is not None and end is not None:
            end.record()
            self._events.append((begin, end))

    def read(self) -> float:
        """Return the seconds since the last call."""
        return self.read_both()[0]

    def read_both(self) -> tuple[float, float]:
        """Return the seconds since the last call, and those of the host: the same without a GPU."""
        host = self._host_seconds
        seconds = sum(begin.elapsed_time(end) / 1000 for begin, end in self._events) if self._on_gpu else host
        self._host_seconds, self._events = 0.0, []
        return seconds, host


class TrainingClock:
    """Seconds of training since the last reading; what happens in a pause does not count."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def restart(self) -> None:
        """Count from now on."""
        self._start = time.perf_counter()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave a block out of the count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> float:
        """Return the seconds since the last call, and restart."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds
