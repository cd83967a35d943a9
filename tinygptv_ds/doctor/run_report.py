"""`doctor RUN`: what a run that has hung or lost a rank has left, and how to read it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.plain_pickle import load_plain
from tinygptv_ds.train.liveness.stack_files import COLLECTIVES, FOLDER, STACKS

_OF_LIBRARIES = ("/torch/", "/deepspeed/")


@dataclass(frozen=True)
class Collectives:
    """The flight record of one rank.

    Attributes:
        rank: its number.
        group: the process group that the rank used last.
        begun: collectives that it has begun in that group.
        last: the last of them: its name, sizes, and the line that called it.
    """

    rank: int
    group: str
    begun: int
    last: str


def run_report(run_dir: Path) -> Iterator[str]:
    """Yield the lines of the report.

    Raises:
        ConfigError: there is no such folder.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is no run directory; give the folder that a run was written to")
    folder = run_dir / FOLDER
    stacks = _by_rank(folder, STACKS, ".txt")
    records = _by_rank(folder, COLLECTIVES, "")
    if not stacks and not records:
        yield f"{folder}: nothing there. A run writes stacks when a rank hangs or is lost; at any other time"
        yield "'kill -USR2 PID' to a rank adds those of that process."
        return
    yield f"stacks in {folder}, of every thread of a rank and of its dataloader workers; the last reason of each:"
    for path in stacks.values():
        yield f"  {path.name}: {_last_reason(path) or 'no reason noted'}"
    yield "Look at the rank that is named, there at the thread that ends in the stage's script (stages/stageN.py)."
    if records:
        yield from _explain_collectives(folder, records)


def _explain_collectives(folder: Path, records: dict[int, Path]) -> Iterator[str]:
    yield f"collectives that torch's flight recorder had noted, {COLLECTIVES}N of rank N:"
    read: list[Collectives] = []
    for rank, path in records.items():
        try:
            read.append(_collectives(rank, load_plain(path.read_bytes())))
        except Exception as error:  # a torn pickle can raise nearly anything
            yield f"  rank {rank}: {path.name} cannot be read ({error})"
    yield from (f"  rank {each.rank}: {each.begun} begun, the last one {each.last}" for each in read)
    fewest, most = (choose((each.begun for each in read), default=0) for choose in (min, max))
    behind = ", ".join(str(each.rank) for each in read if each.begun == fewest)
    if len({each.group for each in read}) > 1:
        yield "The ranks are in different process groups: compare their stacks."
    elif fewest < most:
        yield f"The others wait for rank {behind}, which has not reached the next collective: read its stacks."
    elif read:
        yield (
            "All ranks have begun the same number: if they hang, then inside the last one (network, GPU), or all of "
            "them before the next."
        )
    yield f"All of them, under NCCL: torchfrtrace --prefix {COLLECTIVES} {folder}    (-j lists them)"


def _collectives(rank: int, record: dict[str, Any]) -> Collectives:
    entries = record["entries"]
    if not entries:
        return Collectives(rank, "", 0, "none")
    last = entries[-1]
    sizes = " ".join("x".join(map(str, size)) for size in last["input_sizes"])
    frame = _own_frame(last["frames"])
    called = f", called in {Path(frame['filename']).name}, line {frame['line']}" if frame else ""
    text = f"{last['profiling_name']} of {sizes or 'no'} values, {last['state']}{called}"
    return Collectives(rank, str(last["process_group"][1]), int(last["collective_seq_id"]), text)


def _own_frame(frames: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the innermost line that is not torch's or DeepSpeed's."""
    own = [frame for frame in frames if not any(part in frame["filename"] for part in _OF_LIBRARIES)]
    return next(iter(own or frames), None)


def _by_rank(folder: Path, prefix: str, suffix: str) -> dict[int, Path]:
    found = {path: re.fullmatch(rf"{prefix}(\d+){re.escape(suffix)}", path.name) for path in folder.glob(f"{prefix}*")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def _last_reason(path: Path) -> str | None:
    reasons = re.findall(r"^== (.*)$", path.read_text(encoding="utf-8", errors="replace"), flags=re.M)
    own = [reason for reason in reasons if "dataloader worker" not in reason]
    return own[-1] if own else None
