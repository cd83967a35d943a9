"""Stage 4's script with a record of every collective of every step; rank 0 writes it to $COLLECTIVES_FILE.

The tests' forked ranks call `note` instead.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import distributed

from tinygptv_ds.cli import run_command

# Functions of DeepSpeed 0.19 (and `take_snapshot`) that call collectives, and the names that traffic_counts.py has for
# those; all other collectives are small. Remove when DeepSpeed reports its communication by purpose.
CALLERS = {
    "allreduce_bucket": "gradients",
    "reduce_scatter_coalesced": "gradients",
    "all_gather_into_tensor_dp_groups": "updated weights",
    "_allgather_params_coalesced": "updated weights",
    "_all_gather_dtype": "gathered weights",
    "_all_gather_sequential": "gathered weights",
    "take_snapshot": "checkpoint",
}
PAYLOAD = {  # name in traffic_counts.py, and position and name of the argument that is the whole tensor
    "all_reduce": ("all_reduce", 0, "tensor"),
    "all_gather_into_tensor": ("all_gather", 0, "output_tensor"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input"),
}
# No table has the bytes of these: if one is called in a step, the comparison with the counts fails.
UNKNOWN = ("all_gather", "all_to_all_single", "barrier", "broadcast", "gather", "reduce", "reduce_scatter", "scatter")


class Notes:
    """The record of rank 0: a list of [what, kind, bytes, ranks] for each step, and the loopback's bytes before it."""

    def __init__(self) -> None:
        self.steps: list[list[list]] = []
        self.loopback: list[int] = []

    def begin_step(self) -> None:
        """Begin the list of another step."""
        self.steps.append([])
        self.loopback.append(_loopback_bytes())

    def add(self, kind: str, payload: int, ranks: int) -> None:
        """Record one call. Calls before the first step belong to start-up and are left out."""
        if self.steps:
            self.steps[-1].append([_purpose(sys._getframe(2)), kind, payload, ranks])


def note(file: Path) -> None:
    """Record the collectives of this process from now on; rank 0 writes `file` after every step."""
    from tinygptv_ds.train.callbacks.checkpoints import Checkpoints

    notes, on_batch, on_step = Notes(), Checkpoints.on_batch, Checkpoints.on_step

    def begun(self: Checkpoints, *batch: Any) -> None:
        notes.begin_step()
        on_batch(self, *batch)

    def ended(self: Checkpoints, step: int) -> None:
        on_step(self, step)
        if int(os.environ["RANK"]) == 0:
            file.write_text(json.dumps(vars(notes)))

    Checkpoints.on_batch, Checkpoints.on_step = begun, ended  # type: ignore[method-assign, assignment]  # to count them
    for name in (*PAYLOAD, *UNKNOWN):
        counted = _counted(notes, name, getattr(distributed, name))
        setattr(distributed, name, counted)
        setattr(distributed.distributed_c10d, name, counted)


def _counted(notes: Notes, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **named: Any) -> Any:
        kind, payload = name, 0
        if name in PAYLOAD:
            kind, place, word = PAYLOAD[name]
            tensor: torch.Tensor = args[place] if len(args) > place else named[word]
            payload = tensor.numel() * tensor.element_size()
        notes.add(kind, payload, distributed.get_world_size(named.get("group")))
        return call(*args, **named)

    return noted


def _purpose(frame: Any) -> str:
    while frame is not None:
        if frame.f_code.co_name in CALLERS:
            return CALLERS[frame.f_code.co_name]
        frame = frame.f_back
    return "small"


def _loopback_bytes() -> int:
    """Return the bytes sent through this network namespace's loopback device so far."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    fields = next(line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:"))
    return int(fields[8])


if __name__ == "__main__":
    note(Path(os.environ["COLLECTIVES_FILE"]))
    run_command(runpy.run_path(str(Path(__file__).parents[1] / "stages/stage4.py"))["main"])
