"""Processes of this host, by Linux's /proc or elsewhere by psutil, its cores, and the end of a parent. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tinygptv_ds import processes_elsewhere

EXIT_CODE_FILE = "TINYGPTV_EXIT_CODE_FILE"  # environment variable with the path that `note_exit_code` writes to
_HAS_PROC = Path("/proc/self/stat").is_file()
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_RSS = 21  # the field of resident pages, counted as in `_stat`


def number_in_env(name: str) -> int | None:
    """Return the number that an environment variable holds, as launchers set them; None where it holds none."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def own_rank() -> int:
    """Return which rank of a launcher this process is, for messages; 0 where there is no launcher, or no number."""
    return number_in_env("RANK") or 0


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import what stays: no garbage is collected meanwhile, and later collections pass over what is there by then.

    Of torch, transformers and DeepSpeed that is a million objects: to look through all of them again and again takes a
    sixth of the time that the imports take, and 0.3 s of a step now and then.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def note_exit_code(code: int) -> None:
    """Leave the code that rank 0 is about to exit with to the supervisor of its launch, if there is one.

    DeepSpeed's launcher, where it got a signal itself, exits with 1 whatever its ranks do.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if path and os.environ.get("RANK") == "0":
        with contextlib.suppress(OSError):
            Path(path).write_text(str(code))


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line; none if it is gone."""
    if not _HAS_PROC:
        return processes_elsewhere.command_line(pid)
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def has_word(pid: int, *words: str) -> bool:
    """Return whether the command line of a process has one of these words, with or without a folder."""
    return any(Path(word).name in words for word in command_line(pid))


def name_of(pid: int) -> str:
    """Return the name of a process's program, at most 15 characters; empty if it is gone."""
    if not _HAS_PROC:
        return processes_elsewhere.name_of(pid)
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    return (_stat(pid) or ["X"])[0] not in "ZX"


def is_suspended(pid: int) -> bool:
    """Return whether a process is stopped by a signal, until SIGCONT."""
    return (_stat(pid) or ["X"])[0] in "Tt"


def parent_of(pid: int) -> int:
    """Return a process's parent; 0 if it is gone."""
    return int((_stat(pid) or ["X", "0"])[1])


def status_of(pid: int) -> dict[str, str]:
    """Return the fields of /proc/PID/status by name; empty if there is no such process, or no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started, those that have ended and are not collected included."""
    if not _HAS_PROC:
        return processes_elsewhere.children_of(pid)
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, thread.read_text().split())
        except OSError:
            continue
    return found


def group_members(group: int) -> list[int]:
    """Return the processes of a process group that have not ended."""
    stats = ((pid, _stat(pid)) for pid in _all())
    return [pid for pid, fields in stats if fields and int(fields[2]) == group and fields[0] not in "ZX"]


def resident_bytes() -> int:
    """Return the memory of this process that is resident; 0 where the kernel does not say."""
    if not _HAS_PROC:
        return processes_elsewhere.resident_bytes()
    fields = _stat(os.getpid())
    return int(fields[_RSS]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def return_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps blocks of up to 32 MB for reuse, which rarely fit other sizes."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def own_processes() -> Iterator[int]:
    """Return the processes of this user."""
    for pid in _all():
        if _user_of(pid) == os.getuid():
            yield pid


def signal_at_end_of_parent(number: int) -> None:
    """Ask the kernel to send this process a signal when its parent ends, however that happens; Linux alone does."""
    with contextlib.suppress(AttributeError):  # macOS has no prctl: there, a child outlives a parent that is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use; all of them where the system knows no affinity."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _all() -> Iterable[int]:
    if not _HAS_PROC:
        return processes_elsewhere.all_processes()
    return (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))


def _user_of(pid: int) -> int | None:
    if not _HAS_PROC:
        return processes_elsewhere.user_of(pid)
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty if there is no such process."""
    if not _HAS_PROC:
        return processes_elsewhere.stat(pid)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
