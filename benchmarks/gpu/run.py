"""Runs the measuring processes one after the other, and continues if one of them dies. Needs no torch.

Each process starts with fresh state and memory. Results that it wrote before it ended, for any reason, are kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.plan import CHECKS, Group, obstacle
from benchmarks.gpu.report import Report
from benchmarks.gpu.results import OUT_OF_MEMORY, read

ROOT = Path(__file__).resolve().parents[2]
_LONGEST = 200.0  # seconds after which a process is taken to hang
_FIRST_NEED = 45.0  # seconds that the first process is assumed to need
_LAST_LINES = 6  # lines of a failed process that are reported


@dataclass(frozen=True)
class ProcessEnd:
    """How a process ended.

    Attributes:
        code: exit code; None: it was stopped.
        why: the reason, if it failed.
        by_budget: whether it was stopped at the time limit.
    """

    code: int | None
    why: str = ""
    by_budget: bool = False


class Launcher:
    """Runner of a module in one process or, through torchrun, in one process on each GPU.

    Args:
        out: folder of `log.txt`, the output of the processes.
        minutes: time limit for all processes together.
        ranks: number of processes of a group.
    """

    def __init__(self, out: Path, minutes: float, ranks: int) -> None:
        self._log = out / "log.txt"
        self._end = time.monotonic() + 60 * minutes
        self._ranks = ranks
        self._longest = 0.0

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.monotonic()

    def has_time(self) -> bool:
        """Return whether the time suffices for another process: the longest so far, and a fifth more."""
        return self.left > (1.2 * self._longest or _FIRST_NEED)

    def __call__(self, module: str, arguments: list[str], ranks: int | None = None) -> ProcessEnd:
        """Run a module until it ends or the time is up."""
        ranks = ranks or self._ranks
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", f"benchmarks.gpu.{module}", *arguments]
        limit = max(1.0, min(self.left, _LONGEST))
        began = time.monotonic()
        with self._log.open("ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(), stdout=log, stderr=log, start_new_session=True
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
        took = time.monotonic() - began
        self._longest = max(self._longest, took)
        if code is None:
            return ProcessEnd(None, f"stopped after {took:.0f} s", by_budget=limit < _LONGEST)
        return ProcessEnd(code, "" if code == 0 else f"exit code {code}: {_last_lines(self._log, start)}")


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": path}


def _kill(process: subprocess.Popen) -> None:
    """Kill the whole process group, with dataloader workers and ranks."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _last_lines(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return " | ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:])


def run_checks(launch: Callable[..., ProcessEnd], size: str, lines: Path, report: Report) -> None:
    """Run the checking process."""
    ended = launch("checks", ["--size", size, "--out", str(lines)], ranks=1)
    report.take(read(lines))
    lines.unlink(missing_ok=True)
    if ended.by_budget:
        report.left_out(CHECKS, ended.why)
    elif ended.code != 0:
        report.failed(CHECKS, ended.why)


def run_group(
    launch: Callable[..., ProcessEnd], group: Group, options: list[str], folder: Path, report: Report
) -> None:
    """Measure all cases of a group; a case that runs out of memory is repeated with half the batch.

    Args:
        launch: runs a module.
        group: the cases.
        options: options for size and number of steps.
        folder: folder for run directories.
        report: takes the results.
    """
    left, attempt = [], 0
    for case in group.cases:
        why = obstacle(case, options[options.index("--size") + 1] if "--size" in options else "published")
        if why is None:
            left.append(case)
        else:
            report.left_out(str(case), why)
    while left:
        attempt += 1
        lines = report.running_file()
        arguments = [
            "--cases",
            json.dumps([asdict(case) for case in left]),
            *options,
            *(["--save"] if group.save else []),
        ]
        ended = launch(
            group.module,
            [*arguments, "--run-dir", str(folder / f"run-{attempt}"), "--out", str(lines)],
            *_ranks_of(group),
        )
        found = _once_each(read(lines))
        report.take(found)
        lines.unlink(missing_ok=True)
        rows = [line["value"] for line in found if line["kind"] == "steps"]
        ahead = left[len(rows) :]
        if rows and rows[-1]["status"] == OUT_OF_MEMORY:
            smaller = left[len(rows) - 1].halved()
            left = ahead if smaller is None or smaller in ahead else [smaller, *ahead]
        elif ended.by_budget:
            for case in ahead:
                report.left_out(str(case), ended.why)
            left = []
        else:
            if ended.code != 0:
                report.failed(str(ahead[0]) if ahead else f"{group.name}: the checkpoint after its cases", ended.why)
            left = ahead[1:]


def _ranks_of(group: Group) -> tuple[int, ...]:
    """Return the number of ranks where it is not that of all GPUs: the original's procedure runs in one process."""
    return (1,) if group.module == "original" else ()


def _once_each(lines: list[dict]) -> list[dict]:
    """Return the results without repeated reports: several ranks may run out of memory in the same case."""
    reported, kept = [], []
    for line in lines:
        short = line["kind"] == "steps" and line["value"]["status"] == OUT_OF_MEMORY
        if not short or line["value"]["case"] not in reported:
            kept.append(line)
        if short:
            reported.append(line["value"]["case"])
    return kept
