"""A run on one rank: what the training loop and its callbacks share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.loader.workers import OnHang
from tinygptv_ds.distributed import Ranks
from tinygptv_ds.train.callbacks.callback import Callback
from tinygptv_ds.train.cuda_graphs import MicroBatchGraphs
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.liveness.progress import Progress
from tinygptv_ds.train.metrics.stopwatch import TrainingClock
from tinygptv_ds.train.setup.job import Job


@dataclass
class Run:
    """An engine with what surrounds it on this rank.

    Attributes:
        job: recipe, DeepSpeed JSON, run directory and ranks.
        engine: the DeepSpeed engine around the model.
        progress: the phase of this rank, for the watchdog.
        first_step: the step that the run starts or resumes at, counted from 0.
        on_hang: writes the stacks of dataloader workers that hang; None: no watchdog is running.
        callbacks: live as long as the run and are called after those of the training loop.
        clock: seconds of training, without those of validation, saving and the like.
        began: when this attempt was ready to train, by the monotonic clock.
        graphs: run small micro-batches as CUDA graphs; None: none does.
        ends_at: optimizer steps after which the run ends before the job's last one; None: it does not.
    """

    job: Job
    engine: Engine
    progress: Progress
    first_step: int = 0
    on_hang: OnHang | None = None
    callbacks: Sequence[Callback] = ()
    clock: TrainingClock = field(default_factory=TrainingClock)
    began: float = field(default_factory=time.monotonic)
    graphs: MicroBatchGraphs | None = None
    ends_at: int | None = None

    @property
    def last_step(self) -> int:
        """Optimizer steps after which the run ends."""
        return self.job.last_step if self.ends_at is None else self.ends_at

    @property
    def recipe(self) -> Recipe:
        """The recipe of the job."""
        return self.job.recipe

    @property
    def ranks(self) -> Ranks:
        """This process among the ranks."""
        return self.job.ranks
