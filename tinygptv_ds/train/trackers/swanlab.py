"""SwanLab as a tracker. `SWANLAB_MODE=offline` or `local` keeps everything in the run directory."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import swanlab

from tinygptv_ds.train.trackers.tracker import TrackedRun


class SwanlabRun:
    """An experiment in a project of SwanLab, which a resumed run continues; steps may be logged again."""

    def __init__(self, run: TrackedRun) -> None:
        stored = run.stored_id("swanlab")
        chosen = stored or secrets.token_hex(8)
        folder = run.run_dir / "swanlog"
        folder.mkdir(exist_ok=True)
        settings = swanlab.Settings(
            interactive=False,  # the other ranks would wait for an answer
            terminal=swanlab.Settings.Terminal(proxy_type="none"),  # log.txt has what is printed
        )
        self._run = swanlab.init(
            project=run.project,
            name=run.run_dir.resolve().name,
            log_dir=str(folder),
            id=chosen,
            resume="allow",
            config=dict(run.config),
            settings=settings,
        )
        if stored is None:
            run.store_id("swanlab", chosen)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics with their step."""
        self._run.log(dict(metrics), step=step)

    def finish(self, *, completed: bool) -> None:
        """Wait until everything is sent."""
        if completed:
            self._run.finish()
        else:
            self._run.finish("aborted", "the run has stopped before its last step")
