"""Inside a rank: notes what every step is fed, and waits at one point of the run until the driver has struck.

Imports nothing heavy: a launched rank runs this before its first line.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ORDERS = "TINYGPTV_SOAK"  # environment variable
REACHED, RELEASED, FULL = "reached", "released", "full"  # marker files
_PATIENCE = 120.0  # seconds that a rank waits at its point
# A point of the run by the audit event that Python raises right before it, and the path that the event names.
_EVENTS = {
    "check": ("open", r"eva_vit_g\.pth"),  # of the files, before the ranks meet
    "save": ("os.mkdir", r"checkpoints/step-\d+\.partial"),
    "state": ("open", r"step-\d+\.partial/state\.json"),
    "rename": ("os.rename", r"checkpoints/step-\d+\.partial"),
    "prune": ("os.rename", r"checkpoints/step-\d+"),
    "removal": ("shutil.rmtree", r"checkpoints/step-\d+\.old"),
    "latest": ("os.rename", r"deepspeed/\.latest\.[^/]*"),
    "model": ("os.rename", r"/model\.partial"),
}
START, LOAD, STEP, MID_FILE = "start", "load", "step", "mid-file"
POINTS = (START, LOAD, STEP, MID_FILE, *_EVENTS)


@dataclass(frozen=True)
class Orders:
    """What the ranks of one attempt are to do.

    Attributes:
        folder: gets `fed-RANK.jsonl` and the marker files.
        point: one of `POINTS`; empty: none.
        rank: the rank that waits there.
        count: at which time that it comes there.
        pause: seconds that each step takes longer.
    """

    folder: str
    point: str = ""
    rank: int = 0
    count: int = 1
    pause: float = 0.0

    def environment(self) -> dict[str, str]:
        """Return them as `install` finds them."""
        return {ORDERS: json.dumps(asdict(self))}


def install(environment: dict[str, str] | None = None) -> None:
    """Prepare this rank, before its stage begins.

    Args:
        environment: added to the process's own.
    """
    os.environ.update(environment or {})
    if ORDERS in os.environ:
        _Inside(Orders(**json.loads(os.environ[ORDERS]))).install()


class _Inside:
    def __init__(self, orders: Orders) -> None:
        self._orders, self._folder = orders, Path(orders.folder)
        self._rank = int(os.environ["RANK"])
        mine = orders.rank == self._rank and not (self._folder / REACHED).exists()
        self._point, self._left = (orders.point if mine else ""), orders.count

    def install(self) -> None:
        self._pass(START)
        _after_import("tinygptv_ds.weights.assemble", self._watch_loading)
        _after_import("tinygptv_ds.train.loop", self._record_steps)
        _after_import("tinygptv_ds.weights.safetensors_writer", self._watch_writes)
        if self._point in _EVENTS:
            sys.addaudithook(self._on_event)

    def _on_event(self, name: str, args: tuple[Any, ...]) -> None:
        event, pattern = _EVENTS.get(self._point, ("", ""))
        if name == event and re.search(f"{pattern}$", str(args[0])):
            self._pass(self._point)

    def _pass(self, point: str) -> None:
        """Wait here for the driver where this is the point."""
        if point != self._point:
            return
        self._left -= 1
        if self._left > 0:
            return
        self._point = ""
        (self._folder / REACHED).write_text(str(os.getpid()))
        until = time.monotonic() + _PATIENCE
        while not os.path.exists(self._folder / RELEASED) and time.monotonic() < until:  # noqa: PTH110 - no event
            time.sleep(0.005)

    def _watch_loading(self, assemble: ModuleType) -> None:
        build_model = assemble.build_model

        def watched(*args: Any, **more: Any) -> Any:
            self._pass(LOAD)
            return build_model(*args, **more)

        assemble.build_model = watched  # type: ignore[attr-defined]

    def _record_steps(self, loop: ModuleType) -> None:
        optimizer_step = loop.optimizer_step

        def recorded(run: Any, step: int, micro_batches: list[Any], *rest: Any) -> None:
            ids = [[list(vars(ref).values()) for ref in item.batch.sample_ids] for item in micro_batches]
            line = json.dumps({"step": step, "world": run.ranks.world_size, "ids": ids}) + "\n"
            with (self._folder / f"fed-{self._rank}.jsonl").open("ab", buffering=0) as file:
                file.write(line.encode())
            optimizer_step(run, step, micro_batches, *rest)
            self._pass(STEP)
            time.sleep(self._orders.pause)

        loop.optimizer_step = recorded  # type: ignore[attr-defined]

    def _watch_writes(self, writer: ModuleType) -> None:
        write_all, seen = writer._write_all, 0

        def watched(write: Callable[[memoryview], int], data: bytes | memoryview) -> None:
            nonlocal seen
            seen += 1
            if seen % 2 == 0:  # never the first piece of a file, which is its header
                self._pass(MID_FILE)
            if (self._folder / FULL).exists():  # where no file system can be mounted that is really full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_all(write, data)

        writer._write_all = watched  # type: ignore[attr-defined]


def _after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with a module, now if it is loaded, else right after its import."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name, self._action = name, action

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
