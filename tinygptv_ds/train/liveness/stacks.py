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

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.processes import status_of
from tinygptv_ds.train.liveness.flight_recorder import write_flight_record
from tinygptv_ds.train.liveness.stack_files import COLLECTIVES, FOLDER, STACKS

SIGNAL = signal.SIGUSR2
_PER_PROCESS = 0.1  # seconds for one process to write before the next gets the signal


class Stacks:
    """One rank's file of stacks below the run directory; removed at the end if nothing was written.

    SIGUSR2 to the rank, or to a dataloader worker of it, adds that process's stacks at any time. Raises ConfigError if
    the file cannot be written, e.g. because a file has the folder's name.
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

    def disarm(self) -> None:
        """Write nothing until armed again."""
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Disarm, and remove the file if it is empty."""
        self.disarm()
        faulthandler.unregister(SIGNAL)
        with contextlib.suppress(OSError):  # a dry run has removed it already, other ranks still have theirs
            if not os.fstat(self._file.fileno()).st_size:
                self.path.unlink()
                self.path.parent.rmdir()
        self._file.close()

    def _write(self, line: str) -> None:
        os.write(self._file.fileno(), f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())
