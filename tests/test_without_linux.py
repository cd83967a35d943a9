"""What macOS lacks of Linux: no /proc, no prctl, no CPU affinity; the parts that use them work all the same."""

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.patience import PATIENCE
from PIL import Image

from tinygptv_ds import processes
from tinygptv_ds.distributed import Ranks, cores_per_rank
from tinygptv_ds.train.liveness.launchers import Launchers
from tinygptv_ds.train.metrics.reporter import memory_gib

ROOT = Path(__file__).parents[1]
# Imported first in a process of the tests (`-c`), before anything of the package.
NO_LINUX = """
import ctypes, os, pathlib, runpy, sys
del os.sched_getaffinity
found = pathlib.Path.is_file
pathlib.Path.is_file = lambda path, *more, **given: not str(path).startswith("/proc") and found(path, *more, **given)
from tinygptv_ds import processes
assert not processes._HAS_PROC
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("prctl", "malloc_trim"):
            raise AttributeError(name)
        return super().__getattr__(name)
processes.ctypes.CDLL = Library
sys.argv[0] = "tinygptv-ds"
runpy.run_module("tinygptv_ds", run_name="__main__")
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "a-word"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as started:
        assert started.stdin and started.stdout
        started.stdout.readline()
        yield started
        started.stdin.close()


def facts(pid: int) -> list[object]:
    return [
        processes.command_line(pid),
        processes.name_of(pid),
        processes.is_alive(pid),
        processes.parent_of(pid),
        processes.children_of(pid),
        processes.group_members(pid),
        pid in processes.own_processes(),
        processes.has_word(pid, "a-word"),
    ]


def test_processes_are_known_without_proc(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as from /proc: of a child, of this process's children, and of a process that is gone."""
    gone = 2**22 + 1  # above the kernel's largest number
    expected = [facts(child.pid), sorted(processes.children_of(os.getpid())), facts(gone)[:6]]
    assert expected[0][-1] is True and child.pid in expected[1]
    resident = processes.resident_bytes()
    monkeypatch.setattr(processes, "_HAS_PROC", False)
    assert [facts(child.pid), sorted(processes.children_of(os.getpid())), facts(gone)[:6]] == expected
    assert processes.resident_bytes() == pytest.approx(resident, rel=0.2)
    assert not Launchers.above().gone()


def test_a_process_that_has_ended_is_not_alive(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_HAS_PROC", False)
    assert processes.is_alive(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but not collected: a zombie
    assert not processes.is_alive(child.pid) and processes.group_members(child.pid) == []


def test_without_affinity_and_prctl(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoPrctl:
        """A C library as macOS has it."""

        def __init__(self, name: None) -> None:
            pass

    monkeypatch.setattr(ctypes, "CDLL", NoPrctl)
    processes.signal_at_end_of_parent(15)
    processes.return_freed_memory()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processes.usable_cores() == os.cpu_count()
    assert cores_per_rank(Ranks(0, 0, 1, 1)) == os.cpu_count()


def test_peak_memory_counts_bytes_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    in_kib = memory_gib(torch.device("cpu"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(resource, "getrusage", lambda _: type("Usage", (), {"ru_maxrss": peak * 1024})())
    assert memory_gib(torch.device("cpu")) == pytest.approx(in_kib, rel=0.01)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--help"], "finetune"),
        (["train", "stage1", "--help"], "--deepspeed-config"),
        (["chat", "--help"], "--adapter"),
        (
            ["prepare", "llava", "--annotations", "a.json", "--image-root", ".", "--out", "data", "--workers", "1"],
            "1 sample",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_verbs(argv: list[str], shown: str, tmp_path: Path) -> None:
    """In a process without them; `prepare` also starts others."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    ended = subprocess.run(
        [sys.executable, "-c", NO_LINUX, *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    assert shown in ended.stdout
