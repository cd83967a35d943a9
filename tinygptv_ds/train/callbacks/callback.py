"""The protocol between the training loop and everything that is not training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.train.metrics.accumulator import Totals


@dataclass
class LogRecord:
    """One log line in the making.

    Attributes:
        step: optimizer steps done.
        totals: what all ranks did since the last log line.
        metrics: metrics by name, in addition to those derived from the totals.
        remarks: further parts of the console line.
    """

    step: int
    totals: Totals
    metrics: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


class Callback:
    """Five places of the training loop; each method does nothing unless a subclass overrides it.

    All methods are called on all ranks in the same order, so that they may use collectives. Steps count from 0.
    """

    def on_batch(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Look at this rank's micro-batches of a step before they are computed."""

    def on_step(self, step: int) -> None:
        """Act after an optimizer step."""

    def on_log(self, record: LogRecord) -> None:
        """Add metrics or remarks to a log line, every `train.log_every` steps."""

    def on_measure(self, done: int, metrics: Mapping[str, float]) -> None:
        """Look at what was measured on held-out samples after `done` steps, by name."""

    def on_end(self) -> None:
        """Act once after the last step."""


class CallbackList(Callback):
    """Several callbacks, called one after the other."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = list(callbacks)

    def extend(self, callbacks: Iterable[Callback]) -> None:
        """Add callbacks at the end."""
        self._callbacks.extend(callbacks)

    def on_batch(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.on_batch(step, micro_batches)

    def on_step(self, step: int) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.on_step(step)

    def on_log(self, record: LogRecord) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.on_log(record)

    def on_measure(self, done: int, metrics: Mapping[str, float]) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.on_measure(done, metrics)

    def on_end(self) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.on_end()
