"""Ranks of a stage without the launcher, forked from one process that has imported everything: seconds, not tens."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers.patience import PATIENCE
from helpers.written import Written
from tinygptv_ds.cli import run_command

ROOT = Path(__file__).parents[2]
CPU = ROOT / "ds_configs/cpu.json"
_PRELOADED = "helpers.forked_imports"
_FORKS = multiprocessing.get_context("forkserver")
assert find_spec(_PRELOADED), "the fork server would pass over a name that it cannot import"
_FORKS.set_forkserver_preload([_PRELOADED])


def fork_context() -> ForkServerContext:
    """Return the context of processes that are forked from one that has imported everything, and start that one.

    Python 3.11 does not hand on the path of modules to it.
    """
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before])
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = before
    return _FORKS


@dataclass(frozen=True)
class Ranks(Written):
    """The ranks of a run: their processes, what they print, and where they write."""

    processes: list[BaseProcess]
    output_file: Path
    folder: Path

    @property
    def output(self) -> str:
        """What all ranks have printed so far."""
        return self.output_file.read_text(errors="replace")

    def tell(self, rank: int, number: int) -> None:
        """Send a rank a signal, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)

    def end(self, timeout: float = PATIENCE) -> list[int]:
        """Wait for the ranks; their exit codes."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, f"{len(late)} rank(s) did not end in {timeout:.0f} s:\n{self.output}"
        return [process.exitcode for process in self.processes]

    def wait_for(self, path: Path, timeout: float = PATIENCE) -> None:
        """Until a file is there."""
        until = time.monotonic() + timeout
        while not path.exists():
            alive = any(process.is_alive() for process in self.processes)
            assert alive and time.monotonic() < until, f"no {path}:\n{self.output}"
            time.sleep(0.005)


@contextmanager
def started(
    recipe: Path, folder: Path, *options: str, script: str = "stages/stage4.py", **given: Any
) -> Iterator[Ranks]:
    """Ranks of a stage under way; whatever is left of them at the end is killed.

    Args:
        recipe: its YAML.
        folder: the run directory.
        options: further options of the stage.
        script: the stage's, or one with the same options.
        given: as for `launched`:
        ranks: how many.
        fault: called in each rank before it begins, to break something.
        fault_args: keyword arguments of `fault`.
    """
    argv = ["--recipe", str(recipe), "--run-dir", str(folder), "--deepspeed_config", str(CPU), *options]
    with launched(script, argv, folder, **given) as run:
        yield run


@contextmanager
def launched(
    script: str,
    argv: Sequence[str],
    folder: Path,
    *,
    ranks: int = 1,
    fault: Callable[..., None] | None = None,
    **fault_args: Any,
) -> Iterator[Ranks]:
    """As `started`, the ranks of any script of ours that has a `main`; `folder` is where they write."""
    context = fork_context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output_file = folder.with_name(f"{folder.name}-{time.monotonic_ns()}.txt")
    output_file.touch()
    shared = (ranks, port, output_file, script, argv, fault, fault_args)
    processes = [context.Process(target=_rank, args=(rank, *shared)) for rank in range(ranks)]
    for process in processes:
        process.start()
    run = Ranks(processes, output_file, folder)
    try:
        yield run
    finally:
        for rank, process in enumerate(processes):
            if process.is_alive():
                run.tell(rank, signal.SIGKILL)
            process.join()


def ended(recipe: Path, folder: Path, *options: str, code: int = 0, **given: Any) -> Ranks:
    """As `started`, run to the end, which all ranks have to reach with this exit code."""
    with started(recipe, folder, *options, **given) as run:
        codes = run.end()
    assert codes == [code] * len(codes), f"exit codes {codes}:\n{run.output}"
    return run


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function of a module gives in a process of its own, which holds nothing of the tests before.

    Raises:
        EOFError: the process has ended without a result; its output says why.
    """
    context = fork_context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _send(to: Connection, function: Callable[..., Any], args: Sequence[Any]) -> None:
    to.send(function(*args))


def _rank(
    rank: int,
    world: int,
    port: int,
    output_file: Path,
    script: str,
    argv: Sequence[str],
    fault: Callable[..., None] | None,
    fault_args: dict,
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()}, MASTER_ADDR="127.0.0.1")
    with output_file.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115 - for as long as the process lives
    if fault is not None:
        fault(**fault_args)
    multiprocessing.set_start_method("fork", force=True)  # as it is for a rank that a launcher has started
    main = runpy.run_path(str(ROOT / script))["main"]
    run_command(lambda: main(argv))
