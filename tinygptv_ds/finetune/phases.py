"""Phases that run one after the other, each a verb in a process of its own, noted in a journal when they have ended.

A killed command resumes in the phase that it was in: what a verb has written is complete or not there, and each verb
continues its own unfinished work.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tinygptv_ds.console import print_to_stderr
from tinygptv_ds.errors import Stopped, TinyGPTVError
from tinygptv_ds.files import FileLock, Journal, LockedError, lock_file, read_journal
from tinygptv_ds.processes import signal_at_end_of_parent

_CAN_RESUME = (75, 130, 138, 143)  # exit codes of a verb that the same command continues: docs/train/resume.md

PROGRAM = "tinygptv-ds"


@dataclass(frozen=True)
class Phase:
    """One verb with its options.

    Attributes:
        name: in the journal.
        title: a heading.
        argv: the verb and its options.
        is_done: whether its result is there, although the journal does not know of it because of a kill.
        depends: a digest of what else its result depends on, such as the recipe's content.
        extra: options that change nothing of the result, such as a free port.
        env: environment variables that it needs, printed in front of the command.
    """

    name: str
    title: str
    argv: tuple[str, ...]
    is_done: Callable[[], bool] = lambda: False
    depends: str = ""
    extra: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for an earlier result to be this phase's."""
        return {"argv": list(self.argv), "depends": self.depends}

    @property
    def command(self) -> str:
        """The command that a user can paste."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*variables, PROGRAM, *(shlex.quote(word) for word in self.argv)])


class Progress:
    """The journal of a fine-tuning, which one process at a time may have."""

    def __init__(self, folder: Path) -> None:
        """Open the journal in a folder, after every other process that works in it has ended."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "journal.jsonl"
        self._lock = _lock_or_wait(path)
        self.entries: list[dict[str, Any]] = list(read_journal(path))
        self._journal = Journal(path)

    def done(self, phase: Phase) -> bool:
        """Return whether a phase has ended well with these options."""
        ended = [entry for entry in self.entries if entry.get("done") == phase.name]
        return bool(ended) and {key: ended[-1].get(key) for key in phase.identity} == phase.identity

    def ended(self, name: str) -> bool:
        """Return whether a phase has ever ended well, with whatever options."""
        return any(entry.get("done") == name for entry in self.entries)

    def began(self, name: str) -> bool:
        """Return whether a phase has ever begun."""
        return any(entry.get("began") == name for entry in self.entries)

    def note(self, entry: dict[str, Any]) -> None:
        """Append an entry."""
        self.entries.append(entry)
        self._journal.append(entry)

    def run(self, phase: Phase) -> bool:
        """Run a phase unless it has ended; return whether it ran.

        Raises:
            TinyGPTVError: it failed; its own message is above.
            Stopped: a signal ended it.
            SystemExit: it has lost a rank, or only it was stopped: with its exit code, which a scheduler acts on.
        """
        if self.done(phase):
            return False
        if self.began(phase.name) and phase.is_done():
            self.note({"done": phase.name, **phase.identity})
            return False
        self.note({"began": phase.name, **phase.identity})
        print(f"\n=== {phase.title}\n$ {phase.command}", flush=True)
        start = time.monotonic()
        code = _run_child(phase, self._lock)
        if code in _CAN_RESUME:
            print_to_stderr(f"{phase.argv[0]} ended with exit code {code}; the same command resumes from here")
            sys.exit(code)
        if code:
            raise TinyGPTVError(
                f"{phase.argv[0]} ended with exit code {code}; its message is above. After mending it, the same "
                "command resumes from here"
            )
        self.note({"done": phase.name, **phase.identity, "seconds": round(time.monotonic() - start, 1)})
        return True

    def seconds(self, name: str) -> float:
        """Return the seconds that a phase took, its last time."""
        return next((e["seconds"] for e in reversed(self.entries) if e.get("done") == name and "seconds" in e), 0.0)

    def close(self) -> None:
        """Close the journal and let the next process have it."""
        self._journal.close()
        self._lock.release()


def _lock_or_wait(path: Path) -> FileLock:
    try:
        return lock_file(path)
    except LockedError:
        print(f"waiting for another process that works on {path.parent} (Ctrl-C ends the waiting)", flush=True)
        return lock_file(path, wait=True)


def _run_child(phase: Phase, lock: FileLock) -> int:
    """Run a verb to its end and return its exit code; stop signals are passed on to it."""
    command = [sys.executable, "-P", "-m", "tinygptv_ds", *phase.argv, *phase.extra]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, **phase.env, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    stopped: list[int] = []
    with subprocess.Popen(command, env=env, preexec_fn=_end_with_parent, pass_fds=(lock.fileno(),)) as child:

        def pass_on(number: int, _: FrameType | None) -> None:
            stopped.append(number)
            if number != signal.SIGINT:  # which the terminal sends to the child itself
                child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if stopped:
        raise Stopped(stopped[0], f"{phase.argv[0]} was interrupted; the same command resumes from there")
    return code


def _end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, however that happens: nothing trains on unattended."""
    signal_at_end_of_parent(signal.SIGTERM)


def shown(phases: Sequence[Phase]) -> str:
    """Return the commands of phases, one a line."""
    return "\n".join(f"  {phase.command}" for phase in phases)
