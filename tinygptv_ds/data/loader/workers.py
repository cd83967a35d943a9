"""Dataloader workers that may be killed or hang: what happened is told, so that others can begin at the same place.

The private corners of torch's DataLoader are kept here.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader, Dataset

log = logging.getLogger(__name__)
_SET_PARENT_DEATH_SIGNAL = 1  # Linux, PR_SET_PDEATHSIG
_POLL_SECONDS = 1.0  # after which a batch that has not come makes us look at the processes
_DYING_SECONDS = 2.0  # that a process may take to close its files where a batch of it could not be received,
_ENDING_SECONDS = 10.0  # and to be dead after that
_USUAL_REASONS = {
    signal.SIGKILL: ", most often by the system for want of memory (dmesg tells)",
    signal.SIGBUS: ", most often because /dev/shm is full (docker run --shm-size), or a file that it maps unreadable",
}

Stuck = Callable[[Sequence[BaseProcess], str], None]


class WorkersLostError(Exception):
    """A dataloader worker was killed or hung; none of its pool is left. The message says which, and what to look at."""


class Workers:
    """What `dataset` gives for `places`, one after the other, from processes, or from this one where there are none.

    Args:
        dataset: from a place to a batch.
        places: in the order of the batches; read ahead.
        num_workers: processes; 0: none.
        pin_memory: for a GPU.
        read_seconds: a batch may take at most; 0: no limit. Without processes there is none.
        stuck: called with all processes, and why, before those of a pool that hangs are killed.
    """

    def __init__(
        self,
        dataset: Dataset,
        places: Iterable[Any],
        *,
        num_workers: int,
        pin_memory: bool,
        read_seconds: float = 0.0,
        stuck: Stuck | None = None,
    ) -> None:
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=places,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_live_and_die_with_parent if num_workers else None,
            timeout=_POLL_SECONDS if num_workers else 0,
        )
        self._read_seconds, self._stuck = read_seconds, stuck
        self._taken = 0
        before = signal.getsignal(signal.SIGCHLD)
        self._batches = iter(loader)
        self._processes: list[BaseProcess] = list(getattr(self._batches, "_workers", ()))
        # At Python's exit they would be sent SIGTERM, which they ignore, and be waited for.
        Finalize(None, _kill, (self._processes,), exitpriority=0)
        # torch's handler would raise the loss of a process anywhere in the main thread, in a collective for example.
        if threading.current_thread() is threading.main_thread():
            torchs = getattr(before, "__module__", None) == "torch.utils.data._utils.signal_handling"
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs or before is None else before)

    def next(self) -> Any:
        """The next batch.

        Raises:
            WorkersLostError: a process was killed, or gave nothing for too long.
        """
        began = time.monotonic()
        while True:
            try:
                batch = next(self._batches)
            except Exception as error:
                too_late = str(error).startswith("DataLoader timed out")
                # Where a batch cannot be received, its process may be about to die.
                dying = wait([process.sentinel for process in self._processes], 0 if too_late else _DYING_SECONDS)
                for process in self._processes:
                    if process.sentinel in dying:  # its files are closed, which comes a moment before its end
                        process.join(_ENDING_SECONDS)
                dead = [number for number, process in enumerate(self._processes) if not process.is_alive()]
                if dead:
                    raise self._lost(f"{self._named(dead[0])} {_ending(self._processes[dead[0]])}") from error
                if not too_late:
                    raise
                if self._read_seconds and time.monotonic() - began > self._read_seconds:
                    raise self._hung() from None
            else:
                self._taken += 1
                return batch

    def _hung(self) -> WorkersLostError:
        number = self._taken % len(self._processes)  # they take turns
        said = f"{self._named(number)} has given nothing for {self._read_seconds:g} s (data.read_timeout_seconds)"
        if self._stuck is not None:
            self._stuck(self._processes, said)
        return self._lost(said)

    def _lost(self, said: str) -> WorkersLostError:
        """Kill what is left of the pool, and let a thread of its own tidy up, which may have to wait for ever."""
        _kill(self._processes)
        threading.Thread(target=self._batches._shutdown_workers, daemon=True).start()
        return WorkersLostError(said)

    def _named(self, number: int) -> str:
        return f"dataloader worker {number + 1} of {len(self._processes)} (process {self._processes[number].pid})"


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}{_USUAL_REASONS.get(-code, '')}"


def _live_and_die_with_parent(worker: int) -> None:
    """A signal to stop goes to the whole process tree: the step under way needs its batch, so the parent decides.

    In return the worker ends at once with its parent, however that ends.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
