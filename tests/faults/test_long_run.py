"""Hundreds of steps of the real loop take no more memory, files or threads than the first ones.

`LONG_RUN_STEPS=2000 pytest tests/faults/test_long_run.py` takes more of them.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import tiny
from helpers.forked import ended
from rank_long_run import measured

STEPS = int(os.environ.get("LONG_RUN_STEPS", "400"))
GROWTH = 8_000_000  # bytes, of some 900 million


def test_nothing_grows(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """With a dataloader worker, log lines, checkpoints and a validation loss all along."""
    every = {"train__log_every": 5, "train__checkpoint_every": STEPS // 8, "train__validate_every": STEPS // 8}
    small = {"train__batch_size": 2, "train__micro_batch_size": 2, "train__sample_count": 0, "data__num_workers": 1}
    raw = raw_recipe(train__steps_per_epoch=STEPS, data__validation_share=0.2, **small, **every)
    # The least of twenty steps: the batches that are on their way hold files, and are not always alike.
    marks = tuple(range(begin, begin + 20) for begin in (STEPS // 4, STEPS // 2, STEPS - 22))
    run = ended(tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run", fault=measured, at=marks)
    lines = list(map(json.loads, (run.folder / "held.jsonl").read_text().splitlines()))
    first, middle, last = (
        {key: min(line[key] for line in lines if line["step"] in steps) for key in lines[0]} for steps in marks
    )
    assert run.metrics[-1]["step"] == STEPS
    for key in ("files", "threads", "workers", "worker_files"):
        assert last[key] <= first[key], (key, first, middle, last)
    for key in ("rss", "worker_rss"):
        assert last[key] - first[key] < GROWTH, (key, first, middle, last)
