"""The best weights of a run by a metric on held-out samples, and the end of a run that no longer improves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from tinygptv_ds.distributed import broadcast_from_rank0
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.callbacks.callback import Callback
from tinygptv_ds.train.checkpoint.best import VALIDATION_LOSS, Best, read_best, write_best
from tinygptv_ds.train.run import Run


class KeepBest(Callback):
    """Keeps the weights with the best value of a metric in `best/`, and ends a run that stops improving.

    Settings: `train.keep_best`, `train.patience`. Metrics: none.

    Everything is derived from `best/`, which is replaced as a whole: a run that was killed continues with the best
    weights that it had, and with as many measurements since then.

    Args:
        run: the run on this rank.
    """

    def __init__(self, run: Run) -> None:
        train, evaluation = run.recipe.train, run.recipe.evaluation
        self._run = run
        self._metric = None if run.job.evaluate_only else train.keep_best
        self._patience = train.patience
        self._every = train.validate_every if self._metric == VALIDATION_LOSS else evaluation.every
        self._best: Best | None = None
        metric = self._metric
        if metric is not None:
            self._best = self._from_rank0(lambda: read_best(run, metric))
            self._end_if_stale(run.first_step)

    def on_measure(self, done: int, metrics: Mapping[str, float]) -> None:
        """Keep the weights if they are the best so far, and end the run if they have not been for too long."""
        metric = self._metric
        if metric is None or metric not in metrics:
            return
        found = self._from_rank0(lambda: Best(metric, metrics[metric], done))
        if found is not None and self._is_better(found):
            self._keep(found)
        self._end_if_stale(done)

    def _is_better(self, found: Best) -> bool:
        if not math.isfinite(found.value):
            return False
        if self._best is None:
            return True
        lower = self._metric == VALIDATION_LOSS
        return found.value < self._best.value if lower else found.value > self._best.value

    def _keep(self, found: Best) -> None:
        """Write the weights on rank 0; where the disk refuses, the earlier ones stay the best."""
        state = self._run.engine.trained_state()
        self._best = self._from_rank0(lambda: self._written(state, found))

    def _written(self, state: Mapping[str, Tensor], found: Best) -> Best | None:
        try:
            write_best(self._run, state, found)
        except OSError as error:
            LOGGER.warning("step %d: the best weights could not be written (%s); training continues", found.step, error)
            return self._best
        LOGGER.info("step %d: %s %.4f is the best so far, kept in best/", found.step, found.metric, found.value)
        return found

    def _end_if_stale(self, done: int) -> None:
        """End the run after `done` steps if that is what `train.patience` asks for."""
        run = self._run
        if not self._patience or self._best is None or done >= run.last_step:
            return
        since = done // self._every - self._best.step // self._every
        if since >= self._patience:
            LOGGER.info(
                "step %d: ending early, %s has not been better than %.4f (step %d) in %d measurements (train.patience)",
                done,
                self._metric,
                self._best.value,
                self._best.step,
                since,
            )
            run.ends_at = done

    def _from_rank0(self, find: Callable[[], Best | None]) -> Best | None:
        """Return what rank 0 finds, so that all ranks decide alike."""

        def plain() -> dict[str, Any] | None:
            best = find()
            return None if best is None else asdict(best)

        found = broadcast_from_rank0(self._run.ranks, plain)
        return None if found is None else Best(**found)
