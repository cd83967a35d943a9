"""The folder `best/` of a run: trained weights as in `model/`; its `provenance.json` has the metric that chose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.files import remove
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.run import Run
from tinygptv_ds.weights.detect import PROVENANCE
from tinygptv_ds.weights.io import read_json
from tinygptv_ds.weights.provenance import provenance_of
from tinygptv_ds.weights.trained import save_trained

FOLDER = "best"
VALIDATION_LOSS = "val/loss"


@dataclass(frozen=True)
class Best:
    """The best value of a metric so far, and the optimizer steps after which it was measured."""

    metric: str
    value: float
    step: int


def measured_on(recipe: Recipe, metric: str) -> dict[str, Any]:
    """Return what a metric is measured on, as JSON holds it: values on other samples cannot be compared."""
    if metric == VALIDATION_LOSS:
        return {
            "validation": [section.name for section in recipe.data.validation],
            "validation_share": recipe.data.validation_share,
            "validation_samples": recipe.train.validation_samples,
        }
    section = recipe.evaluation
    name = metric.removeprefix("eval/").rpartition("/")[0]
    (scored,) = (each for each in section.benchmarks if each.label == name)
    return {**asdict(scored), "limit": section.limit, "max_new_tokens": section.max_new_tokens}


def write_best(run: Run, state: Mapping[str, Tensor], best: Best) -> None:
    """Replace `best/` as a whole by these weights; called on rank 0.

    Args:
        run: the run.
        state: its trained weights.
        best: what they have reached.

    Raises:
        OSError: the folder could not be written; the earlier one is intact.
    """
    model, out = run.engine.module, run.job.run_dir / FOLDER
    notes = {"step": best.step, "best": {**asdict(best), "measured_on": measured_on(run.recipe, best.metric)}}
    save_trained({**model.frozen_updates, **state}, model.config, out, provenance_of(run.recipe) | notes)


def read_best(run: Run, metric: str) -> Best | None:
    """Return what the weights in `best/` have reached; None where there are none, or by another measure.

    One that was left behind by an attempt without a checkpoint is removed. Called on rank 0.
    """
    folder = run.job.run_dir / FOLDER
    replaced = folder.with_name(f"{FOLDER}.old")  # a kill between the two renames of its replacement leaves only this
    if run.first_step == 0:
        for leftover in (folder, replaced):
            remove(leftover)
        return None
    if replaced.is_dir() and not folder.is_dir():
        replaced.rename(folder)
    if not folder.is_dir():
        return None
    try:
        noted = read_json(folder / PROVENANCE)["best"]
        samples = noted.pop("measured_on")
        best = Best(**noted)
    except (WeightsError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        LOGGER.warning("%s cannot be read (%s); the next measurement is taken for the best", folder / PROVENANCE, error)
        return None
    if best.metric != metric or samples != measured_on(run.recipe, metric):
        LOGGER.warning(
            "%s was chosen by %s on other samples or settings than this recipe's %s; the next measurement replaces it",
            folder,
            best.metric,
            metric,
        )
        return None
    return best
