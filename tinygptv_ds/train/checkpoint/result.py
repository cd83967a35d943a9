"""The result of a run: the trained weights in its `model/` folder."""

from __future__ import annotations

import shutil

from tinygptv_ds.files import whole_folder
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.checkpoint.best import FOLDER as BEST
from tinygptv_ds.train.run import Run
from tinygptv_ds.weights.provenance import provenance_of
from tinygptv_ds.weights.trained import save_trained

MODEL = "model"


def save_model(run: Run) -> None:
    """Write `model/` on rank 0: the trained weights, or those of `best/` where the recipe asks for the best ones.

    It also holds the frozen weights that are not those of the base models' files, e.g. LoRA of the stage before. Call
    on all ranks, which gather the trained weights. After `--evaluate-only` there is nothing to write.
    """
    if run.job.evaluate_only:
        return
    trained = run.engine.trained_state()
    if not run.ranks.is_main:
        return
    best, out = run.job.run_dir / BEST, run.job.run_dir / MODEL
    if run.recipe.train.result == "best":
        if best.is_dir():
            with whole_folder(out) as partial:
                shutil.copytree(best, partial, dirs_exist_ok=True)
            return
        LOGGER.warning("%s was never a number, so %s gets the last weights", run.recipe.train.keep_best, out)
    model = run.engine.module
    save_trained(model.frozen_updates | trained, model.config, out, provenance_of(run.recipe) | {"step": run.last_step})
