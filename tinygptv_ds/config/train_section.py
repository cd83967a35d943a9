"""The train section of a recipe: how long, how much at once, what is reported and kept. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tinygptv_ds.config.limits import MOST_STEPS, check_limits
from tinygptv_ds.errors import ConfigError, require, shown

TRACKERS = ("wandb", "mlflow", "swanlab")  # names of packages


@dataclass(frozen=True)
class TrainSection:
    """How long, how much at once, what is reported."""

    batch_size: int
    """Samples of one optimizer step over all GPUs: micro_batch_size x GPUs x gradient accumulation."""

    micro_batch_size: int | None = None
    """Samples of one forward pass on one GPU; null where `max_tokens` is given."""

    max_tokens: int | None = None
    """Instead of micro_batch_size: as many samples as have about this many tokens together, image tokens included. A
    longer sample is skipped and counted."""

    cuda_graph_tokens: int = 0
    """Micro-batches of at most this many tokens (image tokens included) run as CUDA graphs, padded to a few sizes: for
    batches that leave the GPU waiting for the host, on one GPU, with a frozen ViT and Q-Former. 0: none."""

    cycles: int = 1
    """Runs in a row, each from the weights of the previous one with a fresh optimizer and schedule; the samples
    continue. The published stage 1 was run 17 times."""

    epochs: int = 1
    """Epochs of one cycle, each of `steps_per_epoch`."""

    steps_per_epoch: int = 1000
    """Optimizer steps of an epoch of the schedule."""

    loss_reduction: str = "step_mean"
    """step_mean: the mean over the target tokens of the whole step; micro_batch_mean: the original's mean over each
    micro-batch."""

    log_every: int = 10
    """Steps between log lines."""

    sample_every: int = 0
    """Steps between panels of generated answers on TensorBoard; 0: only at the end."""

    sample_count: int = 4
    """Images of a panel."""

    validate_every: int = 0
    """Steps between validation losses, on `data.validation` or on what `data.validation_share` holds out; 0: only at
    the end."""

    validation_samples: int = 200
    """Samples of each dataset that the validation loss is computed on, the same each time."""

    max_overflows: int = 30
    """fp16 only: the run ends after this many steps in a row that overflow, each skipped with the loss scale halved. In
    bf16 and fp32 the first non-finite loss or gradient ends it."""

    trackers: list[str] = field(default_factory=list)
    """Experiment trackers that get every metric as well: wandb, mlflow, swanlab (docs/train/monitoring.md)."""

    tracker_project: str = "tinygptv"
    """Project (MLflow: experiment) of the run in these trackers."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; 0: none by steps. One is written at the end in any case."""

    checkpoint_minutes: float = 0.0
    """Minutes between checkpoints, by rank 0's clock; 0: none by time. Both may be given."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; older ones are removed."""

    keep_every: int = 0
    """Older checkpoints whose step is a multiple of this are kept, too; 0: none."""

    keep_best: str | None = None
    """Metric whose best weights are kept in the run directory's `best/`: val/loss (the lowest), or a score by its
    metric, e.g. eval/vqa/strict (the highest); null: none."""

    patience: int = 0
    """Training ends after this many measurements of `keep_best` in a row without a better one; 0: never early."""

    result: str = "last"
    """Weights that `model/` gets at the end: last, or best (those of `keep_best`)."""

    deepspeed_checkpoints: bool = False
    """Write each checkpoint in DeepSpeed's own format as well, while training waits."""

    mirror: str | None = None
    """URL in object storage, e.g. s3://bucket/runs/stage3, that checkpoints and `model/` are copied to in the
    background; a start on another machine, with an empty run directory, resumes from there. null: none."""

    startup_minutes: float = 60.0
    """Time limit in minutes for loading and the first step, and later for a save, a validation or a panel."""

    step_minutes: float = 20.0
    """Time limit in minutes for any other step, its wait for data included; then the run ends with the stacks of all
    ranks written. 0: no limit."""

    slow_step_seconds: float = 60.0
    """A step that takes this many seconds, and five times the median so far, is reported with the stacks of all ranks;
    0: never."""

    lost_after_seconds: float = 60.0
    """Seconds without a sign of life after which a rank counts as lost, and the others end. A process that exits is
    noticed at once. 0: ranks exchange no signs of life."""

    def __post_init__(self) -> None:
        check_limits("train", self, batch_size=10_000_000, micro_batch_size=10_000_000, max_tokens=100_000_000)
        check_limits("train", self, cuda_graph_tokens=1_000_000)
        check_limits("train", self, checkpoint_minutes=1e6, startup_minutes=1e6, step_minutes=1e6)
        check_limits("train", self, slow_step_seconds=1e8, lost_after_seconds=1e8, sample_count=1000)
        check_limits("train", self, validation_samples=MOST_STEPS)
        require(
            self.total_steps <= MOST_STEPS,
            f"train.cycles x train.epochs x train.steps_per_epoch must be at most {MOST_STEPS:,} steps, "
            f"not {shown(self.total_steps)}",
        )
        positive = ("batch_size", "cycles", "epochs", "steps_per_epoch", "log_every", "validation_samples")
        for name in (*positive, "max_overflows", "keep_checkpoints", "startup_minutes"):
            require(getattr(self, name) > 0, f"train.{name} must be positive")
        sizes = [size for size in (self.micro_batch_size, self.max_tokens) if size is not None]
        require(
            len(sizes) == 1,
            "give either train.micro_batch_size (samples) or train.max_tokens, and null for the other",
        )
        require(sizes[0] > 0, "train.micro_batch_size and train.max_tokens must be positive")
        steps = (
            "cuda_graph_tokens",
            "sample_every",
            "sample_count",
            "validate_every",
            "checkpoint_every",
            "keep_every",
        )
        limits = ("step_minutes", "slow_step_seconds", "lost_after_seconds")
        for name in (*steps, *limits, "checkpoint_minutes", "patience"):
            require(getattr(self, name) >= 0, f"train.{name} must be 0 or more")
        for name in self.trackers:
            require(name in TRACKERS, f"train.trackers: {name!r} is none of {', '.join(TRACKERS)}")
        require(len(set(self.trackers)) == len(self.trackers), "train.trackers names one twice")
        require(bool(self.tracker_project.strip()), "train.tracker_project must not be empty")
        known = ("step_mean", "micro_batch_mean")
        require(self.loss_reduction in known, f"train.loss_reduction must be one of {', '.join(known)}")
        require(self.result in ("last", "best"), "train.result must be last or best")
        require(
            self.mirror is None or re.match(r"[a-z][a-z0-9+.-]*://.", self.mirror) is not None,
            f"train.mirror {shown(self.mirror)} is no URL; give e.g. s3://bucket/runs/stage3, gs://..., file:///...",
        )
        if self.keep_best is None:
            require(self.result == "last", "train.result is best, but train.keep_best names no metric, e.g. val/loss")
            require(not self.patience, "train.patience is set, but train.keep_best names no metric, e.g. val/loss")

    @property
    def steps_per_cycle(self) -> int:
        """Optimizer steps of one schedule."""
        return self.epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.cycles * self.steps_per_cycle

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of a step on one rank; with `max_tokens` the most that there can be.

        Raises:
            ConfigError: the batch does not divide.
        """
        share = (self.micro_batch_size or 1) * world_size
        if self.batch_size % share:
            fits = [m for m in range(1, self.batch_size + 1) if self.batch_size % (m * world_size) == 0]
            advice = f"train.micro_batch_size in {fits}" if fits else f"a train.batch_size divisible by {world_size}"
            shares = f"into micro-batches of {self.micro_batch_size} on" if self.micro_batch_size else "among"
            raise ConfigError(
                f"train.batch_size {self.batch_size} does not divide {shares} {world_size} rank(s): choose {advice}"
            )
        return self.batch_size // share
