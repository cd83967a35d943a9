"""Checkpoints in DeepSpeed's own format, next to the portable ones, on disks that may be full."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinygptv_ds.distributed import Ranks, gather
from tinygptv_ds.files import write_atomically
from tinygptv_ds.log import held_prints
from tinygptv_ds.train.engine import Engine


def write_deepspeed_checkpoint(engine: Engine, folder: Path, tag: str, state: dict[str, Any]) -> str | None:
    """Write DeepSpeed's checkpoint of what is trained, with `state` inside, while training waits. Call on all ranks.

    A rank whose disk is full takes part in the collective calls that follow as the others do; then all ranks remove
    what they have written.

    Args:
        engine: trained so far.
        folder: gets the folder `tag`, and `latest` with its name.
        tag: the checkpoint's name.
        state: what it holds of ours.

    Returns:
        On every rank, why it could not be written; None: it is complete.
    """
    ranks = engine.ranks
    problem = _first(ranks, _attempt(lambda: (folder / tag).mkdir(parents=True, exist_ok=True)))
    if problem is None:
        with _failures_noted(engine.deepspeed.checkpoint_engine) as failures, held_prints():
            engine.deepspeed.save_checkpoint(
                str(folder),
                tag=tag,
                client_state={"tinygptv_ds": state},
                save_latest=False,  # it would be named although a rank has failed
                exclude_frozen_parameters=True,
            )
        problem = _first(ranks, failures[0] if failures else None)
    if problem is None and ranks.is_main:
        problem = _attempt(lambda: write_atomically(folder / "latest", tag.encode()))
    problem = _first(ranks, problem)
    if problem is not None:
        shutil.rmtree(folder / tag, ignore_errors=True)
    return problem


@contextmanager
def _failures_noted(writer: Any) -> Iterator[list[str]]:
    """Have DeepSpeed's checkpoint engine note what it cannot write: an error would leave the other ranks waiting."""
    failures: list[str] = []
    save = writer.save

    def guarded(state_dict: Any, path: str) -> None:
        failure = _attempt(lambda: save(state_dict, path))
        if failure is not None:
            failures.append(f"{path}: {failure}")

    writer.save = guarded
    try:
        yield failures
    finally:
        del writer.save


def _attempt(write: Callable[[], object]) -> str | None:
    """Return what kept this from being written; torch reports a full disk as RuntimeError."""
    try:
        write()
    except (OSError, RuntimeError) as error:
        return str(error).split("\n")[0]
    return None


def _first(ranks: Ranks, problem: str | None) -> str | None:
    """Return on all ranks the first of their problems."""
    return next((each for each in gather(ranks, problem) if each is not None), None)
