"""The launcher's processes above a rank, whose end the rank must notice: they leave it behind when killed. No torch."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from tinygptv_ds.processes import has_word, is_alive, name_of, parent_of

LOST = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
# Of a terminal or an ssh connection that is gone, and of a limit on CPU time: a run stops and saves as on SIGTERM.
AS_SIGTERM = (signal.SIGHUP, signal.SIGXCPU)
LAUNCHER_PID = "TINYGPTV_LAUNCHER_PID"  # environment variable: the verb `train` that started this rank, on this host
# By a word of their command lines: the per-node and the outer process of DeepSpeed's launcher, and torch's two forms.
PER_NODE = "deepspeed.launcher.launch"
_LAUNCHERS = (PER_NODE, "deepspeed.launcher.runner", "deepspeed", "torch.distributed.run", "torchrun")
_STARTED_BY_DEEPSPEED = "CROSS_RANK"  # environment variable that its per-node process sets
_ADOPTERS = ("init", "systemd", "tini", "dumb-init", "docker-init", "catatonit")


@dataclass(frozen=True)
class Launchers:
    """The launcher's processes as they were when this process began.

    Attributes:
        pids: the nearest first.
        front: the process of the verb `train`; 0: none.
        orphaned: whether one of them had ended even then.
    """

    pids: tuple[int, ...] = ()
    front: int = 0
    orphaned: bool = False

    @classmethod
    def above(cls) -> Launchers:
        """Return those of this process; call it as early as possible."""
        parent = os.getppid()
        pids = tuple(launchers_of(parent))
        front = int(os.environ.get(LAUNCHER_PID, 0))
        left_alone = not pids and _STARTED_BY_DEEPSPEED in os.environ and _adopts(parent)
        without_outer = len(pids) == 1 and has_word(pids[0], PER_NODE) and _adopts(parent_of(pids[0]))
        return cls(pids, front, left_alone or without_outer)

    def gone(self) -> bool:
        """Return whether any of them has ended."""
        if self.orphaned or (self.front and not is_alive(self.front)):
            return True
        return bool(self.pids) and launchers_of(os.getppid()) != list(self.pids)


def launchers_of(pid: int) -> list[int]:
    """Return this process and those above it as long as they are a launcher's."""
    found = []
    while has_word(pid, *_LAUNCHERS):
        found.append(pid)
        pid = parent_of(pid)
    return found


def _adopts(pid: int) -> bool:
    """Return whether a process is one that the system gives orphans to."""
    return pid <= 1 or name_of(pid) in ("", *_ADOPTERS)
