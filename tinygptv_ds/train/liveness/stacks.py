"""The stacks of all threads of a rank and of its dataloader workers, written to a file when something hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.processes import status_of
from tinygptv_ds.train.liveness.flight_recorder import write_flight_record
from tinygptv_ds.train.liveness.stack_files import COLLECTIVES, FOLDER, STACKS

SIGNAL = signal.SIGUSR2
_PER_PROCESS = 0.1  # seconds for one process to write before the next gets the signal


class Stacks:
    """One rank's file of stacks below the run directory; removed at the end if nothing was written.

    SIGUSR2 to the rank, or to a dataloader worker of it, adds that process's stacks at any time. SIGTSTP, as Ctrl-Z and
    SLURM's suspension send it, suspends the process after disarming it: the time until it continues would otherwise
    count, and end it. Raises ConfigError if the file cannot be written, e.g. because a file has the folder's name.
    Made and closed by the main thread.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.path = run_dir / FOLDER / f"{STACKS}{rank}.txt"
        self._collectives = self.path.with_name(f"{COLLECTIVES}{rank}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written ({error.strerror}); make room, or move {self.path.parent} away"
            ) from None
        # Processes that are forked later inherit it, e.g. dataloader workers.
        faulthandler.register(SIGNAL, self._file, all_threads=True)
        self._may_arm = True
        self._on_suspension = signal.getsignal(signal.SIGTSTP)
        if self._on_suspension is not signal.SIG_IGN:
            signal.signal(signal.SIGTSTP, self._suspend)

    def dump(self, why: str) -> None:
        """Add the stacks of this process's threads, then those of its dataloader workers, and write the collectives."""
        self._write(f"{why}; process {os.getpid()}")
        faulthandler.dump_traceback(self._file, all_threads=True)
        self.dump_workers(multiprocessing.active_children(), why)
        write_flight_record(self._collectives)

    def dump_workers(self, workers: Iterable[BaseProcess], why: str) -> None:
        """Add the stacks of dataloader workers."""
        for worker in workers:
            if worker.pid is None:  # not started
                continue
            state = status_of(worker.pid)
            if int(state.get("SigCgt", "0"), 16) >> (SIGNAL - 1) & 1:  # it would die of the signal otherwise
                self._write(f"{why}; dataloader worker {worker.pid}, state {state.get('State', 'unknown')}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, SIGNAL)
                time.sleep(_PER_PROCESS)

    def arm(self, seconds: float, *, leave: bool) -> None:
        """Write this process's stacks, and end it if `leave`, unless armed again within `seconds`.

        This needs no Python to run: it also works where code that never returns holds the interpreter's lock.
        """
        faulthandler.dump_traceback_later(seconds, file=self._file, exit=leave)
        if not self._may_arm:  # the main thread is in `_suspend`; no lock, which a forked process might inherit locked
            faulthandler.cancel_dump_traceback_later()

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        self._may_arm = False
        faulthandler.cancel_dump_traceback_later()
        os.kill(os.getpid(), signal.SIGSTOP)  # returns when the process continues; the watchdog arms it again
        self._may_arm = True

    def close(self) -> None:
        """Disarm, and remove the file if it is empty."""
        signal.signal(signal.SIGTSTP, self._on_suspension)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(SIGNAL)
        with contextlib.suppress(OSError):  # a dry run has removed it already, other ranks still have theirs
            if not os.fstat(self._file.fileno()).st_size:
                self.path.unlink()
                self.path.parent.rmdir()
        self._file.close()

    def _write(self, line: str) -> None:
        os.write(self._file.fileno(), f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())
