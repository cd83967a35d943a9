"""Spikes of the loss: what counts as one."""

from __future__ import annotations

import math
import statistics
from collections import deque

SPIKE = 6.0  # standard deviations of the loss's logarithm
_WINDOW, _LEAST_STEPS = 128, 32  # steps that a loss is compared with, and how many of them there must be
_LEAST_DEVIATION = 0.02  # less than 12 % above the median is no spike, however calm the run


class LossSpikes:
    """Scores of how far a loss is above those before it, in standard deviations from median and 95th percentile.

    Logarithms are compared, so that one limit serves large batches, whose losses hardly vary, and small ones, whose
    losses vary by their own size. Neither of the two values is moved by a few outliers, so a spike does not hide the
    next one; and what one step in twenty reaches, e.g. where each step holds one dataset, is none.
    """

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=_WINDOW)

    @property
    def median(self) -> float:
        """The median of the losses before."""
        return math.exp(statistics.median(self._logs))

    def score(self, loss: float) -> float:
        """Return the score of a loss that has not been added yet; 0 while there are too few to compare with."""
        if len(self._logs) < _LEAST_STEPS or not loss > 0:
            return 0.0
        middle = statistics.median(self._logs)
        high = statistics.quantiles(self._logs, n=20, method="inclusive")[-1]
        deviation = (high - middle) / 1.645
        return (math.log(loss) - middle) / max(deviation, _LEAST_DEVIATION)

    def add(self, loss: float) -> None:
        """Add a step's loss; one that is not a positive number is left out."""
        if 0 < loss < math.inf:
            self._logs.append(math.log(loss))
