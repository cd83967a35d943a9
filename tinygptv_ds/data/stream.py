"""A recipe's datasets as one stream of steps. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tinygptv_ds.config.schema import DatasetSection, Recipe
from tinygptv_ds.data.cache import ShardCache, count_samples, open_cache
from tinygptv_ds.data.mixture import Mixture, SampleRef, Stream
from tinygptv_ds.data.order import DatasetOrder
from tinygptv_ds.data.remote import Shard
from tinygptv_ds.data.shards import expand_shards


@dataclass(frozen=True)
class OpenStream:
    """The order of the samples and where they lie.

    Attributes:
        order: step to samples, a pure function.
        sections: the recipe's datasets by name.
        shards: tars of each dataset, in the order that `SampleRef.shard` counts.
        batch_size: samples of a step.
        micro_batch_size: samples of a micro-batch.
        seed: the recipe's.
        cache: where remote shards are fetched to.
    """

    order: Stream
    sections: dict[str, DatasetSection]
    shards: dict[str, list[Shard]]
    batch_size: int
    micro_batch_size: int
    seed: int
    cache: ShardCache

    @property
    def names(self) -> list[str]:
        """The datasets, in the recipe's order."""
        return list(self.sections)

    def micro_batch(self, step: int, number: int, rank: int, world_size: int) -> list[SampleRef]:
        """Samples of micro-batch `number` of a step on one rank; over all ranks and numbers they are the whole step."""
        size = self.micro_batch_size
        first = (number * world_size + rank) * size
        return self.order.step(step)[first : first + size]


def open_stream(recipe: Recipe, sections: list[DatasetSection] | None = None) -> OpenStream:
    """Find the shards, count their samples (through the indexes beside them) and fix the order.

    Args:
        recipe: names the datasets, their weights and the batch size.
        sections: other datasets than the recipe's training ones, for validation.

    Raises:
        DataError: shards are missing or hold no sample.
    """
    sections = sections or recipe.data.datasets
    pipes = recipe.data.allow_pipe
    shards = {s.name: expand_shards(s.shards, allow_pipe=s.name in pipes) for s in sections}
    cache = open_cache(recipe.data)
    orders = {
        name: DatasetOrder(count_samples(tars, cache), seed=recipe.seed, name=name, window=recipe.data.shuffle_shards)
        for name, tars in shards.items()
    }
    mixture = Mixture({section.name: section.weight for section in sections}, seed=recipe.seed)
    return OpenStream(
        Stream(orders, mixture, batch_size=recipe.train.batch_size, homogeneous=recipe.data.homogeneous),
        {section.name: section for section in sections},
        shards,
        recipe.train.batch_size,
        recipe.train.micro_batch_size,
        recipe.seed,
        cache,
    )
