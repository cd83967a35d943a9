"""What a recipe's samples contain on average: from the indexes of local shards, else assumed. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.stream.availability import absent
from tinygptv_ds.data.stream.plan import OpenStream, Planner, open_stream
from tinygptv_ds.models.flops import BatchCounts

_SAMPLES = 2000  # number of samples that the mean is taken of


@dataclass(frozen=True)
class MeanSample:
    """The mean sample.

    Attributes:
        images: number of images.
        tokens: rows in Phi, those of images included.
        targets: target tokens among them.
    """

    images: float
    tokens: float
    targets: float

    @property
    def counts(self) -> BatchCounts:
        """Return the counts that its operations follow from, as if every sample were as long as the mean."""
        return BatchCounts(self.tokens, self.tokens**2, self.targets, self.images)


# Used where the data are not local: one image, and about the lengths of the published datasets.
ASSUMED = {
    1: MeanSample(1, 48, 15),
    2: MeanSample(1, 48, 15),
    3: MeanSample(1, 160, 100),
    4: MeanSample(1, 128, 40),
}
ASSUMED_SAMPLE_BYTES = 60_000  # a JPEG of about 480 pixels


@dataclass(frozen=True)
class DataSummary:
    """The mean sample, and the sizes on disk.

    Attributes:
        sample: the mean sample.
        source: a phrase that names where it comes from.
        samples: number of samples in all datasets, or None where the data are not local.
        shard_bytes: bytes of all shards, in the same way.
    """

    sample: MeanSample
    source: str
    samples: int | None = None
    shard_bytes: int | None = None


def summarize_data(recipe: Recipe) -> DataSummary:
    """Return what the shards contain if all of them are on this machine, else what is assumed for the stage."""
    if absent(recipe.data):
        return DataSummary(ASSUMED[recipe.stage], "assumed; not all datasets are local")
    stream = open_stream(recipe)
    shards = [shard for shards in stream.shards.values() for shard in shards]
    local = [shard for shard in shards if isinstance(shard, Path)]
    if len(local) < len(shards):
        return DataSummary(ASSUMED[recipe.stage], "assumed; some shards are remote, and an estimate downloads nothing")
    return DataSummary(
        _mean(stream),
        "measured on the shards' indexes",
        sum(map(len, stream.orders.values())),
        sum(shard.stat().st_size for shard in local),
    )


def _mean(stream: OpenStream) -> MeanSample:
    planner = Planner(stream, 1)
    steps = range(-(-_SAMPLES // stream.batch_size))
    lengths = np.concatenate([planner.lengths_of(stream.order.samples(step)) for step in steps])
    tokens, targets = stream.estimate.tokens(lengths), stream.estimate.targets(lengths)
    return MeanSample(float(lengths[:, 0].mean()), float(tokens.mean()), float(targets.mean()))
