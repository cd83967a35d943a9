"""Fetching a checkpoint from the mirror to a run directory that has none, or only older ones."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tinygptv_ds.errors import CheckpointError, ObjectStorageError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.object_storage import RemoteFolders
from tinygptv_ds.train.checkpoint.folders import FOLDER, complete_ones, is_complete, step_of
from tinygptv_ds.train.checkpoint.resume import check_fingerprint, verify
from tinygptv_ds.train.checkpoint.storage import STATE
from tinygptv_ds.train.setup.job import Job


def fetch_newer_checkpoint(job: Job, fingerprint: dict[str, Any]) -> None:
    """Fetch the mirror's newest checkpoint, where it is newer than those of the run directory.

    Call on rank 0, which holds the lock, before `choose_checkpoint`. Damaged ones are named in the log.

    Raises:
        CheckpointError: it is of another recipe, other data or other base weights; `--resume never` was given; or all
            checkpoints there are damaged, and the run directory has none.
        ObjectStorageError: the mirror cannot be read.
    """
    url = job.recipe.train.mirror
    if url is None or job.dry_run or job.evaluate_only:
        return
    remote = RemoteFolders(url)
    names = [name for name in remote.names(FOLDER) if is_complete(Path(name))]
    if job.resume == "never" and names:
        raise CheckpointError(f"{remote} holds checkpoints; choose another train.mirror, or --resume auto")
    if job.resume != "auto":
        return
    own = job.run_dir / FOLDER
    have = _newest_intact(own)
    newer = [name for name in names if step_of(Path(name)) > have]
    for name in reversed(newer):
        if _fetch(remote, name, own, job, fingerprint):
            return
    if newer and have < 0:
        raise CheckpointError(
            f"none of the {len(newer)} checkpoint(s) in {remote}/{FOLDER} is intact; the log above says why. Begin "
            "again with another train.mirror"
        )


def _fetch(remote: RemoteFolders, name: str, own: Path, job: Job, fingerprint: dict[str, Any]) -> bool:
    """Fetch one checkpoint; return False, with a warning, where it is damaged."""
    began, where = time.perf_counter(), f"{FOLDER}/{name}"
    try:
        state = json.loads(remote.read(where, STATE))
        check_fingerprint(job, f"{remote}/{where}", state["must_match"], fingerprint)
        remote.get(where, own / name)
    except (ObjectStorageError, ValueError, KeyError, TypeError) as error:
        LOGGER.warning("%s/%s cannot be used (%s); trying the checkpoint before", remote, where, error)
        return False
    LOGGER.info("fetched %s/%s in %.1f s", remote, where, time.perf_counter() - began)
    return True


def _newest_intact(checkpoints: Path) -> int:
    """Return the step of the newest checkpoint that can be resumed from; -1: there is none."""
    for folder in reversed(complete_ones(checkpoints)):
        try:
            verify(folder)
        except CheckpointError:  # `choose_checkpoint` names it
            continue
        return step_of(folder)
    return -1
