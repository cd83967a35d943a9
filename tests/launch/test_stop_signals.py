"""A signal to what the user has started, the script or the launcher: two ranks save, end, and leave nothing behind."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.launcher import bash_form, deepspeed_form, run
from helpers.patience import PATIENCE

from tinygptv_ds.train.checkpoint.folders import complete_ones, step_of


def after(path: Path, number: int) -> Callable[[int], None]:
    """Send a signal to one process, no other, once a file is there."""

    def send(pid: int) -> None:
        until = time.monotonic() + PATIENCE
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(pid, number)

    return send


@pytest.mark.parametrize(
    ("form", "number", "code"),
    [
        (bash_form, signal.SIGUSR1, 138),  # the script passes it on, and ends as the ranks do
        (deepspeed_form, signal.SIGTERM, -signal.SIGTERM),  # `deepspeed` dies of it at once, which the ranks notice
    ],
)
def test_one_process_is_signaled(
    form: Callable[[int], list[str]],
    number: signal.Signals,
    code: int,
    raw_recipe: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    raw = raw_recipe(train__steps_per_epoch=100_000, train__checkpoint_every=3, data__num_workers=1)
    recipe, folder = tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run"
    send_signal = after(folder / "checkpoints/step-00000003", number)
    done = run(form(4), recipe, folder, ok=False, meanwhile=send_signal)
    assert done.code == code, done.output
    (step,) = re.findall(r"stopped: SIG\w+ at step (\d+) of 100000; saved", done.output)
    assert f"stopped: {number.name} at" in done.output and "Traceback" not in done.output, done.output
    assert int(step) == step_of(complete_ones(folder / "checkpoints")[-1]) == done.metrics[-1]["step"]
    assert not (folder / "model").exists()
