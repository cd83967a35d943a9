"""Faults for `forked.started`: a rank whose loader is slow, as from a failing disk, and a stand-in for `wandb`."""

import json
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.loader.dataset import MicroBatches
from tinygptv_ds.distributed import ranks_from_env
from tinygptv_ds.train import loop


def slow_rank(rank: int, seconds: float, report: Path) -> None:
    """Delay each micro-batch of one rank by so many seconds, and write what W&B is given into `report`."""

    class SlowBatches(MicroBatches):
        def __getitem__(self, place: tuple[int, int]) -> MicroBatch:
            time.sleep(seconds)
            return super().__getitem__(place)

    class Entry:
        """The run that `wandb.init` returns."""

        def __init__(self, **settings: Any) -> None:
            self._lines: list[Any] = [settings]

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            self._lines[0][name] = step_metric

        def log(self, data: dict[str, float]) -> None:
            self._lines.append(data)

        def finish(self, exit_code: int) -> None:
            report.write_text(json.dumps([*self._lines, exit_code]))

    wandb = ModuleType("wandb")
    wandb.init, wandb.Settings = Entry, lambda **settings: settings
    wandb.__spec__ = ModuleSpec("wandb", None, origin="this file")
    sys.modules["wandb"] = wandb
    if ranks_from_env().rank == rank:
        loop.MicroBatches = SlowBatches
