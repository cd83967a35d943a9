"""`--evaluate-only`: the measurements of a training for weights that exist, and nothing else happens."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import forked

from tinygptv_ds.errors import ConfigError
from tinygptv_ds.train.setup.job import parse_job

VALIDATED = {"data__validation_share": 0.25, "train__steps_per_epoch": 2, "train__sample_count": 0}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a run but its log and lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("log.txt", "lock.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_is_measured_and_left_as_it_is(
    recipe_file: Callable[..., Path], shards: dict[str, Path], tmp_path: Path
) -> None:
    """The validation loss of an earlier checkpoint is that of the training at its step."""
    scored = {"benchmarks": [{"kind": "vqa", "shards": str(shards["vqa"])}], "limit": 2, "max_new_tokens": 2}
    kept = {"train__validate_every": 1, "train__checkpoint_every": 1, "train__keep_best": "val/loss"}
    recipe, folder = recipe_file(**VALIDATED, **kept, evaluation=scored), tmp_path / "run"
    trained = forked.ended(recipe, folder)
    losses = {line["step"]: line["val/loss"] for line in trained.metrics if "val/loss" in line}
    before = contents(folder)
    measured = forked.ended(recipe, folder, "--evaluate-only", "--resume", str(folder / "checkpoints/step-00000001"))
    assert f"step 1: validation loss {losses[1]:.4f} " in measured.output
    assert re.search(r"step 1: vqa: strict [\d.]+", measured.output) and "step 2" not in measured.output
    after = contents(folder)
    assert after.pop("evaluation/step-00000001/vqa.json")
    assert after == before


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, [], r"--evaluate-only: the recipe names nothing to measure; name datasets in data\.validation"),
        (VALIDATED, ["--dry-run"], "--dry-run is of a training, --evaluate-only of none"),
        (VALIDATED, ["--resume", "nowhere"], "--resume nowhere: there is no such folder"),
    ],
)
def test_mistakes(
    changes: dict[str, Any], options: list[str], message: str, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    argv = ["--recipe", str(recipe_file(**changes)), "--run-dir", str(tmp_path / "run"), "--evaluate-only", *options]
    with pytest.raises(ConfigError, match=message):
        parse_job([*argv, f"--deepspeed_config={forked.CPU}"], Path("stages/stage4.yaml"))
