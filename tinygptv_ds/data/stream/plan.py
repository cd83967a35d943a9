"""A recipe's datasets as one stream of steps, each shared out to ranks and micro-batches. No torch."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinygptv_ds.config.data_section import DatasetSection
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.shards.cache import ShardCache, count_samples, open_cache
from tinygptv_ds.data.shards.index import ShardIndex, load_index
from tinygptv_ds.data.shards.remote import RemoteShard, Shard
from tinygptv_ds.data.stream.mixture import Mixture, SampleRef, StepSamples, Stream
from tinygptv_ds.data.stream.order import DatasetOrder, held_out_counts
from tinygptv_ds.data.stream.packing import LengthEstimate, StepPacking, estimate_for, pack
from tinygptv_ds.errors import DataError
from tinygptv_ds.features.format import FeatureShape, read_notes, shards_of

log = logging.getLogger(__name__)


_LENGTHS_KEPT = 512  # shards, each 60 kB for 10,000 samples


@dataclass(frozen=True)
class OpenStream:
    """The order of the samples, and the shards that hold them.

    Attributes:
        order: step to samples, a pure function: a `Stream`, or the `FixedSamples` of a validation.
        orders: the same of each dataset alone.
        sections: the recipe's datasets by name.
        shards: tars of each dataset, in the order that `SampleRef.shard` counts.
        batch_size: samples of a step.
        micro_batch_size: samples of a micro-batch, or None where `max_tokens` says what it holds.
        max_tokens: tokens of a micro-batch at most, or None.
        estimate: how long samples are, for packing.
        seed: the recipe's.
        cache: where remote shards are fetched to.
        features: the format of the features in these tars, where they hold features in place of images.
    """

    order: Any
    orders: dict[str, DatasetOrder]
    sections: dict[str, DatasetSection]
    shards: dict[str, list[Shard]]
    batch_size: int
    micro_batch_size: int | None
    max_tokens: int | None
    estimate: LengthEstimate
    seed: int
    cache: ShardCache
    features: FeatureShape | None = None

    @property
    def names(self) -> list[str]:
        """Names of the datasets, in the recipe's order."""
        return list(self.sections)


@dataclass(frozen=True)
class StepPlan:
    """One step: its samples, and which rank computes which.

    Attributes:
        samples: of the whole step.
        packing: their places.
        cost: of each, as estimated, float64 `[samples]`.
    """

    samples: StepSamples
    packing: StepPacking
    cost: np.ndarray

    def micro_batch(self, number: int, rank: int) -> list[SampleRef]:
        """Return the samples of micro-batch `number` of a rank; over all ranks and numbers they are the whole step."""
        return self.samples.refs(self.packing.share(number, rank))

    def rank_share(self, rank: int) -> list[SampleRef]:
        """Return all samples of a rank, in the order of the stream."""
        return self.samples.refs(self.packing.rank_share(rank))


@dataclass
class Planner:
    """Plans steps, a pure function except for caches: every rank and dataloader worker computes the same."""

    stream: OpenStream
    world_size: int
    _lengths: OrderedDict[tuple[str, int], np.ndarray] = field(default_factory=OrderedDict, repr=False)
    _plans: OrderedDict[int, StepPlan] = field(default_factory=OrderedDict, repr=False)

    def plan(self, step: int) -> StepPlan:
        """Return the plan of a step, 0 <= step."""
        if step not in self._plans:
            self._plans[step] = self._make(step)
            if len(self._plans) > 2:
                self._plans.popitem(last=False)
        return self._plans[step]

    def _make(self, step: int) -> StepPlan:
        samples = self.stream.order.samples(step)
        lengths = self.lengths_of(samples)
        cost = self.stream.estimate.cost(lengths)
        packing = pack(
            cost,
            self.stream.estimate.tokens(lengths),
            world_size=self.world_size,
            micro_batch_size=self.stream.micro_batch_size,
            max_tokens=self.stream.max_tokens,
        )
        return StepPlan(samples, packing, cost)

    def lengths_of(self, samples: StepSamples) -> np.ndarray:
        """Return `ShardIndex.lengths` of all samples of a step, `[n, 3]`, read one shard at a time."""
        lengths = np.zeros((len(samples), 3), dtype=np.uint16)
        by_shard = np.lexsort((samples.shard, samples.dataset))
        pairs = np.stack([samples.dataset, samples.shard])[:, by_shard]
        starts = np.flatnonzero(np.diff(pairs, axis=1, prepend=-1).any(axis=0))
        for mine in np.split(by_shard, starts[1:]):
            of_shard = self._shard_lengths(samples.names[samples.dataset[mine[0]]], int(samples.shard[mine[0]]))
            if samples.index[mine].max() < len(of_shard):
                lengths[mine] = of_shard[samples.index[mine]]
        return lengths

    def _index(self, shard: Shard) -> ShardIndex:
        return self.stream.cache.index(shard) if isinstance(shard, RemoteShard) else load_index(shard)

    def _shard_lengths(self, name: str, shard: int) -> np.ndarray:
        key = (name, shard)
        if key not in self._lengths:
            try:
                self._lengths[key] = self._index(self.stream.shards[name][shard]).lengths.copy()
            except DataError as error:  # its samples drop out where they are read
                log.warning("%s; its samples count as empty when the step is shared out", error)
                self._lengths[key] = np.zeros((0, 3), dtype=np.uint16)
            if len(self._lengths) > _LENGTHS_KEPT:
                self._lengths.popitem(last=False)
        self._lengths.move_to_end(key)
        return self._lengths[key]


def open_stream(recipe: Recipe, sections: list[DatasetSection] | None = None, *, held_out: bool = False) -> OpenStream:
    """Find the shards, count their samples (through the indexes next to them) and fix the order.

    Args:
        recipe: names the datasets, their weights and the batch size.
        sections: other datasets than the recipe's training ones, whole; always read from images.
        held_out: of the training datasets, the samples that `data.validation_share` keeps from training.

    Raises:
        DataError: shards are missing or hold no sample.
    """
    share = 0.0 if sections else recipe.data.validation_share
    root = None if sections else recipe.data.features
    sections = sections or recipe.data.used
    shards = {s.name: shards_of(s, root, allow_pipe=s.name in recipe.data.allow_pipe) for s in sections}
    cache = open_cache(recipe.data)
    orders = {
        name: _order(recipe, name, np.array(count_samples(tars, cache), dtype=np.int64), share, held_out)
        for name, tars in shards.items()
    }
    mixture = Mixture({section.name: section.weight for section in sections}, seed=recipe.seed)
    return OpenStream(
        Stream(orders, mixture, batch_size=recipe.train.batch_size, homogeneous=recipe.data.homogeneous),
        orders,
        {section.name: section for section in sections},
        shards,
        recipe.train.batch_size,
        recipe.train.micro_batch_size,
        recipe.train.max_tokens,
        estimate_for(recipe),
        recipe.seed,
        cache,
        None if root is None else read_notes(Path(root) / sections[0].name).shape,
    )


def _order(recipe: Recipe, name: str, counts: np.ndarray, share: float, held_out: bool) -> DatasetOrder:
    kept_back = held_out_counts(counts, share)
    if share and not kept_back.sum():
        raise DataError(
            f"dataset {name}: data.validation_share {share} of its {counts.sum()} samples holds out none; raise it"
        )
    trained = counts - kept_back
    drawn, first = (kept_back, trained) if held_out else (trained, None)
    return DatasetOrder(drawn, first=first, seed=recipe.seed, name=name, window=recipe.data.shuffle_shards)
