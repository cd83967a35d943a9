"""The flat file for readers trains as the trainer does: same samples, same order, same losses, same result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.forked import CPU, ended, launched
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_losses_are_the_trainers(ranks: int, raw_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = raw_recipe(train__sample_count=0, model__resid_dropout=0.1, model__lora_dropout=0.05)
    trainer = ended(tiny.write_recipe(tmp_path / "recipe.yaml", raw), tmp_path / "run", ranks=ranks)
    deepspeed = {key: value for key, value in json.loads(CPU.read_text()).items() if key != "comment"}
    train, optimizer = raw["train"], raw["optimizer"]
    constants = {
        "MODEL": raw["model"],
        "DATASETS": raw["data"]["datasets"],
        "TEXT": raw["text"],
        "NUM_WORKERS": 0,
        "SEED": raw["seed"],
        "STEPS": train["steps_per_epoch"],
        "BATCH_SIZE": train["batch_size"],
        "MICRO_BATCH_SIZE": train["micro_batch_size"],
        "LR": optimizer["lr"],
        "MIN_LR": optimizer["min_lr"],
        "WARMUP_LR": optimizer["warmup_lr"],
        "WARMUP_STEPS": optimizer["warmup_steps"],
        "DEEPSPEED": deepspeed,
    }
    folder = tmp_path / "minimal"
    folder.mkdir()
    (folder / "constants.json").write_text(json.dumps(constants))
    script = "tests/stages/run_minimal.py"
    with launched(script, [str(folder / "constants.json")], folder, ranks=ranks) as run:
        assert run.end() == [0] * ranks, run.output
    assert json.loads((folder / "losses.json").read_text()) == pytest.approx(tiny.losses(trainer.folder), rel=1e-12)
    ours, theirs = (load_file(path / "model/trained.safetensors") for path in (folder, trainer.folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_is_short() -> None:
    assert len((ROOT / "stages/minimal.py").read_text().splitlines()) <= 200
