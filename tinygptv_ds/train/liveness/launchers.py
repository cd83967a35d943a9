"""The launcher's processes above a rank, whose end the rank must notice: they leave it behind when killed. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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
        without_outer = len(pids) == 1 and has_word(pids[0], PER_NODE) and _adopts(_parent_of(pids[0]))
        return cls(pids, front, left_alone or without_outer)

    def gone(self) -> bool:
        """Return whether any of them has ended."""
        if self.orphaned or (self.front and not _is_alive(self.front)):
            return True
        return bool(self.pids) and launchers_of(os.getppid()) != list(self.pids)


def launchers_of(pid: int) -> list[int]:
    """Return this process and those above it as long as they are a launcher's."""
    found = []
    while has_word(pid, *_LAUNCHERS):
        found.append(pid)
        pid = _parent_of(pid)
    return found


def has_word(pid: int, *words: str) -> bool:
    """Return whether the command line of a process of this host has one of these words, with or without a folder."""
    try:
        given = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # gone
        return False
    return any(Path(word).name in words for word in given)


def _adopts(pid: int) -> bool:
    """Return whether a process is one that the system gives orphans to."""
    try:
        return pid == 1 or Path(f"/proc/{pid}/comm").read_text().strip() in _ADOPTERS
    except OSError:
        return True


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_alive(pid: int) -> bool:
    return (_stat(pid) or ["X"])[0] not in "ZX"


def _parent_of(pid: int) -> int:
    return int((_stat(pid) or ["X", "0"])[1])
