"""Tasks spread over processes that leave with their parent."""

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from tinygptv_ds.errors import DataError, TinyGPTVError

Task = TypeVar("Task")
Tick = Callable[[int], object]
_TICK_SECONDS = 0.2


def run_tasks(function: Callable[[Task, Tick], None], tasks: Iterable[Task], workers: int, tick: Tick) -> None:
    """Call ``function(task, tick)`` for every task, in up to `workers` processes, which get a task only when idle.

    `tick` is called here, with the numbers that the function gave its own. A single task, or a single worker, needs no
    further process. An error in a worker is raised here; a killed one raises DataError.
    """
    rest = iter(tasks)
    first = list(islice(rest, 1 if workers == 1 else 2))
    many = len(first) > 1
    tasks = chain(_emptied(first), rest)
    if many:
        _in_processes(function, tasks, workers, tick)
    else:
        for task in tasks:
            function(task, tick)


def _emptied(items: list[Task]) -> Iterator[Task]:
    while items:
        yield items.pop(0)


def _in_processes(function: Callable[[Task, Tick], None], tasks: Iterable[Task], workers: int, tick: Tick) -> None:
    idle: list[_Worker] = []
    busy: dict[Connection, _Worker] = {}

    def collect() -> None:
        for pipe in wait(list(busy)):
            done = busy[pipe].receive()
            if done is None:
                idle.append(busy.pop(pipe))
            else:
                tick(done)

    try:
        for task in tasks:
            while not idle and len(busy) == workers:
                collect()
            worker = idle.pop() if idle else _Worker(function)
            busy[worker.pipe] = worker
            worker.send(task)
        while busy:
            collect()
    finally:
        for worker in (*idle, *busy.values()):
            worker.end()


class _Worker:
    """A process that works off the tasks sent to it, one after the other."""

    def __init__(self, function: Callable[[Task, Tick], None]) -> None:
        context = multiprocessing.get_context("spawn")  # the caller may have threads or a device open
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        resource_tracker.ensure_running()  # or start() does so, and unblocks
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is the parent's business
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the pipe ends with the process

    def send(self, task: object) -> None:
        try:
            self.pipe.send(task)
        except OSError:
            raise self._died() from None

    def receive(self) -> int | None:
        """How much has been done since, None at the end of the task."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(message, Exception):
            raise message
        return message

    def end(self) -> None:
        """Stop it, whatever it is at."""
        self._process.terminate()
        self._process.join()
        self.pipe.close()

    def _died(self) -> DataError:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        return DataError(
            f"a worker process {how}; most often memory has run out: use fewer --workers. Finished shards are kept, "
            f"the same command goes on from them"
        )


def _serve(pipe: Connection, function: Callable[[object, Tick], None]) -> None:
    """The worker's side. It ends where the pipe does: when its parent has no more use for it, or is gone."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            ticks = _Ticks(pipe)
            try:
                function(task, ticks)
                ticks.flush()
            except TinyGPTVError as error:
                pipe.send(error)
            except Exception:
                pipe.send(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            else:
                pipe.send(None)


class _Ticks:
    """What is done, sent a few times a second only."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._count, self._last = pipe, 0, time.monotonic()

    def __call__(self, number: int) -> None:
        self._count += number
        if time.monotonic() - self._last > _TICK_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._pipe.send(self._count)
        self._count, self._last = 0, time.monotonic()
