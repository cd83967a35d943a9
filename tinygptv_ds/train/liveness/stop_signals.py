"""Being told to stop: signals, a launcher that has gone, and how all ranks come to act on it after the same step."""

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
    """Notes SIGTERM and SIGUSR1 instead of dying of them.

    The launcher's end counts as a SIGTERM: DeepSpeed's and torchrun leave their ranks behind when they are killed.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._launchers = launchers_above()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen.add(number)

    def seen(self) -> list[bool]:
        """Which of `SIGNALS` have reached this process."""
        if self._launchers and launchers_above() != self._launchers:
            self._seen.add(signal.SIGTERM)
        return [number in self._seen for number in SIGNALS]

    def restore(self) -> None:
        """Die of them again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Votes:
    """What the ranks wish for, summed over all of them, without waiting for what the device has still to do.

    Cast before a step and counted after it: by then the sum has long been made.
    """

    def __init__(self, engine: Engine, wishes: int) -> None:
        self._engine = engine
        on_gpu = engine.device.type == "cuda"
        # Pinned, so that neither copy waits for the device.
        self._ours, self._sums = (torch.zeros(wishes, pin_memory=on_gpu) for _ in range(2))
        self._made = torch.cuda.Event() if on_gpu else None

    def cast(self, wishes: Sequence[bool]) -> None:
        """This rank's. To be called on all ranks."""
        self._ours.copy_(torch.tensor([float(wish) for wish in wishes]))
        ours = self._ours.to(self._engine.device, non_blocking=True, copy=True)
        self._sums.copy_(self._engine.all_reduce(ours), non_blocking=True)
        if self._made is not None:
            self._made.record()

    def count(self) -> list[bool]:
        """Which wishes any rank has cast."""
        if self._made is not None:
            self._made.synchronize()
        return [bool(total) for total in self._sums.tolist()]


def launchers_above() -> list[int]:
    """The processes of a launcher, DeepSpeed's or torchrun, that this one was started by, the nearest first."""
    return launchers_of(os.getppid())


def launchers_of(pid: int) -> list[int]:
    """This process and those above it, as far as they are a launcher's."""
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
