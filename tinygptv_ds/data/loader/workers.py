"""Dataloader workers that may be killed or hang: the loss is reported where its batch is awaited, to be replaced there.

The private corners of torch's DataLoader are used in this file only.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tinygptv_ds.console import print_to_stderr
from tinygptv_ds.processes import signal_at_end_of_parent

_POLL_SECONDS = 1.0  # how often the processes are checked while a batch is awaited
_DYING_SECONDS = 2.0  # within which a process closes its files if one of its batches could not be received,
_ENDING_SECONDS = 10.0  # and within which it is dead after that
_USUAL_CAUSES: dict[int, str] = {
    signal.SIGKILL: ", most often by the system because memory ran out (see dmesg)",
    signal.SIGBUS: ", most often because /dev/shm is full (docker run --shm-size), or a file it maps is unreadable",
}
_UNSENT = 74  # exit code: EX_IOERR of sysexits.h

OnHang = Callable[[Sequence[BaseProcess], str], None]


class WorkersLostError(Exception):
    """A dataloader worker was killed or hung, and its pool has been killed. The message names it and the cause."""


class Workers:
    """The items of `dataset` at `places`, one after the other, loaded by a pool of processes or by this process.

    Args:
        dataset: maps a place to a batch.
        places: in the order of the batches; read ahead.
        num_workers: processes; 0 loads here.
        pin_memory: whether batches come in pinned memory, for a GPU.
        read_seconds: time limit of one batch; 0: none. There is none without processes.
        on_hang: called with all processes, and the reason, before those of a pool that hangs are killed.
    """

    def __init__(
        self,
        dataset: Dataset,
        places: Iterable[Any],
        *,
        num_workers: int,
        pin_memory: bool,
        read_seconds: float = 0.0,
        on_hang: OnHang | None = None,
    ) -> None:
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            sampler=places,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_live_and_die_with_parent if num_workers else None,
            timeout=_POLL_SECONDS if num_workers else 0,
        )
        self._read_seconds, self._on_hang = read_seconds, on_hang
        self._taken = 0
        before = signal.getsignal(signal.SIGCHLD)
        self._batches: Any = iter(loader)
        # Remove when DataLoader replaces lost workers, or at least gives access to its processes.
        self._processes: list[BaseProcess] = list(getattr(self._batches, "_workers", ()))
        # At Python's exit they would be sent SIGTERM, which they ignore, and be waited for.
        # Bound to this object: the registry would otherwise keep every pool's processes, and their files, to the end.
        Finalize(self, _kill, (self._processes,), exitpriority=0)
        # torch's handler would raise the loss of a process anywhere in the main thread, in a collective for example.
        # Remove when DataLoader reports a lost worker only where its batch is awaited.
        if threading.current_thread() is threading.main_thread():
            is_torchs = getattr(before, "__module__", None) == "torch.utils.data._utils.signal_handling"
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if is_torchs or before is None else before)

    def next(self) -> Any:
        """Return the next batch.

        Raises:
            WorkersLostError: a process was killed, or exceeded the time limit.
        """
        began = time.monotonic()
        while True:
            try:
                batch = next(self._batches)
            except Exception as error:
                timed_out = str(error).startswith("DataLoader timed out")
                # If a batch cannot be received, its process may be about to die.
                dying = wait([process.sentinel for process in self._processes], 0 if timed_out else _DYING_SECONDS)
                for process in self._processes:
                    if process.sentinel in dying:  # its files are closed, which happens shortly before its end
                        process.join(_ENDING_SECONDS)
                dead = [number for number, process in enumerate(self._processes) if not process.is_alive()]
                if dead:
                    message = f"{self._describe(dead[0])} {_how_it_ended(self._processes[dead[0]])}"
                    raise self._lost(message) from error
                if not timed_out:
                    raise
                if self._read_seconds and time.monotonic() - began > self._read_seconds:
                    raise self._hung() from None
            else:
                self._taken += 1
                return batch

    def _hung(self) -> WorkersLostError:
        number = self._taken % len(self._processes)  # they take turns
        message = f"{self._describe(number)} has given nothing for {self._read_seconds:g} s (data.read_timeout_seconds)"
        if self._on_hang is not None:
            self._on_hang(self._processes, message)
        return self._lost(message)

    def _lost(self, message: str) -> WorkersLostError:
        """Kill what is left of the pool; a separate thread cleans up, because that may have to wait forever."""
        _kill(self._processes)
        threading.Thread(target=self._batches._shutdown_workers, daemon=True).start()
        return WorkersLostError(message)

    def _describe(self, number: int) -> str:
        return f"dataloader worker {number + 1} of {len(self._processes)} (process {self._processes[number].pid})"


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _how_it_ended(process: BaseProcess) -> str:
    code = process.exitcode
    if code == _UNSENT:
        return "could not hand over a batch (see above), most often because /dev/shm is full (docker run --shm-size=8g)"
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}{_USUAL_CAUSES.get(-code, '')}"


def _live_and_die_with_parent(worker: int) -> None:
    """Ignore signals to stop, and end with the parent, however that ends.

    A signal to stop goes to the whole process tree, and the step in progress still needs its batches: the parent
    decides when to stop.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)  # else the rank's handler, which disarms its watchdog
    signal_at_end_of_parent(signal.SIGKILL)
    # What a queue does where its thread cannot send an item; by itself it prints a traceback and drops the item.
    Queue._on_queue_feeder_error = staticmethod(_end_with_unsent)  # type: ignore[attr-defined]


def _end_with_unsent(error: Exception, item: object) -> None:
    """End this worker, whose batch cannot be sent: training would wait for it until `data.read_timeout_seconds`."""
    print_to_stderr(f"dataloader worker (process {os.getpid()}): {error}")
    os._exit(_UNSENT)
