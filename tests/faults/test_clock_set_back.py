"""A clock that is set back by hours in the middle of a run, as by ntpd: nothing in the run depends on it."""

import ast
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.forked import ended
from rank_clock import set_back

from tinygptv_ds.train.checkpoint.folders import complete_ones
from tinygptv_ds.train.metrics.board import FLUSH_SECONDS, open_board

ROOT = Path(__file__).parents[2]
# Where the time of the day is wanted: labels for people and clients, and the comparison of hosts' clocks.
LABELS = (
    "train/metrics/reporter.py",
    "train/trackers/mlflow.py",
    "apps/serve/routes.py",
    "apps/serve/reply.py",
    "doctor/ssh.py",
)
WALL_CLOCKS = ("time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.today")


def test_a_run(raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Rates stay positive, checkpoints by the minute are saved, workers are not taken for hung, and it ends."""
    limits = {"train__checkpoint_minutes": 1e-6, "train__step_minutes": 1, "data__read_timeout_seconds": 30}
    raw = raw_recipe(train__keep_checkpoints=9, train__sample_count=0, data__num_workers=1, **limits)
    run = ended(tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run", ranks=2, fault=set_back, at=2)
    times = [line["time"] for line in run.metrics]
    assert times[2] < times[1] - 3000 and times[3] < times[2] - 3000  # the clock was set back
    for line in run.metrics:
        assert 0 < line["perf/step_seconds"] < 60 and line["perf/samples_s"] > 0, line
        assert 0 <= line["perf/data_wait_pct"] <= 100, line
    assert [int(folder.name[5:]) for folder in complete_ones(run.folder / "checkpoints")] == [1, 2, 3, 4, 5, 6]
    assert not re.search("has given nothing|no sign of life|a whole step takes|Traceback", run.output), run.output
    assert re.search(r"^finished: 6 steps, 0:0\d:\d\d; ", run.output, flags=re.M)
    assert not re.search(r"ETA -|-\d:", run.output)


def test_the_board_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's own thread waits for the time of the day to come round."""
    board = open_board(tmp_path, None)
    board.add_scalar("first", 1.0, 1)
    board.flush()
    (events,) = tmp_path.iterdir()
    before, started = events.stat().st_size, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: 1e9)  # years ago
    board.add_scalar("second", 1.0, 2)
    monkeypatch.setattr(time, "monotonic", lambda: started + FLUSH_SECONDS + 1)
    board.add_scalar("third", 1.0, 3)
    for _ in range(1000):  # it is written in a thread
        time.sleep(0.01)
        if events.stat().st_size > before:
            break
    assert events.stat().st_size > before
    board.close()


@pytest.mark.parametrize("path", sorted((ROOT / "tinygptv_ds").rglob("*.py")), ids=lambda path: path.name)
def test_no_part_measures_time_by_it(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = [call.lineno for call in calls if ast.unparse(call.func) in WALL_CLOCKS]
    assert not found or str(path).endswith(LABELS), f"lines {found}: use time.monotonic or time.perf_counter"
