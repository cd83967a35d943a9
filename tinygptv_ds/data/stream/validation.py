"""The samples that a run is validated on: of every dataset the first ones of its order, always the same. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.stream.mixture import SampleRef, StepSamples
from tinygptv_ds.data.stream.order import DatasetOrder
from tinygptv_ds.data.stream.plan import OpenStream, open_stream


@dataclass(frozen=True)
class FixedSamples:
    """A finite set of samples in portions, which takes the place of a stream's endless order.

    Attributes:
        whole: all samples, dataset by dataset.
        portion: samples of a step; the last step may have fewer.
    """

    whole: StepSamples
    portion: int

    @property
    def steps(self) -> int:
        """How many portions there are."""
        return -(-len(self.whole) // self.portion)

    def samples(self, t: int) -> StepSamples:
        """Return the samples of portion `t`."""
        part = slice(t * self.portion, (t + 1) * self.portion)
        columns = (getattr(self.whole, name)[part] for name in ("position", "dataset", "epoch", "shard", "index"))
        return StepSamples(self.whole.names, *columns)

    def step(self, t: int) -> list[SampleRef]:
        """Return `samples` one by one."""
        return self.samples(t).refs()


def validation_stream(recipe: Recipe) -> OpenStream | None:
    """Return the stream of the validation datasets, or of what is held out of the training's; None for neither.

    Its order is a `FixedSamples` with `train.validation_samples` of each dataset, or as many as there are.
    """
    if not recipe.data.has_validation:
        return None
    stream = open_stream(recipe, recipe.data.validation, held_out=not recipe.data.validation)
    whole = _first(stream.orders, recipe.train.validation_samples)
    return replace(stream, order=FixedSamples(whole, recipe.train.batch_size))


def _first(orders: Mapping[str, DatasetOrder], count: int) -> StepSamples:
    """Return the first `count` draws of each dataset."""
    counts = [min(count, len(order)) for order in orders.values()]
    draws = [order.draws(0, n) for order, n in zip(orders.values(), counts, strict=True)]
    columns = (np.concatenate(arrays) for arrays in zip(*draws, strict=True))
    which = np.repeat(np.arange(len(orders)), counts)
    return StepSamples(list(orders), np.arange(len(which)), which, *columns)
