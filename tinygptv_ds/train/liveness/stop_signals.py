"""Requests to stop: signals, a launcher that has gone, and how all ranks act on them after the same step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from types import FrameType

import torch

from tinygptv_ds.processes import own_rank
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.liveness.launchers import AS_SIGTERM, Launchers

# In this order: Ctrl-C comes with the SIGTERM of a launcher that has got it, too.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_AGAIN = 1.0  # seconds after which a second Ctrl-C is one, and not the first on its way through a launcher
_ON_CTRL_C = b"\nCtrl-C: saving after this step or the next; press it again to end at once, unsaved\n"


class StopSignals:
    """Records SIGINT, SIGTERM and SIGUSR1, which no longer end the process; a second Ctrl-C still does.

    Three more count as a SIGTERM: SIGHUP, of a terminal or an ssh connection that is gone, SIGXCPU, of a limit on CPU
    time that is about to end the process, and the launcher's end, since DeepSpeed's launcher and torchrun leave their
    ranks behind when killed.

    Args:
        launchers: those above this process when it began.
    """

    def __init__(self, launchers: Launchers) -> None:
        self._seen: set[int] = set()
        self._launchers = launchers
        self._interrupted: float | None = None
        # by nohup, or in the background of a script
        may_be = (signal.SIGINT, *AS_SIGTERM)
        ignored = [number for number in may_be if signal.getsignal(number) is signal.SIG_IGN]
        numbers = [number for number in (*SIGNALS, *AS_SIGTERM) if number not in ignored]
        self._before = {number: signal.signal(number, self._record) for number in numbers}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._seen.add(signal.SIGTERM if number in AS_SIGTERM else number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
                if own_rank() == 0 and not self._launchers.front:  # else that has said so
                    os.write(2, _ON_CTRL_C)
            elif now - self._interrupted > _AGAIN:
                os._exit(128 + signal.SIGINT)

    def seen(self) -> list[bool]:
        """Return which of `SIGNALS` have reached this process."""
        if self._launchers.gone():
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
