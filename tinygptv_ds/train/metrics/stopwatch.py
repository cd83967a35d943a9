"""Clocks: what one rank's time is spent on between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds inside blocks, added up until they are read.

    On a GPU the work of a block is timed there, by events, without waiting for it; call `read` after something that
    has waited.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time a block."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def read(self) -> float:
        """Return the seconds since the last call."""
        seconds = self._seconds + sum(begin.elapsed_time(end) / 1000 for begin, end in self._events)
        self._seconds, self._events = 0.0, []
        return seconds


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
