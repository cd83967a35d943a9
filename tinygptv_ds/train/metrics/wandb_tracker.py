"""Weights & Biases, an optional extra: the run directory has everything in any case."""

from __future__ import annotations

import importlib.util
import json
import secrets
from pathlib import Path

from tinygptv_ds.config.load import recipe_dict
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import whole_file


def check_tracking(recipe: Recipe) -> None:
    """Raise ConfigError where `train.wandb` names a project and the package is not installed; does not import it."""
    found = None if recipe.train.wandb is None else importlib.util.find_spec("wandb")
    # A package that is not installed may still be found as a folder `wandb/` in the path, left by an earlier run.
    if recipe.train.wandb is not None and (found is None or found.origin is None):
        raise ConfigError(
            f"train.wandb is {recipe.train.wandb!r}, but the package wandb is not installed: 'pip install wandb' and "
            "'wandb login', or --set train.wandb=null"
        )


class WandbTracker:
    """The scalars of a run in a project of Weights & Biases; without a project it does nothing.

    A resumed run continues the same entry there, whose id is kept in the run directory's `wandb.json`.
    """

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self._run = None
        if recipe.train.wandb is None:
            return
        import wandb

        self._run = wandb.init(
            project=recipe.train.wandb,
            name=run_dir.name,
            dir=str(run_dir),
            id=_id(run_dir / "wandb.json"),
            resume="allow",
            config=recipe_dict(recipe),
        )

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Send scalars under their TensorBoard names."""
        if self._run is not None:
            self._run.log(scalars, step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        if self._run is not None:
            self._run.finish()


def _id(file: Path) -> str:
    try:
        return str(json.loads(file.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged
        made = secrets.token_hex(8)
    with whole_file(file) as partial:
        partial.write_text(json.dumps({"id": made}) + "\n")
    return made
