"""The learning rate of every step that the reference lists, exactly."""

import json
from pathlib import Path

import pytest

from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.train.schedule import learning_rate

STAGES = Path(__file__).parents[2] / "stages"


def test_curves(golden: Path) -> None:
    curves = json.loads((golden / "schedule/lr.json").read_bytes())
    assert curves
    for name, curve in curves.items():
        optimizer = OptimizerSection(
            lr=curve["init_lr"],
            min_lr=curve["min_lr"],
            warmup_lr=curve["warmup_start_lr"],
            warmup_steps=curve["warmup_steps"],
        )
        per_epoch = curve["iters_per_epoch"]
        assert curve["points"], name
        for step, _, _, expected in curve["points"]:
            ours = learning_rate(step, optimizer, steps_per_epoch=per_epoch, total_steps=curve["max_epoch"] * per_epoch)
            assert ours == expected, f"{name}, step {step}"


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_the_recipes_are_the_published_curves(stage: int) -> None:
    """The recipes are compared with the set in this repository; other sets may use other names."""
    curve = json.loads((Path(__file__).parent / "data/schedule/lr.json").read_bytes())[f"stage{stage}"]
    recipe = load_recipe(STAGES / f"stage{stage}.yaml")
    o, t = recipe.optimizer, recipe.train
    assert (o.lr, o.min_lr, o.warmup_lr, o.warmup_steps, o.weight_decay, t.epochs, t.steps_per_epoch) == tuple(
        curve[key]
        for key in (
            "init_lr",
            "min_lr",
            "warmup_start_lr",
            "warmup_steps",
            "weight_decay",
            "max_epoch",
            "iters_per_epoch",
        )
    )
