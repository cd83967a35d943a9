"""Processes of a host without /proc (macOS), as psutil, which DeepSpeed installs, knows them. No torch."""

from __future__ import annotations

import os


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line; none if it is gone or another user's."""
    import psutil

    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


def stat(pid: int) -> list[str]:
    """Return state, parent and process group of a process, as /proc/PID/stat has them; empty if it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        state = "Z" if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "S"
        return [state, str(process.ppid()), str(os.getpgid(pid))]
    except (psutil.Error, OSError):
        return []


def name_of(pid: int) -> str:
    """Return the name of a process's program, at most 15 characters; empty if it is gone."""
    import psutil

    try:
        return psutil.Process(pid).name()[:15]
    except psutil.Error:
        return ""


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started, those that have ended and are not collected included."""
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def all_processes() -> list[int]:
    """Return the processes of the host."""
    import psutil

    return psutil.pids()


def user_of(pid: int) -> int | None:
    """Return the number of a process's user; None if it is gone."""
    import psutil

    try:
        return psutil.Process(pid).uids().real
    except psutil.Error:
        return None


def resident_bytes() -> int:
    """Return the memory of this process that is resident."""
    import psutil

    return psutil.Process().memory_info().rss
