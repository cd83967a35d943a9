"""A pool of worker processes that leave with their parent: `concurrent.futures` with the few guarantees it lacks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType
from typing import ParamSpec, TypeVar

from tinygptv_ds.errors import DataError, TinyGPTVError

Task = TypeVar("Task")
Result = TypeVar("Result")
Params = ParamSpec("Params")
Tick = Callable[[int], object]
_CONTEXT = multiprocessing.get_context("spawn")  # the caller may have threads or a device open
_TICK_SECONDS = 0.2
_counter: Synchronized[int]  # in a worker of `run_tasks`: what all workers have done


class WorkerPool(ProcessPoolExecutor):
    """A `ProcessPoolExecutor` of spawned processes, to be used in a `with` block.

    The workers end as soon as the parent does, even if it is killed, and as soon as an exception leaves the block. They
    never see Ctrl-C, which is for the parent to handle.

    Args:
        workers: the most processes; each is started when there is work for it.
        remedy: what to do when a worker is killed; it ends the message of the DataError that the block raises then.
        initializer: called with `initargs` at the start of each worker.
    """

    def __init__(
        self, workers: int, *, remedy: str, initializer: Callable[..., object] | None = None, initargs: tuple = ()
    ) -> None:
        leash, self._parent_end = _CONTEXT.Pipe(duplex=False)
        super().__init__(workers, _CONTEXT, _start_worker, (leash, initializer, initargs))
        self._remedy = remedy
        self._other_children = set(multiprocessing.active_children())
        self._workers: set[BaseProcess] = set()

    def submit(self, fn: Callable[Params, Result], /, *args: Params.args, **kwargs: Params.kwargs) -> Future[Result]:
        """Schedule a call; the worker that this may start inherits a mask that blocks Ctrl-C."""
        resource_tracker.ensure_running()  # or starting a process does so, and unblocks the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._workers.update(set(multiprocessing.active_children()) - self._other_children)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the workers, or stop them if an exception leaves the block.

        Raises:
            DataError: a worker was killed.
        """
        if kind is not None:
            self._parent_end.close()
        self.shutdown(cancel_futures=True)
        self._parent_end.close()
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                f"a worker process {self._how_one_ended()}; most often memory has run out: {self._remedy}"
            ) from error

    def _how_one_ended(self) -> str:
        codes = [worker.exitcode or 0 for worker in self._workers]
        # The pool terminates the other workers when one has died.
        code = next((code for code in codes if code not in (0, -signal.SIGTERM)), -signal.SIGTERM)
        return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"


def _start_worker(leash: Connection, initializer: Callable[..., object] | None, initargs: tuple) -> None:
    def follow_parent() -> None:
        leash.poll(None)  # returns when the parent closes its end or has ended
        os._exit(0)

    threading.Thread(target=follow_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def run_tasks(
    function: Callable[[Task, Tick], None], tasks: Iterable[Task], workers: int, tick: Tick, *, remedy: str
) -> None:
    """Call ``function(task, tick)`` for every task, in up to `workers` processes.

    A task is drawn from `tasks` only when a worker is free for it. A single task, or a single worker, needs no further
    process. `tick` is called in this process, with the numbers that the function passes to its own.

    Raises:
        TinyGPTVError: as raised by the function.
        RuntimeError: any other error in a worker, with its traceback.
        DataError: a worker was killed; the message ends with `remedy`.
    """
    rest = iter(tasks)
    first = list(islice(rest, 1 if workers == 1 else 2))
    several = len(first) > 1
    tasks = chain(_emptied(first), rest)
    if several:
        _run_in_workers(function, tasks, workers, tick, remedy)
    else:
        for task in tasks:
            function(task, tick)


def _emptied(items: list[Task]) -> Iterator[Task]:
    """Yield the items without keeping them in memory."""
    while items:
        yield items.pop(0)


def _run_in_workers(
    function: Callable[[Task, Tick], None], tasks: Iterable[Task], workers: int, tick: Tick, remedy: str
) -> None:
    counter = _CONTEXT.Value("q", 0)
    reported = 0
    busy: set[Future[None]] = set()

    def collect() -> None:
        nonlocal busy, reported
        finished, busy = wait(busy, _TICK_SECONDS, FIRST_COMPLETED)
        done = counter.value
        if done > reported:
            tick(done - reported)
            reported = done
        for future in finished:
            future.result()

    with WorkerPool(workers, remedy=remedy, initializer=_set_counter, initargs=(counter,)) as pool:
        for task in tasks:
            while len(busy) == workers:
                collect()
            busy.add(pool.submit(partial(_work, function), task))
        while busy:
            collect()


def _set_counter(counter: Synchronized[int]) -> None:
    global _counter
    _counter = counter


def _work(function: Callable[[Task, Tick], None], task: Task) -> None:
    try:
        function(task, _count)
    except TinyGPTVError:
        raise
    except Exception:
        # Not the error itself, which may not survive pickling.
        raise RuntimeError(f"in a worker process:\n{traceback.format_exc()}") from None


def _count(number: int) -> None:
    with _counter.get_lock():
        _counter.value += number
