"""The micro-batches of one rank, step by step, from dataloader workers.

`MicroBatches` maps (step, number) to a micro-batch, a pure function of its place: the batches are the same for any
number of workers, and lost workers are replaced at the step that is awaited. A sample that cannot be used is left out
of its micro-batch and reported; no other sample moves.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import Dataset

from tinygptv_ds.data.loader.batch import MicroBatch, collate
from tinygptv_ds.data.loader.sample import (
    Sample,
    SampleDraft,
    SkippedSample,
    Tokens,
    decode_sample,
    draft_sample,
    read_features,
)
from tinygptv_ds.data.loader.workers import OnHang, Workers, WorkersLostError
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import OpenStream, Planner
from tinygptv_ds.errors import DataError

log = logging.getLogger(__name__)
_LOSSES, _WITHIN = 3, 100  # so many losses of dataloader workers are survived within so many steps


class MicroBatches(Dataset):
    """Maps (step, number of the micro-batch within it) to a `MicroBatch` of this rank."""

    def __init__(self, stream: OpenStream, tokens: Tokens, *, rank: int, world_size: int) -> None:
        self._stream = stream
        self._tokens = tokens
        self._rank = rank
        self._planner = Planner(stream, world_size)
        self._reader = ShardReader(cache=stream.cache)
        self._no_features = None if stream.features is None else read_features((), stream.features, "")

    def count(self, step: int) -> int:
        """Return the number of micro-batches of a step, the same on every rank."""
        if self._stream.micro_batch_size is not None:
            return -(-self._stream.batch_size // (self._stream.micro_batch_size * self._planner.world_size))
        return self._planner.plan(step).packing.micro_batches

    def __getitem__(self, place: tuple[int, int]) -> MicroBatch:
        step, number = place
        skipped: list[SkippedSample] = []
        drafts: list[SampleDraft] = []
        samples: list[Sample] = []
        # All texts, then all images: alternating, each would push the other's code out of the core's caches.
        for ref in self._planner.plan(step).micro_batch(number, self._rank):
            with _skipping(ref, skipped):
                drafts.append(draft_sample(self._stream, self._reader, ref, self._tokens))
        for draft in drafts:
            with _skipping(draft.ref, skipped):
                samples.append(decode_sample(draft, self._stream, self._tokens))
        batch = collate(
            samples,
            self._stream.names,
            queries=self._tokens.image.count,
            image_size=self._tokens.image_size,
            bos=self._tokens.tokenizer.bos_token_id,
            seed=self._stream.seed,
            no_features=self._no_features,
        )
        return MicroBatch(batch, tuple(sorted(skipped, key=lambda item: item.ref.position)))


@contextmanager
def _skipping(ref: SampleRef, skipped: list[SkippedSample]) -> Iterator[None]:
    """Append the sample to `skipped` if the block finds that it cannot be used."""
    try:
        yield
    except SampleError as error:
        skipped.append(SkippedSample(ref, error.reason, str(error)))


def load_steps(
    dataset: MicroBatches,
    *,
    first: int,
    last: int,
    num_workers: int,
    pin_memory: bool,
    read_seconds: float = 0.0,
    on_hang: OnHang | None = None,
) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of steps `first` to `last` - 1, one list for each step.

    Dataloader workers that are killed or hang are replaced at the step that is awaited: a micro-batch is a function of
    its place, so no sample is lost or repeated.

    Args:
        dataset: this rank's.
        first: 0, or the step that a resumed run starts at.
        last: the step before which the run ends.
        num_workers: dataloader workers; 0 loads in this process.
        pin_memory: whether batches come in pinned memory, for a GPU.
        read_seconds: time limit of one micro-batch from a dataloader worker; 0: none.
        on_hang: called before dataloader workers that exceed the limit are killed.

    Raises:
        DataError: dataloader workers were lost again and again.
    """
    lost_at: deque[int] = deque(maxlen=_LOSSES)
    step = first
    while step < last:
        try:
            for micro_batches in _steps(dataset, step, last, num_workers, pin_memory, read_seconds, on_hang):
                yield micro_batches
                step += 1
        except WorkersLostError as lost:
            if len(lost_at) == _LOSSES and step - lost_at[0] < _WITHIN:
                raise DataError(
                    f"{lost}, while step {step + 1} was awaited, for the {_LOSSES + 1}th time within {_WITHIN} steps. "
                    "If memory is short, lower data.num_workers or train.micro_batch_size; if a read hangs, check the "
                    "storage of the shards, or raise data.read_timeout_seconds"
                ) from lost
            lost_at.append(step)
            log.warning("%s, while step %d was awaited; new ones start at this step", lost, step + 1)


def _steps(
    dataset: MicroBatches,
    first: int,
    last: int,
    num_workers: int,
    pin_memory: bool,
    read_seconds: float,
    on_hang: OnHang | None,
) -> Iterator[list[MicroBatch]]:
    """Yield steps as `load_steps` does until a dataloader worker is lost; then raise WorkersLostError."""
    counts: deque[int] = deque()

    def places() -> Iterator[tuple[int, int]]:
        for step in range(first, last):
            counts.append(dataset.count(step))
            yield from ((step, number) for number in range(counts[-1]))

    workers = Workers(
        dataset,
        places(),
        num_workers=num_workers,
        pin_memory=pin_memory,
        read_seconds=read_seconds,
        on_hang=on_hang,
    )
    for _ in range(first, last):
        head = workers.next()  # the workers read ahead, so its step has been counted by now
        yield [head, *(workers.next() for _ in range(counts.popleft() - 1))]
