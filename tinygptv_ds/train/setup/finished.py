"""A run directory whose training is finished: reused by the same command, refused by another. No torch."""

from __future__ import annotations

from pathlib import Path

from tinygptv_ds.config.load import dotted_values, load_recipe, recipe_dict
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import ConfigError, Finished
from tinygptv_ds.files import fingerprint_differences
from tinygptv_ds.train.checkpoint.folders import FOLDER, complete_ones

_MODEL, _WEIGHTS, _RECIPE, _PROVENANCE = "model", "trained.safetensors", "recipe.yaml", "provenance.json"


def check_finished(run_dir: Path, recipe: Recipe, resume: str) -> None:
    """Check whether a run directory holds a finished run.

    Raises:
        Finished: it does, of the same recipe, so that a script over several stages can be run again.
        ConfigError: it does, of another recipe, or it began from weights that have been trained again since.
    """
    if not (run_dir / _MODEL).exists():
        return
    if not (run_dir / _MODEL / _WEIGHTS).is_file():
        raise ConfigError(
            f"{run_dir / _MODEL} holds no {_WEIGHTS}: it is not complete; remove it, and the same command finishes the "
            "run from its newest checkpoint"
        )
    found = complete_ones(run_dir / FOLDER)
    longer = (
        f"; to train it for longer, --run-dir ANOTHER --resume {found[-1]} --resume-anyway with more train.epochs"
        if found
        else ""
    )
    reason = _why_not_reused(run_dir, recipe, resume)
    if reason is None:
        raise Finished(f"{run_dir} is complete: reused. To train it again, remove it{longer}")
    raise ConfigError(
        f"{run_dir} holds a finished run (its model/ is there, for model.init_from of the next stage), {reason}; "
        f"choose another --run-dir or remove it{longer}"
    )


def _why_not_reused(run_dir: Path, recipe: Recipe, resume: str) -> str | None:
    """Return why a finished run is not what this command asks for; None: it is."""
    if resume != "auto":
        return f"which --resume {resume} does not go on from"
    try:
        trained = dotted_values(recipe_dict(load_recipe(run_dir / _RECIPE)))
    except ConfigError as error:
        return f"whose recipe cannot be compared ({error})"
    wanted = dotted_values(recipe_dict(recipe))
    differing = list(fingerprint_differences(trained, wanted, recorded_in="there").values())
    if differing:
        return f"of another recipe ({'; '.join(differing[:3])}{', ...' if len(differing) > 3 else ''})"
    start = recipe.model.init_from
    if start is not None and _written(Path(start)) > _written(run_dir):
        return f"but {start}, which it began from, has been written since"
    return None


def _written(run: Path) -> int:
    """Return when the weights of a run, or of a file, were written, in nanoseconds; 0: they are not there."""
    for path in (run / _MODEL / _PROVENANCE, run / _PROVENANCE, run):
        if path.is_file():
            return path.stat().st_mtime_ns
    return 0
