"""The optimizer section of a recipe: AdamW and its learning-rate schedule. Checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from tinygptv_ds.config.limits import MOST_STEPS, check_limits
from tinygptv_ds.config.nearest import nearest
from tinygptv_ds.config.parts import check_parts
from tinygptv_ds.errors import require, shown

SCHEDULES = ("published", "cosine", "constant", "wsd", "step")


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW and its schedule."""

    lr: float
    """Learning rate at the end of the warm-up."""

    min_lr: float
    """Learning rate that the schedule approaches; above `lr` the learning rate rises (as in the published stage 4)."""

    warmup_lr: float = 1e-6
    """Learning rate of the first step; below 0: that of `lr`, as in the original."""

    warmup_steps: int = 0
    """Steps of warm-up."""

    schedule: str = "published"
    """published: a warm-up that counts steps within an epoch, then a cosine since step 0, as the original computes it.
    The others warm up once, from the start: cosine then falls to `min_lr` at the last step, constant stays at `lr`,
    wsd (warm-up, stable, decay) stays there until the last `decay_steps` and then falls to `min_lr` linearly, step is
    multiplied by `decay_rate` at every epoch, down to `min_lr` (linear_warmup_step_lr of LAVIS)."""

    decay_steps: int = 0
    """Steps of the decay at the end, for the schedule wsd only."""

    decay_rate: float = 1.0
    """Factor on the learning rate at every epoch of `train.steps_per_epoch`, for the schedule step only."""

    lr_scale: dict = field(default_factory=dict)
    """Factors on the learning rate by part (as in model.train; the first that a parameter belongs to), e.g. {qformer:
    0.1}; 1 for the others."""

    weight_decay: float = 0.05
    """Weight decay of matrices; norms and biases have none."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's betas."""

    gradient_clipping: float | None = None
    """Largest gradient norm; null: the value of the DeepSpeed JSON (0: off, as published), with which a number must
    agree."""

    def __post_init__(self) -> None:
        check_limits("optimizer", self, lr=1000, min_lr=1000, warmup_lr=1000, weight_decay=1000, gradient_clipping=1e9)
        check_limits("optimizer", self, warmup_steps=MOST_STEPS, decay_steps=MOST_STEPS)
        for name in ("weight_decay", "gradient_clipping"):
            require((getattr(self, name) or 0) >= 0, f"optimizer.{name} must be 0 or more")
        require(self.lr > 0 and self.min_lr >= 0, "optimizer.lr must be positive and optimizer.min_lr not negative")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps must be 0 or more")
        require(
            self.schedule in SCHEDULES,
            f"optimizer.schedule: {shown(self.schedule)} is unknown{nearest(self.schedule, SCHEDULES)}",
        )
        wsd = self.schedule == "wsd"
        require(self.decay_steps > 0 or not wsd, "optimizer.schedule wsd needs optimizer.decay_steps above 0")
        require(self.decay_steps == 0 or wsd, "optimizer.decay_steps is of the schedule wsd; leave it 0 for others")
        step = self.schedule == "step"
        require(self.decay_rate == 1 or step, "optimizer.decay_rate is of the schedule step; leave it 1 for others")
        require(
            0 < self.decay_rate < 1 or not step,
            "optimizer.schedule step needs an optimizer.decay_rate between 0 and 1, e.g. 0.5",
        )
        check_parts("optimizer.lr_scale", self.lr_scale)
        for part, factor in self.lr_scale.items():
            number = isinstance(factor, int | float) and not isinstance(factor, bool)
            in_range = number and 0 < factor <= 1e6
            require(in_range, f"optimizer.lr_scale.{part} must be a positive number, not {shown(factor)}")
        in_range = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(in_range, f"optimizer.betas must be two numbers in [0, 1), not {shown(self.betas)}")
