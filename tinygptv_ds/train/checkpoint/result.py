"""The result of a run: the trained weights in its `model/` folder."""

from __future__ import annotations

from tinygptv_ds.train.run import Run
from tinygptv_ds.weights.provenance import provenance_of
from tinygptv_ds.weights.trained import save_trained


def save_model(run: Run) -> None:
    """Gather the trained weights from all ranks and write `model/` on rank 0. Call on all ranks.

    It also holds the frozen weights that are not those of the base models' files, e.g. LoRA of the stage before.
    """
    trained = run.engine.trained_state()
    if run.ranks.is_main:
        model = run.engine.module
        state = model.frozen_updates | trained
        save_trained(state, model.config, run.job.run_dir / "model", provenance_of(run.recipe))
