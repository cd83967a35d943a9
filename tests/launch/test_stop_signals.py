"""SIGTERM to what the user has started, the script or the launcher: two ranks save, end, and leave nothing behind."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from launcher import Run, bash_form, deepspeed_form, run

from tinygptv_ds.train.checkpoint import complete_ones, step_of


def after(path: Path, number: int) -> Callable[[int], None]:
    """Send a signal to one process, no other, once a file is there."""

    def send(pid: int) -> None:
        until = time.monotonic() + 120
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(pid, number)

    return send


def saved(folder: Path) -> int:
    return step_of(complete_ones(folder / "checkpoints")[-1])


def test_a_signal_to_the_script_and_one_to_the_launcher(
    raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The script passes SIGUSR1 on and ends as the ranks do; `deepspeed` dies at once, which the ranks notice."""
    raw = raw_recipe(train__steps_per_epoch=100_000, train__checkpoint_every=3, data__num_workers=1)
    recipe, folder = tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run"

    def stopped(command: list[str], number: int, word: str) -> tuple[Run, int]:
        first = folder / f"checkpoints/step-{3 + (saved(folder) if folder.exists() else 0) // 3 * 3:08d}"
        done = run(command, recipe, folder, ok=False, meanwhile=after(first, number))
        (step,) = re.findall(rf"stopped: {word} at step (\d+) of 100000; saved", done.output)
        assert int(step) == saved(folder) == done.metrics[-1]["step"] and not (folder / "model").exists()
        assert "Traceback" not in done.output, done.output
        return done, int(step)

    done, step = stopped(bash_form(4), signal.SIGUSR1, "SIGUSR1")
    assert done.code == 138, done.output
    again, further = stopped(deepspeed_form(4), signal.SIGTERM, "SIGTERM")
    assert again.code == -signal.SIGTERM, again.output  # of which the launcher itself died: 143 to a shell
    assert f"step-{step:08d}" in again.output and further > step
