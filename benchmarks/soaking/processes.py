"""The processes of the soak test, which carry its mark."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

from tinygptv_ds.processes import command_line, is_alive, own_processes

MARK = "TINYGPTV_SOAK_MARK"  # environment variable of every process that the soak test has started


def marked(mark: str) -> set[int]:
    """Return the living processes that have this mark in their environment, without this one."""
    found = (pid for pid in own_processes() if pid != os.getpid() and variable(pid, MARK) == mark)
    return {pid for pid in found if is_alive(pid)}


def left_over(mark: str, before: Collection[int], patience: float) -> dict[int, str]:
    """Return the command lines of marked processes that were not there before, once they had time to end."""
    until = time.monotonic() + patience
    while (left := marked(mark) - set(before)) and time.monotonic() < until:
        time.sleep(0.1)
    return {pid: " ".join(command_line(pid))[:200] for pid in sorted(left)}


def variable(pid: int, name: str) -> str | None:
    """Return an environment variable that a process was started with."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return next((line.partition("=")[2] for line in lines if line.startswith(f"{name}=")), None)
