"""Trackers of a run: how they are opened, and how a run is kept from waiting for one or ending with it.

The run directory has everything in any case; a tracker that fails costs its own records and no step.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from tinygptv_ds.config.load import recipe_dict
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.trackers.tracker import TrackedRun, Tracker

_MOST_WAITING = 10_000  # lines that a slow tracker may be behind
_SECONDS_TO_START = 60.0
_SECONDS_TO_SEND = 90.0  # at the end of a run
_SECONDS_AFTER_ERROR = 10.0


def check_trackers(recipe: Recipe) -> None:
    """Raise ConfigError where `train.trackers` names one whose package is not installed; imports none."""
    for name in recipe.train.trackers:
        found = importlib.util.find_spec(name)
        # A package that is not installed may still be found as a folder in the path, e.g. `wandb/` of an earlier run.
        if found is None or found.origin is None:
            raise ConfigError(
                f"train.trackers names {name}, but the package {name} is not installed: "
                f"'pip install {name}', or --set train.trackers=[]"
            )


def open_trackers(recipe: Recipe, run_dir: Path) -> Trackers:
    """Start or resume the run in every tracker that the recipe names; one that cannot be reached is left out."""
    run = TrackedRun(recipe.train.tracker_project, run_dir, recipe_dict(recipe))
    return Trackers([_InBackground(name, _class_of(name), run) for name in recipe.train.trackers])


class Trackers:
    """All trackers of a run, each with a thread that sends; without any this does nothing."""

    def __init__(self, opened: list[_InBackground]) -> None:
        self._opened = opened

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand metrics over; returns at once."""
        for each in self._opened:
            each.log(metrics, step)

    def finish(self, *, completed: bool) -> None:
        """Wait until everything is sent, for a limited time."""
        for each in self._opened:
            each.finish(completed=completed)


class _InBackground:
    """A tracker whose every call is made in one thread and whose failure is a warning.

    Its start is waited for. It takes place in the thread as well: in the main one, SwanLab would take SIGINT over.
    """

    def __init__(self, name: str, kind: Callable[[TrackedRun], Tracker], run: TrackedRun) -> None:
        self._name = name
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._failed, self._started = False, threading.Event()
        self._thread = threading.Thread(target=self._work, args=(kind, run), name=f"tracker {name}", daemon=True)
        self._thread.start()
        if not self._started.wait(_SECONDS_TO_START):
            self._fail(f"it has not answered in {_SECONDS_TO_START:.0f} s")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        copied = dict(metrics)
        self._put(lambda tracker: tracker.log(copied, step))

    def finish(self, *, completed: bool) -> None:
        self._put(lambda tracker: tracker.finish(completed=completed))
        self._put(None)
        if not self._failed:
            self._thread.join(_SECONDS_TO_SEND if completed else _SECONDS_AFTER_ERROR)
            if self._thread.is_alive():
                LOGGER.warning("%s has not taken everything in time; the run directory has it all", self._name)

    def _put(self, call: Callable[[Tracker], None] | None) -> None:
        if self._failed:
            return
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            self._fail(f"it is {_MOST_WAITING} lines behind")

    def _work(self, kind: Callable[[TrackedRun], Tracker], run: TrackedRun) -> None:
        try:
            tracker = kind(run)
            self._started.set()
            while (call := self._waiting.get()) is not None and not self._failed:
                call(tracker)
        except Exception as error:  # whatever the package or the network raises: training does not depend on it
            self._fail(" ".join(str(error).split())[:300] or type(error).__name__)
            self._started.set()

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            LOGGER.warning("%s cannot be used (%s); training continues without it", self._name, reason)


def _class_of(name: str) -> Callable[[TrackedRun], Tracker]:
    """Return the class of a tracker; its package is imported here."""
    if name == "wandb":
        from tinygptv_ds.train.trackers.wandb import WandbRun

        return WandbRun
    if name == "mlflow":
        from tinygptv_ds.train.trackers.mlflow import MlflowRun

        return MlflowRun
    from tinygptv_ds.train.trackers.swanlab import SwanlabRun

    return SwanlabRun
