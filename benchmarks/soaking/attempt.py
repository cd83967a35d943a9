"""One attempt of a run: started, struck at its point, and watched until nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.soaking import plan, processes
from benchmarks.soaking.disk import Disk
from benchmarks.soaking.inside import REACHED, RELEASED, Orders, install
from benchmarks.soaking.plan import Injection
from tinygptv_ds.processes import children_of, command_line
from tinygptv_ds.train.liveness.launchers import PER_NODE

ROOT = Path(__file__).resolve().parents[2]
CPU_JSON = ROOT / "ds_configs/cpu.json"
LIMIT = 240.0  # seconds after which an attempt counts as hung
_GONE = 60.0  # seconds in which its last process must have ended
_FROZEN = 1.5  # seconds for which a process is stopped


@dataclass(frozen=True)
class Place:
    """What all attempts share: the recipe, the mark of every process, and the disk of the run directories."""

    recipe: Path
    mark: str
    disk: Disk


@dataclass
class Outcome:
    """What an attempt came to.

    Attributes:
        struck: whether it reached its point, so that something was done to it; when, by the monotonic clock.
        codes: exit code of the command, or of each forked rank.
        first_step: seconds by the monotonic clock at which a step was fed for the first time; None: none was.
        seconds: from the strike, or else the start, until nothing was left.
        left: command lines of processes that stayed.
        hung: whether it had to be killed.
        output: all that was printed.
    """

    struck: float | None = None
    codes: list[int] = field(default_factory=list)
    first_step: float | None = None
    seconds: float = 0.0
    left: dict[int, str] = field(default_factory=dict)
    hung: bool = False
    output: str = ""


class Started(Protocol):
    """A run under way, forked or launched."""

    def codes(self) -> list[int] | None:
        """Return the exit codes; None while it is running."""

    def victims(self, kind: str, rank: int) -> list[int]:
        """Return the processes of a kind."""

    def output(self) -> str:
        """Return what it has printed."""


class _Forked:
    """Ranks that are forked from a process that has imported everything."""

    def __init__(self, ranks: Any) -> None:
        self._ranks = ranks

    def codes(self) -> list[int] | None:
        found = [process.exitcode for process in self._ranks.processes]
        return None if None in found else found

    def victims(self, kind: str, rank: int) -> list[int]:
        pid = self._ranks.processes[rank].pid
        return [pid] if kind == plan.RANK else _workers(pid)

    def output(self) -> str:
        return self._ranks.output


class _Launched:
    """A command of a user's."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    def codes(self) -> list[int] | None:
        code = self._process.poll()
        return None if code is None else [code]

    def victims(self, kind: str, rank: int) -> list[int]:
        below, found = [self._process.pid], []
        while below:
            pid = below.pop()
            found.append(pid)
            below += children_of(pid)
        node = [pid for pid in found if PER_NODE in command_line(pid)]
        ranks = {processes.variable(pid, "RANK"): pid for launcher in node for pid in children_of(launcher)}
        outer = [pid for pid in found if "deepspeed.launcher.runner" in command_line(pid)]
        by_kind = {
            plan.FRONT: [self._process.pid],
            plan.OUTER: outer or [self._process.pid],
            plan.NODE: node,
            plan.RANK: [ranks[str(rank)]] if str(rank) in ranks else [],
        }
        return by_kind[kind] if kind in by_kind else _workers(ranks.get(str(rank), -1))

    def output(self) -> str:
        return self._log.read_text(errors="replace")


def _workers(rank: int) -> list[int]:
    """Return a rank's dataloader workers, which are forked from it."""
    return [pid for pid in children_of(rank) if command_line(pid) == command_line(rank)]


def run_attempt(place: Place, injection: Injection, run_dir: Path, records: Path) -> Outcome:
    """Start a run, do to it what the injection says, and wait until it has ended.

    Args:
        place: of all attempts.
        injection: the attempt.
        run_dir: the run directory.
        records: what the ranks note, over all attempts of the run.
    """
    for marker in (REACHED, RELEASED):
        (records / marker).unlink(missing_ok=True)
    orders = Orders(str(records), injection.point, injection.rank, injection.count, pause=0.01)
    outcome, size = Outcome(), _recorded(records)
    with _start(place, injection, run_dir, orders) as (started, before):
        began, seen = time.monotonic(), False
        while (codes := started.codes()) is None:
            if outcome.first_step is None and _recorded(records) > size:
                outcome.first_step = time.monotonic()
            if not seen and (records / REACHED).exists():
                began = time.monotonic()
                outcome.struck = began if _strike(place, injection, started, records) else None
                seen = True
            if time.monotonic() - began > LIMIT:
                outcome.hung = True
                break
            time.sleep(0.02)
        outcome.codes = codes or []
        outcome.left = processes.left_over(place.mark, before, 0.0 if outcome.hung else _GONE)
        outcome.seconds = time.monotonic() - began
        outcome.output = started.output()
    for pid in outcome.left:
        _send(pid, signal.SIGKILL)
    place.disk.clear(records)
    return outcome


def _recorded(records: Path) -> int:
    path = records / "fed-0.jsonl"
    return path.stat().st_size if path.exists() else 0


def _strike(place: Place, injection: Injection, started: Started, records: Path) -> bool:
    """Do it, and let the rank that waits at its point go on; return False where the victim was not there."""
    act = injection.act
    if act in (plan.FULL, plan.FULL_A_WHILE):
        place.disk.fill(injection.room, records)
        (records / RELEASED).touch()
        if act == plan.FULL_A_WHILE:
            time.sleep(_FROZEN)
            place.disk.clear(records)
        return True
    pids = started.victims(injection.victim, injection.rank)
    if act in (plan.FREEZE, plan.PAUSE):
        for pid in pids:
            _send(pid, signal.SIGSTOP)
        (records / RELEASED).touch()
        time.sleep(_FROZEN)
    last = {plan.FREEZE: signal.SIGKILL, plan.PAUSE: signal.SIGCONT}.get(act) or signal.Signals[act]
    for pid in pids:
        _send(pid, last)
    (records / RELEASED).touch()
    return bool(pids)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def _start(place: Place, injection: Injection, run_dir: Path, orders: Orders) -> Iterator[tuple[Started, set[int]]]:
    """Start the run; yield it, and the marked processes that there were before."""
    from helpers.forked import fork_context, launched

    fork_context()  # its server stays
    before = processes.marked(place.mark)
    options = [*injection.setup.options(), "--recipe", str(place.recipe), "--run-dir", str(run_dir)]
    options += ["--deepspeed_config", str(CPU_JSON)]
    with ExitStack() as stack:
        if injection.form == plan.FORKED:
            given = {"ranks": injection.setup.ranks, "fault": install, "environment": orders.environment()}
            output_near = Path(orders.folder) / "output"
            ranks = stack.enter_context(launched("stages/stage4.py", options, output_near, **given))
            yield _Forked(ranks), before
        else:
            log = Path(orders.folder) / f"output-{time.monotonic_ns()}.txt"
            process = stack.enter_context(_popen(injection, options, orders, log))
            yield _Launched(process, log), before


@contextmanager
def _popen(injection: Injection, options: list[str], orders: Orders, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    from helpers.launcher import bash_form, deepspeed_form

    form = deepspeed_form if injection.form == plan.DEEPSPEED else bash_form
    command = form(4, injection.setup.ranks)
    if injection.form == plan.RESTARTED:
        command += ["--restarts", "2"]
    hooked = os.pathsep.join([str(Path(__file__).parent / "hook"), str(ROOT)])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, **orders.environment(), "PYTHONPATH": hooked, "PATH": path}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *options], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
