"""The result of an estimate: parameters, memory, operations, speed, communication and disk."""

from __future__ import annotations

from dataclasses import dataclass

from tinygptv_ds.estimate.communication import SentBytes
from tinygptv_ds.estimate.data_summary import DataSummary
from tinygptv_ds.estimate.memory import Memory
from tinygptv_ds.estimate.model_size import QuantizedWeights


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one part of the model for one sample."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Return the sum of both."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Speed:
    """The speed of a card at the given share of its peak, without communication.

    Attributes:
        samples_per_second: samples per second of all GPUs together.
        hours: duration of the run.
        step_seconds: duration of one optimizer step.
    """

    samples_per_second: float
    hours: float
    step_seconds: float


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Attributes:
        shards: all datasets, or the samples of the run at an assumed size.
        shards_measured: whether `shards` are the datasets.
        features: the features of as many images, in bf16.
        checkpoint: one checkpoint: weights and two moments in fp32.
        checkpoints: the checkpoints that are kept, and the one being written.
        model: the result of the run, and `best/` where it is kept.
    """

    shards: float
    shards_measured: bool
    features: float
    checkpoint: float
    checkpoints: float
    model: float


@dataclass(frozen=True)
class Estimate:
    """All that is estimated of a run.

    Attributes:
        sizes_source: a phrase that says where the model's sizes come from.
        parameters: number of parameters by part.
        trained: trained parts.
        quantized: frozen weights in 4 or 8 bit, None where all of them are in 16.
        data: the mean sample, and the datasets' sizes.
        micro_batch: samples of one forward pass on one GPU.
        gpus: number of GPUs.
        memory: memory of one GPU, by ZeRO setting.
        operations: operations of one sample, by part.
        recomputed: share of Phi's blocks that run forward twice.
        mfu: share of the cards' peak that is reached.
        speed: speed by card.
        sent: bytes that each GPU sends in a step, by ZeRO setting.
        disk: bytes on disk.
    """

    sizes_source: str
    parameters: dict[str, int]
    trained: tuple[str, ...]
    quantized: QuantizedWeights | None
    data: DataSummary
    micro_batch: float
    gpus: int
    memory: dict[str, Memory]
    operations: dict[str, Operations]
    recomputed: float
    mfu: float
    speed: dict[str, Speed]
    sent: dict[str, SentBytes]
    disk: Disk

    @property
    def sample_operations(self) -> float:
        """Return the operations of one sample."""
        return sum(part.total for part in self.operations.values())
