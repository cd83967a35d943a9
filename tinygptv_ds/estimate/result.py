"""The result of an estimate: parameters, memory, operations, launches, speed, communication and disk."""

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
    """The speed of a card with micro-batches of some size, without communication.

    Attributes:
        micro_batch: samples of one forward pass on one GPU.
        samples_per_second: samples per second of all GPUs together.
        mfu: share of the peak that is reached.
        launch_bound: whether the GPU waits for the host, which takes longer to launch kernels than the GPU to run them.
    """

    micro_batch: float
    samples_per_second: float
    mfu: float
    launch_bound: bool


@dataclass(frozen=True)
class CardSpeed:
    """The speed of a card.

    Attributes:
        own: with the recipe's micro-batches.
        full: with the smallest micro-batches that keep the GPU busy.
        full_fits: whether the card's memory suffices for those, under ZeRO-2.
        hours: duration of the run.
        step_seconds: duration of one optimizer step.
    """

    own: Speed
    full: Speed
    full_fits: bool
    hours: float
    step_seconds: float


@dataclass(frozen=True)
class Launches:
    """The work of the host in a step.

    Attributes:
        kernels: kernels of the forward and backward pass of a micro-batch under ZeRO-1 and 2.
        zero_3_kernels: the same under ZeRO-3, which goes without compiled blocks.
        optimizer: kernels of an optimizer step.
        seconds: time of the host for one kernel.
        compiled: whether the blocks are compiled under ZeRO-1 and 2.
        from_features: whether images come as the Q-Former's outputs.
    """

    kernels: float
    zero_3_kernels: float
    optimizer: float
    seconds: float
    compiled: bool
    from_features: bool

    def of(self, micro_batches: float) -> float:
        """Return the seconds of the host in a step of so many micro-batches."""
        return self.seconds * (self.kernels * micro_batches + self.optimizer)


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
        quantized: frozen weights in fewer than 16 bit, None where there are none.
        data: the mean sample, and the datasets' sizes.
        micro_batch: samples of one forward pass on one GPU.
        gpus: number of GPUs.
        memory: memory of one GPU, by ZeRO setting.
        memory_by_size: the same with micro-batches of other numbers of samples.
        operations: operations of one sample, by part.
        recomputed: share of Phi's blocks that run forward twice.
        mfu: share of the cards' peak that is reached where the GPU is busy.
        launches: the work of the host.
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
    memory_by_size: dict[int, dict[str, Memory]]
    operations: dict[str, Operations]
    recomputed: float
    mfu: float
    launches: Launches
    speed: dict[str, CardSpeed]
    sent: dict[str, SentBytes]
    disk: Disk

    @property
    def sample_operations(self) -> float:
        """Return the operations of one sample."""
        return sum(part.total for part in self.operations.values())
