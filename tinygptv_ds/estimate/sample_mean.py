"""What a recipe's samples hold on average: from the indexes of the shards that are here, else assumed. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.stream.availability import absent
from tinygptv_ds.data.stream.plan import OpenStream, Planner, open_stream
from tinygptv_ds.estimate.costs import MeanSample

_SAMPLES = 2000  # that are looked at
# Where the data are not here: one image, and lengths that the published datasets have about.
ASSUMED = {
    1: MeanSample(1, 48, 15),
    2: MeanSample(1, 48, 15),
    3: MeanSample(1, 160, 100),
    4: MeanSample(1, 128, 40),
}
ASSUMED_SAMPLE_BYTES = 60_000  # a JPEG of about 480 pixels


@dataclass(frozen=True)
class DataFacts:
    """The mean sample, and what is on disk.

    Attributes:
        sample: on average.
        source: where that is from, in words.
        samples: in all datasets, or None where they are not here.
        shard_bytes: of all shards, likewise.
    """

    sample: MeanSample
    source: str
    samples: int | None = None
    shard_bytes: int | None = None


def data_facts(recipe: Recipe) -> DataFacts:
    """Measured where every dataset's shards lie on this machine, else assumed by stage."""
    if absent(recipe.data):
        return DataFacts(ASSUMED[recipe.stage], "assumed; the datasets are not all here")
    stream = open_stream(recipe)
    shards = [shard for shards in stream.shards.values() for shard in shards]
    if not all(isinstance(shard, Path) for shard in shards):
        return DataFacts(ASSUMED[recipe.stage], "assumed; shards lie elsewhere, and nothing is fetched for an estimate")
    return DataFacts(
        _mean(stream),
        "measured on the shards' indexes",
        sum(map(len, stream.orders.values())),
        sum(shard.stat().st_size for shard in shards),
    )


def _mean(stream: OpenStream) -> MeanSample:
    planner = Planner(stream, 1)
    steps = range(-(-_SAMPLES // stream.batch_size))
    lengths = np.concatenate([planner.lengths_of(stream.order.samples(step)) for step in steps])
    tokens, targets = stream.estimate.tokens(lengths), stream.estimate.targets(lengths)
    return MeanSample(float(lengths[:, 0].mean()), float(tokens.mean()), float(targets.mean()))
