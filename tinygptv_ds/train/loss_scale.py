"""fp16's dynamic loss scale under autocast."""

from __future__ import annotations

from typing import Any


class LossScale:
    """fp16's dynamic loss scale, by the rule and constants of torch's GradScaler.

    DeepSpeed 0.19 starts a GradScaler of its own under `torch_autocast` in fp16, but never lowers it after an overflow
    that ZeRO has caught, so that every later step is skipped too. This one goes through `override_loss_scale` instead.

    Attributes:
        value: the factor on the loss.
        good_steps: steps since it last changed.
    """

    START = 65536.0

    def __init__(self, optimizer: Any, value: float = START, good_steps: int = 0) -> None:
        optimizer.torch_autocast_gradscaler = None
        self._optimizer = optimizer
        self.set(value, good_steps)

    def set(self, value: float, good_steps: int) -> None:
        """Take over a state, as from a checkpoint."""
        self.value, self.good_steps = value, good_steps
        self._optimizer.override_loss_scale(value)

    def update(self, skipped: bool) -> None:
        """Halve after a skipped step, double after 2000 good ones in a row."""
        if skipped:
            self.set(self.value * 0.5, 0)
        elif self.good_steps + 1 >= 2000:
            self.set(self.value * 2.0, 0)
        else:
            self.good_steps += 1
