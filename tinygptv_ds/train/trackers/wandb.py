"""Weights & Biases as a tracker. `WANDB_MODE=offline` keeps everything in the run directory for `wandb sync`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import wandb

from tinygptv_ds.train.trackers.tracker import TrackedRun

_SECONDS_TO_START, _SECONDS_TO_SEND = 30, 60


class WandbRun:
    """A run in a project of Weights & Biases, which a resumed run continues.

    Steps are a metric of their own, `step`, the x axis of all others: the package's own steps may only ascend, and it
    drops what a resumed run logs again after its checkpoint.
    """

    def __init__(self, run: TrackedRun) -> None:
        stored = run.stored_id("wandb")
        chosen = stored or secrets.token_hex(8)
        self._run = wandb.init(
            project=run.project,
            name=run.run_dir.resolve().name,
            dir=str(run.run_dir),
            id=chosen,
            resume="allow",
            config=dict(run.config),
            settings=wandb.Settings(
                console="off",  # log.txt has it
                init_timeout=_SECONDS_TO_START,
                login_timeout=_SECONDS_TO_START,
                finish_timeout=_SECONDS_TO_SEND,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if stored is None:
            run.store_id("wandb", chosen)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics with their step."""
        self._run.log({**metrics, "step": step})

    def finish(self, *, completed: bool) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=0 if completed else 1)
