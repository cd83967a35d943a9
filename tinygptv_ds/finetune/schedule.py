"""How long to train, with how large steps and at what learning rate: plain arithmetic from the size of the data.

The constants are choices, not laws; each says where it comes from. All of them end up in the recipe that is written,
with these reasons, where they can be changed.
"""

from __future__ import annotations

from dataclasses import dataclass

# Passes over the data by the number of training samples. A small set needs more of them to take enough steps at all; a
# large one is learned in fewer, and repeating it costs hours and overfits.
_EPOCHS = ((100, 10), (1_000, 8), (10_000, 5))
_MOST_SAMPLES_EPOCHS = 3
_STEPS = 200  # wanted at least: a cosine with fewer steps hardly has a plateau between its warm-up and its end
_BATCHES = (4, 64)  # samples of a step, at least and at most; LLaVA-1.5 takes 128 for 665,000 samples
_WARMUP = 0.03  # share of the steps, as LLaVA and most LoRA recipes have it
# LLaVA-1.5 trains LoRA with 2e-4 at batches of 128; half of it for the smaller batches here. It belongs to Phi-2's
# width: a narrower model needs a larger rate, in inverse proportion (Yang et al., Tensor Programs V, arXiv 2203.03466).
_LR, _LR_WIDTH = 1e-4, 2560
LR_SCALE = {"projections": 0.1, "norms": 0.1}  # LLaVA-1.5 trains its projector at a tenth of the rate of LoRA
_MIN_LR = 0.1  # of the learning rate, at the end


@dataclass(frozen=True)
class Given:
    """What a user has decided already with `--set`; None leaves it to `plan_schedule`."""

    batch_size: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Schedule:
    """The length of a run.

    Attributes:
        epochs: passes over the training samples.
        batch_size: samples of one optimizer step over all ranks.
        steps_per_epoch: optimizer steps of a pass, the last one filled up with samples of the next.
        warmup_steps: steps of warm-up.
        lr: highest learning rate.
    """

    epochs: int
    batch_size: int
    steps_per_epoch: int
    warmup_steps: int
    lr: float

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch

    @property
    def min_lr(self) -> float:
        """The learning rate at the end."""
        return _MIN_LR * self.lr


def plan_schedule(samples: int, ranks: int, width: int, given: Given = Given()) -> Schedule:
    """Return the schedule for a number of training samples.

    Args:
        samples: training samples, at least 1.
        ranks: number of ranks; the batch divides among them.
        width: Phi's width, on which the learning rate depends.
        given: what is decided already.
    """
    epochs = given.epochs or next((many for below, many in _EPOCHS if samples < below), _MOST_SAMPLES_EPOCHS)
    batch = given.batch_size or _batch_size(samples * epochs // _STEPS, ranks)
    steps_per_epoch = -(-samples // batch)
    steps = epochs * steps_per_epoch
    return Schedule(
        epochs=epochs,
        batch_size=batch,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=min(steps - 1, max(1, round(_WARMUP * steps))),
        lr=float(f"{_LR * _LR_WIDTH / width:.1e}"),
    )


def micro_batch_sizes(batch_size: int, ranks: int) -> list[int]:
    """Return the micro-batch sizes into which a step divides on every rank, the largest first."""
    share = batch_size // ranks
    return [size for size in range(share, 0, -1) if share % size == 0]


def _batch_size(wanted: int, ranks: int) -> int:
    """Return the largest power of two up to `wanted`, within `_BATCHES`, as a multiple of the ranks."""
    least, most = _BATCHES
    size = least
    while 2 * size <= min(wanted, most):
        size *= 2
    return -(-size // ranks) * ranks
