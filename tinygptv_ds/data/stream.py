"""A recipe's datasets as one stream of steps. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinygptv_ds.config.schema import DatasetSection, Recipe
from tinygptv_ds.data.features import FeatureShape, read_notes, shards_of
from tinygptv_ds.data.index import sample_counts
from tinygptv_ds.data.mixture import Mixture, SampleRef, Stream
from tinygptv_ds.data.order import DatasetOrder


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
        features: how features lie in these tars, where they hold them in place of pictures.
    """

    order: Stream
    sections: dict[str, DatasetSection]
    shards: dict[str, list[Path]]
    batch_size: int
    micro_batch_size: int
    seed: int
    features: FeatureShape | None = None

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
        sections: other datasets than the recipe's training ones, for validation; always read from pictures.

    Raises:
        DataError: shards are missing or hold no sample.
    """
    root = None if sections else recipe.data.features
    sections = sections or recipe.data.datasets
    shards = {section.name: shards_of(section, root) for section in sections}
    orders = {
        name: DatasetOrder(sample_counts(tars), seed=recipe.seed, name=name, window=recipe.data.shuffle_shards)
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
        None if root is None else read_notes(Path(root) / sections[0].name).shape,
    )
