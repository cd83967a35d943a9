"""The mixture of a recipe's datasets: exact shares, and how often each is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from tinygptv_ds.config.data_section import DatasetSection
from tinygptv_ds.config.recipe import Recipe
from tinygptv_ds.data.stream.mixture import Mixture
from tinygptv_ds.data.stream.plan import open_stream


@dataclass(frozen=True)
class Share:
    """One dataset of the mixture.

    Attributes:
        name: the dataset.
        weight: as the recipe has it.
        per_cycle: samples of it in every `Plan.cycle` samples, exactly; of steps where the recipe is homogeneous.
        percent: the same in per cent.
        samples: in one epoch of it.
        epochs_per_pass: how often it is seen until every dataset has been seen once.
        epochs_of_run: how often the recipe's steps see it.
    """

    name: str
    weight: float
    per_cycle: int
    percent: float
    samples: int
    epochs_per_pass: float
    epochs_of_run: float


@dataclass(frozen=True)
class Plan:
    """The mixture of the datasets that can train.

    Attributes:
        shares: of each, in the recipe's order.
        cycle: after so many samples the exact shares repeat.
        batch_size: samples of a step.
        steps_per_pass: steps until every sample of every dataset has been seen.
        total_steps: what the recipe trains.
    """

    shares: list[Share]
    cycle: int
    batch_size: int
    steps_per_pass: int
    total_steps: int


def plan(recipe: Recipe, sections: Sequence[DatasetSection]) -> Plan | None:
    """Return the mixture of `sections`, whose shards must all be there; None if there are none."""
    if not sections:
        return None
    mixture = Mixture({section.name: section.weight for section in sections}, seed=recipe.seed)
    data = dataclasses.replace(recipe.data, only=[section.name for section in sections], features=None)
    stream = open_stream(dataclasses.replace(recipe, data=data))
    sizes = {name: len(order) for name, order in stream.orders.items()}
    pass_steps, batch_size, total = stream.order.steps_per_epoch(), recipe.train.batch_size, recipe.train.total_steps

    def share(section: DatasetSection) -> Share:
        per_cycle, samples = mixture.shares[section.name], sizes[section.name]
        epochs_per_step = batch_size * per_cycle / mixture.cycle / samples
        return Share(
            section.name,
            section.weight,
            per_cycle,
            100 * per_cycle / mixture.cycle,
            samples,
            pass_steps * epochs_per_step,
            total * epochs_per_step,
        )

    return Plan([share(section) for section in sections], mixture.cycle, batch_size, pass_steps, total)
