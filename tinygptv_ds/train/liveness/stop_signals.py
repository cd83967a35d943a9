"""Requests to stop: signals, a launcher that has gone, and how all ranks act on them after the same step."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from tinygptv_ds.train.engine import Engine

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# By a word of their command lines: the per-node and the outer process of DeepSpeed's launcher, and torch's two forms.
_LAUNCHERS = ("deepspeed.launcher.launch", "deepspeed", "torch.distributed.run", "torchrun")


class StopSignals:
    """Records SIGTERM and SIGUSR1, which no longer end the process.

    The launcher's end counts as a SIGTERM: DeepSpeed's launcher and torchrun leave their ranks behind when killed.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._launchers = launchers_above()
        self._before = {number: signal.signal(number, self._record) for number in SIGNALS}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._seen.add(number)

    def seen(self) -> list[bool]:
        """Return which of `SIGNALS` have reached this process."""
        if self._launchers and launchers_above() != self._launchers:
            self._seen.add(signal.SIGTERM)
        return [number in self._seen for number in SIGNALS]

    def restore(self) -> None:
        """Let them end the process again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Votes:
    """Requests of the ranks, summed over all of them without waiting for work that is queued on the device.

    Cast before a step and counted after it: by then the sum is long complete.
    """

    def __init__(self, engine: Engine, requests: int) -> None:
        self._engine = engine
        on_gpu = engine.device.type == "cuda"
        # Pinned, so that neither copy waits for the device.
        self._ours, self._sums = (torch.zeros(requests, pin_memory=on_gpu) for _ in range(2))
        self._ready = torch.cuda.Event() if on_gpu else None

    def cast(self, requests: Sequence[bool]) -> None:
        """Add this rank's requests to the sum. Call on all ranks."""
        self._ours.copy_(torch.tensor([float(request) for request in requests]))
        ours = self._ours.to(self._engine.device, non_blocking=True, copy=True)
        self._sums.copy_(self._engine.all_reduce(ours), non_blocking=True)
        if self._ready is not None:
            self._ready.record()

    def count(self) -> list[bool]:
        """Return which requests any rank has made."""
        if self._ready is not None:
            self._ready.synchronize()
        return [bool(total) for total in self._sums.tolist()]


def launchers_above() -> list[int]:
    """Return the processes of the launcher, DeepSpeed's or torchrun, that started this one, the nearest first."""
    return launchers_of(os.getppid())


def launchers_of(pid: int) -> list[int]:
    """Return this process and those above it as long as they are a launcher's."""
    found = []
    while _is_launcher(pid):
        found.append(pid)
        pid = _parent_of(pid)
    return found


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # gone
        return False
    return any(Path(word).name in _LAUNCHERS for word in words)


def _parent_of(pid: int) -> int:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return 0
    return int(after_name.split()[1])
