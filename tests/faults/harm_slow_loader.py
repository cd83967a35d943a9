"""Stage 4 as its script has it; rank 1's loader is slow, as from a failing disk, and `wandb` is a stand-in."""

import json
import os
import runpy
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from tinygptv_ds.cli import run_command
from tinygptv_ds.data.loader import Loaded, MicroBatches

SECONDS = 0.3 if os.environ.get("RANK") == "1" else 0.0  # a micro-batch takes 0.01 to 0.03 here
REPORT = Path(os.environ["REPORT"])


class Entry:
    """What `wandb.init` gives; everything goes into a file."""

    def __init__(self, **settings: Any) -> None:
        self._lines = [settings]

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._lines.append([step, scalars])

    def finish(self) -> None:
        (REPORT / "wandb.json").write_text(json.dumps(self._lines))


class SlowBatches(MicroBatches):
    def __getitem__(self, place: tuple[int, int]) -> Loaded:
        time.sleep(SECONDS)
        return super().__getitem__(place)


if __name__ == "__main__":
    wandb = ModuleType("wandb")
    wandb.init = Entry
    wandb.__spec__ = runpy.importlib.machinery.ModuleSpec("wandb", None)
    sys.modules["wandb"] = wandb
    from tinygptv_ds.train import loop

    loop.MicroBatches = SlowBatches
    run_command(runpy.run_path(str(Path(__file__).parents[2] / "stages/stage4.py"))["main"])
