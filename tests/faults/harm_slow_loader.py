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
            self._lines = [settings]

        def log(self, scalars: dict[str, float], step: int) -> None:
            self._lines.append([step, scalars])

        def finish(self) -> None:
            report.write_text(json.dumps(self._lines))

    wandb = ModuleType("wandb")
    wandb.init = Entry
    wandb.__spec__ = ModuleSpec("wandb", None, origin="this file")
    sys.modules["wandb"] = wandb
    if ranks_from_env().rank == rank:
        loop.MicroBatches = SlowBatches
