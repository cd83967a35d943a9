"""`--dry-run`: two real steps of many, a checkpoint, a result, figures of all of it, and nothing left behind."""

import re
from collections.abc import Callable
from pathlib import Path

from helpers.launcher import one_process, run


def test_a_dry_run(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_file(train__steps_per_epoch=500, train__checkpoint_every=1, train__log_every=100)
    left = tmp_path / "run.dry-run"  # of one that was killed
    (left / "checkpoints/step-00000001").mkdir(parents=True)
    before = set(tmp_path.iterdir()) - {left}
    done = run(one_process(4), recipe, tmp_path / "run", "--dry-run")
    assert set(tmp_path.iterdir()) == before
    assert "dry run: 2 of 500 steps done, losses 5." in done.output
    assert re.search(r"time: \d+\.\d+ s for the last step .* hours at most for all", done.output)
    assert re.search(r"memory: [\d.]+ GiB at its peak", done.output)
    written = re.search(
        r"would write to (\S+): log and metrics; checkpoints of ([\d.]+) MB .* ([\d.]+) MB\n", done.output
    )
    assert written is not None and written[1] == str(tmp_path / "run")
    assert float(written[2]) > float(written[3]) > 0
